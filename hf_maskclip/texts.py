"""How captions become the arguments of a text tower, which families of dual encoders do in different ways.

Shapes: B texts, S tokens of each.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .models.towers import Family, find_family


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a whole model. Raises ValueError where it is in none."""
    family = find_family(config.model_type)
    if family is None:
        raise ValueError(f"a model of type {config.model_type!r}: is of no family with known texts")
    return family


def context_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens of a text: what the text tower has positions for, or less where the tokenizer says so."""
    text: Any = config.text_config
    positions = text.max_position_embeddings
    if family_of(config).skips_positions:
        positions -= text.pad_token_id + 1
    return min(positions, tokenizer.model_max_length)


def text_arguments(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What the text tower takes of a tokenizer's outputs.

    A causal tower that pools at the end token never reads padding, so it needs no attention mask. SigLIP's was trained without
    one; its tokenizer says whether it is given.
    """
    family = family_of(config)
    if family.pads_texts:
        return tuple(name for name in ("input_ids", "attention_mask") if name in tokenizer.model_input_names)
    return ("input_ids", "attention_mask") if family.needs_attention_mask else ("input_ids",)


def encode_texts(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """The arguments of `get_text_features`, each (B, S), as the family's processor and the pipeline make them."""
    padding = "max_length" if family_of(config).pads_texts else "longest"
    length = context_length(config, tokenizer)
    tokens = tokenizer(
        list(texts), padding=padding, truncation=True, max_length=length, return_attention_mask=True, return_tensors="pt"
    )
    return {name: tokens[name] for name in text_arguments(config, tokenizer)}
