"""Tiny random models of each family, made from its own configuration classes, with inputs, tokenizers and folders."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers import CAPTIONS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Siglip2Tokenizer

from hf_maskclip.models.towers import FAMILIES
from training.model.tokenizer import train_tokenizer

BY_TYPE = {family.model_type: family for family in FAMILIES}
# CLIPSeg's are there for its vision tower.
DUAL_ENCODERS = [name for name in BY_TYPE if name != "clipseg"]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONTEXT = 64  # which the pipeline pads captions of SigLIP to
SIDE, PATCH, MOST_PATCHES = 32, 8, 16
# Rows and columns of three images of NaFlex: one whole, and two that are padded.
GRIDS = [[4, 4], [2, 5], [5, 2]]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in XLM-R
PROCESSORS = {
    "clip": ("CLIPProcessor", "CLIPImageProcessor"),
    "metaclip_2": ("CLIPProcessor", "CLIPImageProcessor"),
    "altclip": ("AltCLIPProcessor", "CLIPImageProcessor"),
    "chinese_clip": ("ChineseCLIPProcessor", "ChineseCLIPImageProcessor"),
    "clipseg": ("CLIPSegProcessor", "ViTImageProcessor"),
    "siglip": ("SiglipProcessor", "SiglipImageProcessor"),
    "siglip2": ("Siglip2Processor", "Siglip2ImageProcessor"),
}


def make_tokenizer(name: str, captions: list[str] = CAPTIONS * 5) -> PreTrainedTokenizerBase:
    """A byte-level BPE with the family's start and end tokens; CLIP's own kind for CLIP and CLIPSeg."""
    if name in ("clip", "clipseg"):
        return train_tokenizer(captions, vocab_size=1000, context_length=CONTEXT)
    if name == "siglip2":
        return make_gemma_tokenizer(captions)
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    has_start = not BY_TYPE[name].pads_texts
    ends = [("<s>", 0), ("</s>", 2)]
    template = "<s> $A </s>" if has_start else "$A </s>"
    bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    tokens = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    inputs = ["input_ids"] if name == "siglip" else ["input_ids", "attention_mask"]
    inputs += ["token_type_ids"] if name == "chinese_clip" else []
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=CONTEXT, model_input_names=inputs, **tokens)


def make_gemma_tokenizer(captions: list[str]) -> Siglip2Tokenizer:
    """SigLIP 2's kind: captions in lower case, spaces as a letter, no start token."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # in training alone, so that words stay words
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    alphabet = ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    names = {"model_max_length": CONTEXT, "padding_side": "right"}
    return Siglip2Tokenizer(vocab=model["vocab"], merges=merges, **names)


def make_config(name: str, tokenizer: PreTrainedTokenizerBase, **vision: Any) -> transformers.PreTrainedConfig:
    family = BY_TYPE[name]
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = TOWER | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    vision = TOWER | {"patch_size": PATCH} | vision
    vision |= {"num_patches": MOST_PATCHES} if name == "siglip2" else {"image_size": SIDE}
    whole = {}
    if family.loss == "sigmoid":
        text |= {"projection_size": 32}
    else:
        whole = {"projection_dim": 24}
        vision, text = vision | whole, text | whole
    if name == "altclip":
        text |= {"project_dim": 24, "max_position_embeddings": CONTEXT + 2}
    return getattr(transformers, f"{family.prefix}Config")(vision_config=vision, text_config=text, **whole)


def make_plain(name: str, seed: int = 0, kind: str = "Model", **vision: Any) -> PreTrainedModel:
    """A plain model of Transformers, in evaluation mode; `kind` is how its class's name ends."""
    config = make_config(name, make_tokenizer(name), **vision)
    config = config.vision_config if kind.startswith("VisionModel") else config
    torch.manual_seed(seed)
    model = getattr(transformers, f"{BY_TYPE[name].prefix}{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zero weights and biases would hide what is left out
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def make_images(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Three images as the family's vision tower takes them."""
    generator = torch.Generator().manual_seed(seed)
    if name != "siglip2":
        return {"pixel_values": torch.randn(3, 3, SIDE, SIDE, generator=generator)}
    shapes = torch.tensor(GRIDS)
    is_there = torch.arange(MOST_PATCHES) < shapes.prod(dim=1)[:, None]  # (3, L)
    pixels = torch.randn(3, MOST_PATCHES, 3 * PATCH**2, generator=generator) * is_there[..., None]
    return {"pixel_values": pixels, "pixel_attention_mask": is_there.int(), "spatial_shapes": shapes}


def make_inputs(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Three pairs as the family's dual encoder takes them."""
    tokenizer, family = make_tokenizer(name), BY_TYPE[name]
    padding = "max_length" if family.pads_texts else True
    tokens = tokenizer(CAPTIONS[:3], padding=padding, max_length=CONTEXT, truncation=True, return_tensors="pt")
    return make_images(name, seed) | {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}


def save_folder(name: str, folder: Path, captions: list[str] = CAPTIONS * 5, seed: int = 0, side: int = SIDE) -> Path:
    """A folder as `from_pretrained` takes it: weights, image processor and tokenizer."""
    tokenizer = make_tokenizer(name, captions)
    vision = {} if name == "siglip2" else {"image_size": side}
    torch.manual_seed(seed)
    config = make_config(name, tokenizer)
    for key, value in vision.items():
        setattr(config.vision_config, key, value)
    getattr(transformers, f"{BY_TYPE[name].prefix}Model")(config).save_pretrained(folder)
    processor_class, image_class = PROCESSORS[name]
    if name == "siglip2":
        options: dict[str, Any] = {"patch_size": PATCH, "max_num_patches": MOST_PATCHES}
    elif image_class in ("SiglipImageProcessor", "ViTImageProcessor"):
        options = {"size": {"height": side, "width": side}}
    else:
        options = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    image_processor = getattr(transformers, image_class)(**options)
    getattr(transformers, processor_class)(image_processor, tokenizer).save_pretrained(folder)
    return folder
