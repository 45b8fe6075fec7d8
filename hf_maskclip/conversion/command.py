"""`hf-maskclip convert`: a checkpoint of open_clip as a folder of Transformers, or back."""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, CLIPProcessor, PreTrainedTokenizerBase, SiglipModel, SiglipProcessor

from ..errors import ConfigError, as_config_error, fail
from ..model_folder import check_reachable, find_model
from ..models.modeling_maskclip import MaskCLIPModel
from . import siglip_tokenizer
from .clip import save_processor
from .open_clip import Conversion, convert_open_clip_model, export_siglip_to_open_clip, export_to_open_clip
from .open_clip_families import SIGLIP
from .open_clip_folder import OpenClipModel, find_open_clip_model
from .open_clip_siglip import cleaning_of_model_cfg
from .open_clip_tokenizer import clip_tokenizer
from .tokens import ends_otherwise, lacks_tokenizer, misfit

PIPELINE_LENGTH = 64  # of each text, in the pipeline of Transformers for SigLIP


def to_open_clip(options: argparse.Namespace) -> None:
    """Write a model of Transformers for open_clip."""
    if options.open_clip_model or options.weights or options.tokenizer:
        fail("--open_clip_model, --weights and --tokenizer are of a checkpoint of open_clip, and not for --to open_clip")
    source = find_model(options.source)
    with as_config_error("source", source):
        kind = AutoConfig.from_pretrained(source).model_type
    if kind == "siglip2":
        fail(f"{source}: is a SigLIP 2 NaFlex (model_type 'siglip2'): open_clip has SigLIP 2 of a fixed resolution alone")
    (_siglip_to_open_clip if kind == "siglip" else _clip_to_open_clip)(source, options.output)
    print(f'written to {options.output}: open_clip.create_model_and_transforms("local-dir:{options.output}")')


def _clip_to_open_clip(source: str, output: Path) -> None:
    with as_config_error("source", source):
        model, info = MaskCLIPModel.from_pretrained(source, patch_mask="none", dtype=torch.float32, output_loading_info=True)
        processor = CLIPProcessor.from_pretrained(source)
    _check_loaded(source, info, "CLIP")
    text = model.config.text_config
    _check_tokenizer(processor.tokenizer, source, text.vocab_size, text.eos_token_id)
    with as_config_error("output", output):
        export_to_open_clip(model, output, processor)


def _siglip_to_open_clip(source: str, output: Path) -> None:
    with as_config_error("source", source):
        model, info = SiglipModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        processor = SiglipProcessor.from_pretrained(source)
    _check_loaded(source, info, "SigLIP")
    if reason := siglip_tokenizer.misfit(processor.tokenizer, model.config.text_config.vocab_size):
        fail(f"{source}: its tokenizer does not fit: {reason}")
    with as_config_error("output", output):
        if remark := export_siglip_to_open_clip(model, output, processor):
            print(remark)


def _check_loaded(source: str, info: dict, family: str) -> None:
    """Raise a ConfigError for weights that a model has not, or that its folder has not."""
    if missing := sorted(info["missing_keys"]):
        fail(f"{source}: lacks {len(missing)} weights of a {family}, such as {missing[0]!r}")
    if unknown := sorted(name for name in info["unexpected_keys"] if not name.endswith("position_ids")):
        fail(f"{source}: has {len(unknown)} weights that a {family} has not, such as {unknown[0]!r}")


def from_open_clip(options: argparse.Namespace) -> None:
    """Write a checkpoint of open_clip as a model of Transformers."""
    with as_config_error("source", options.source):
        source = find_open_clip_model(options.source, options.open_clip_model or "")
    tokenizer = _load_tokenizer(options.tokenizer) if options.tokenizer else _own_tokenizer(source)
    token_ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with as_config_error("source", options.source):
        converted = convert_open_clip_model(source, token_ids, options.weights)
    if converted.family is SIGLIP:
        is_own = not options.tokenizer and source.tokenizer() == str(source.weights.parent)
        tokenizer = _siglip_tokenizer(tokenizer, source, converted, is_own)
    else:
        text = converted.model.config.text_config
        _check_tokenizer(tokenizer, options.source, text.vocab_size, converted.end_token)
        tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
    processor_class = SiglipProcessor if converted.family is SIGLIP else CLIPProcessor
    with as_config_error("output", options.output):
        converted.model.save_pretrained(options.output)
        save_processor(processor_class(image_processor=converted.image_processor, tokenizer=tokenizer), options.output)
    for remark in converted.remarks:
        print(remark)
    if converted.averages and not options.weights:
        print(f"taken: the weights that were trained; their average is there too: --weights {converted.averages[0]}")
    if converted.extra:
        print(f"left out, for a {converted.family.name} has no such weights: {', '.join(converted.extra)}")
    print(f'written to {options.output}: AutoModel.from_pretrained("{options.output}")')


def _own_tokenizer(source: OpenClipModel) -> PreTrainedTokenizerBase:
    """The tokenizer that the model was trained with. Raises ConfigError where it is not to be had."""
    name = source.tokenizer()
    if source.family is not SIGLIP:
        return _load_tokenizer(name) if name else clip_tokenizer()
    if not name:
        fail(f"{source.weights}: no tokenizer lies beside it, and text_cfg.hf_tokenizer_name is empty: name its --tokenizer")
    try:
        return _load_tokenizer(name)
    except ConfigError as error:
        fail(f"--tokenizer: the model's own is not to be had ({error}): name the folder of {name} by --tokenizer")


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id."""
    if lacks_tokenizer(name):
        fail(f"--tokenizer {name}: the folder has no tokenizer files")
    if not Path(name).is_dir():
        check_reachable(name, "tokenizer_config.json")
    with as_config_error("--tokenizer", name):
        try:
            return AutoTokenizer.from_pretrained(name)
        except ImportError as error:  # sentencepiece, of those that have no tokenizer.json
            fail(f"--tokenizer {name}: needs a package that is not installed ({' '.join(str(error).split())})")


def _siglip_tokenizer(
    tokenizer: PreTrainedTokenizerBase, source: OpenClipModel, converted: Conversion, is_own: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer as the converted SigLIP needs it. Raises ConfigError where it does not fit."""
    text = converted.model.config.text_config
    reason = siglip_tokenizer.misfit(tokenizer, text.vocab_size)
    if reason or (not is_own and (reason := siglip_tokenizer.differs_from_published(tokenizer, text.vocab_size))):
        fail(f"{source.weights}: the tokenizer does not fit: {reason}: give its own by --tokenizer")
    if text.max_position_embeddings != PIPELINE_LENGTH:
        found = f"texts have {text.max_position_embeddings} tokens, Transformers' pipeline fills them to {PIPELINE_LENGTH}"
        converted.remarks.append(f"{found}: use the model and its processor, with padding='max_length'")
    clean = cleaning_of_model_cfg(source.model_cfg)
    fitted = siglip_tokenizer.siglip_tokenizer(tokenizer, clean, text.max_position_embeddings)
    if clean == "canonicalize" and not siglip_tokenizer.canonicalizes(fitted):
        converted.remarks.append("an underscore in a text is left out by this tokenizer; open_clip makes it a space")
    return fitted


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str, vocab_size: int, end_token: int) -> None:
    if reason := ends_otherwise(tokenizer) or misfit(tokenizer, vocab_size, end_token):
        end = f"{len(tokenizer)} tokens, end token {tokenizer.eos_token_id}"
        fail(f"{source}: its text tower has {vocab_size} tokens, the tokenizer {end}: {reason}: give its own by --tokenizer")
