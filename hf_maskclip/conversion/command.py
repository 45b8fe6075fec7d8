"""`hf-maskclip convert`: a checkpoint of open_clip as a folder of Transformers, or back."""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPProcessor, PreTrainedTokenizerBase

from ..errors import as_config_error, fail
from ..model_folder import check_reachable, find_model
from ..models.modeling_maskclip import MaskCLIPModel
from .clip import save_processor
from .open_clip import convert_open_clip_model, export_to_open_clip
from .open_clip_folder import find_open_clip_model
from .open_clip_tokenizer import clip_tokenizer
from .tokens import ends_otherwise, lacks_tokenizer, misfit


def to_open_clip(options: argparse.Namespace) -> None:
    """Write a model of Transformers for open_clip."""
    if options.open_clip_model or options.weights or options.tokenizer:
        fail("--open_clip_model, --weights and --tokenizer are of a checkpoint of open_clip, and not for --to open_clip")
    source = find_model(options.source)
    with as_config_error("source", source):
        model, info = MaskCLIPModel.from_pretrained(source, patch_mask="none", dtype=torch.float32, output_loading_info=True)
        processor = CLIPProcessor.from_pretrained(source)
    if unknown := sorted(name for name in info["unexpected_keys"] if not name.endswith("position_ids")):
        fail(f"{source}: has {len(unknown)} weights that a CLIP has not, such as {unknown[0]!r}")
    text = model.config.text_config
    _check_tokenizer(processor.tokenizer, source, text.vocab_size, text.eos_token_id)
    with as_config_error("output", options.output):
        export_to_open_clip(model, options.output, processor)
    print(f'written to {options.output}: open_clip.create_model_and_transforms("local-dir:{options.output}")')


def from_open_clip(options: argparse.Namespace) -> None:
    """Write a checkpoint of open_clip as a model of Transformers."""
    with as_config_error("source", options.source):
        source = find_open_clip_model(options.source, options.open_clip_model or "")
    tokenizer = _load_tokenizer(options.tokenizer or source.tokenizer())
    token_ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with as_config_error("source", options.source):
        converted = convert_open_clip_model(source, token_ids, options.weights)
    text = converted.model.config.text_config
    _check_tokenizer(tokenizer, options.source, text.vocab_size, converted.end_token)
    tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
    with as_config_error("output", options.output):
        converted.model.save_pretrained(options.output)
        save_processor(CLIPProcessor(image_processor=converted.image_processor, tokenizer=tokenizer), options.output)
    for remark in converted.remarks:
        print(remark)
    if converted.averages and not options.weights:
        print(f"taken: the weights that were trained; their average is there too: --weights {converted.averages[0]}")
    if converted.extra:
        print(f"left out, for a CLIP has no such weights: {', '.join(converted.extra)}")
    print(f'written to {options.output}: AutoModel.from_pretrained("{options.output}")')


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id; CLIP's own where none is named."""
    if not name:
        return clip_tokenizer()
    if lacks_tokenizer(name):
        fail(f"--tokenizer {name}: the folder has no tokenizer files")
    if not Path(name).is_dir():
        check_reachable(name, "tokenizer_config.json")
    with as_config_error("--tokenizer", name):
        return AutoTokenizer.from_pretrained(name)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str, vocab_size: int, end_token: int) -> None:
    if reason := ends_otherwise(tokenizer) or misfit(tokenizer, vocab_size, end_token):
        end = f"{len(tokenizer)} tokens, end token {tokenizer.eos_token_id}"
        fail(f"{source}: its text tower has {vocab_size} tokens, the tokenizer {end}: {reason}: give its own by --tokenizer")
