"""What a card says of the model itself, whichever family it is of: its parts, its class, its scores, and what loads it."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import fail
from ..models.towers import find_family, known_families

PIPELINE_CONTEXT = 64  # to which it pads the texts of a SigLIP


@dataclass(frozen=True)
class ModelWords:
    """What the card's template fills in.

    Attributes:
        plain: the class of Transformers that loads it.
        is_clip: of CLIP itself, which open_clip reads, and `MaskCLIPModel` trains on.
        pads_texts: of captions, which its text tower reads to the last of `context` positions.
        has_pipeline: the zero-shot pipeline is right; it pads texts to 64 tokens, whatever the model's context is.
        keeps_aspect_ratio: pictures come as rows of patches, which no other program here takes.
        sigmoid: how its logits become scores, in words with its own numbers; empty where scores are a softmax.
    """

    plain: str
    parameters: str
    vision: str
    text: str
    context: int
    is_clip: bool
    pads_texts: bool
    has_pipeline: bool
    keeps_aspect_ratio: bool
    sigmoid: str
    tag: str


def words_of_model(architecture: dict[str, Any], weights: dict[str, torch.Tensor]) -> ModelWords:
    """The words on a model, from its `config.json` and its weights.

    Raises:
        ConfigError: a model of no known family.
    """
    family = find_family(architecture.get("model_type"))
    if family is None:
        fail(f"export/config.json: is of a {architecture.get('model_type')!r}; cards are of {known_families()}")
    plain = architecture["architectures"][0]
    vision, text = architecture["vision_config"], architecture["text_config"]
    context = family.text_positions(text["max_position_embeddings"], text.get("pad_token_id"))
    is_clip = family.model_type == "clip"
    keeps_aspect_ratio = "image_size" not in vision
    pictures = "pictures in their own aspect ratio" if keeps_aspect_ratio else f"{vision['image_size']} pixels"
    return ModelWords(
        plain="CLIP" if is_clip else f"`{plain}`",
        parameters=f"{sum(weight.numel() for weight in weights.values()) / 1e6:,.1f} million",
        vision=f"{_size(vision)}, {pictures}, {vision['patch_size']}-pixel patches",
        text=f"{_size(text)}, {context} tokens of a vocabulary of {text['vocab_size']:,}",
        context=context,
        is_clip=is_clip,
        pads_texts=family.pads_texts,
        has_pipeline=not family.pads_texts or context == PIPELINE_CONTEXT,
        keeps_aspect_ratio=keeps_aspect_ratio,
        sigmoid=_sigmoid_in_words(weights) if family.loss == "sigmoid" else "",
        tag=family.model_type,
    )


def _size(tower: dict[str, Any]) -> str:
    return f"{tower['num_hidden_layers']} layers x {tower['hidden_size']}"


def _sigmoid_in_words(weights: dict[str, torch.Tensor]) -> str:
    scale, bias = math.exp(weights["logit_scale"].item()), weights["logit_bias"].item()
    return f"sigmoid({scale:.1f} x cosine {'-' if bias < 0 else '+'} {abs(bias):.1f})"
