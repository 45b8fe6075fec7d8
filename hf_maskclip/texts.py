"""How captions become the arguments of a text tower, which families of dual encoders do in different ways.

Shapes: B texts, S tokens of each.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .errors import fail
from .models.towers import Family, find_family

logger = logging.getLogger(__name__)


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a whole model. Raises ValueError where it is in none."""
    family = find_family(type(config).model_type)  # of the class that is used; an instance says what it was read from
    if family is None:
        raise ValueError(f"a model of type {config.model_type!r}: is of no family with known texts")
    return family


def context_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens of a text: what the text tower has positions for, or less where the tokenizer says so."""
    text: Any = config.text_config
    positions = family_of(config).text_positions(text.max_position_embeddings, text.pad_token_id)
    return min(positions, tokenizer.model_max_length)


def check_ends_of_texts(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Look whether a text tower that pools at the end token finds it where the tokenizer puts it.

    Raises:
        ConfigError: it would pool another token, silently: the tokenizer, or the class of the model, is of another family.
    """
    family = family_of(config)
    if not family.pools_at_end:
        return  # the last position, or the first
    end: Any = config.text_config.eos_token_id
    ids = tokenizer("a")["input_ids"]
    # CLIP's configurations of before Transformers 4.31 have 2 for the end token, whose id is the largest.
    pooled = max(ids) if end == 2 and family.model_type != "metaclip_2" else end
    if pooled not in ids or ids.index(pooled) != len(ids) - 1:
        fail(
            f"a {family.title} with eos_token_id={end} would take its features from another token than {ids[-1]}, with which "
            "its tokenizer ends a text: the model was read as another family than its own (AutoModel finds that), or the "
            "tokenizer is of another model"
        )


def warn_of_kept_capitals(tokenizer: PreTrainedTokenizerBase) -> None:
    """Say where a tokenizer does not make letters small, although its files ask for it.

    Transformers reads SigLIP 2 of one resolution with a GemmaTokenizer, which passes over `do_lower_case`.
    """
    if tokenizer.init_kwargs.get("do_lower_case") and not _makes_small(tokenizer):
        logger.warning(
            "%s: keeps capital letters, although its do_lower_case is set: the model has learnt from small ones, so write "
            "labels and captions in these",
            type(tokenizer).__name__,
        )


def _makes_small(tokenizer: PreTrainedTokenizerBase) -> bool:
    small, large = (tokenizer(text)["input_ids"] for text in ("a", "A"))
    return small == large


def text_settings(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How [`encode_texts`] makes tokens of captions, for the record."""
    pads = family_of(config).pads_texts
    return {
        "padding": "max_length" if pads else "longest",
        "max_length": context_length(config, tokenizer),
        "lower_case": _makes_small(tokenizer),
    }


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
    """The arguments of `get_text_features`, each (B, S), as the family's processor and the pipeline make them.

    Raises:
        ConfigError: a token that the text tower does not have, for the tokenizer is of another model.
    """
    padding = "max_length" if family_of(config).pads_texts else "longest"
    length = context_length(config, tokenizer)
    tokens = tokenizer(
        list(texts), padding=padding, truncation=True, max_length=length, return_attention_mask=True, return_tensors="pt"
    )
    text: Any = config.text_config
    if (largest := int(tokens["input_ids"].max())) >= text.vocab_size:
        name = f"a {text.model_type} with {text.vocab_size} tokens"
        fail(f"{name}: its tokenizer gives token {largest}, so that it is of another model")
    return {name: tokens[name] for name in text_arguments(config, tokenizer)}
