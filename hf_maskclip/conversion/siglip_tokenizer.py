"""Tokenizers of SigLIP: texts are cleaned, filled up to the context length, and never masked."""

import string

from tokenizers import Regex, Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import fail
from .open_clip_siglip import PAD_TOKENS

_PUNCTUATION = Regex("[" + "".join(f"\\{mark}" for mark in string.punctuation) + "]")
_SPACES = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
# What open_clip does with a text before its tokenizer, without the mending of broken characters and HTML.
_CLEANINGS = {
    "canonicalize": [normalizers.Replace("_", " "), normalizers.Replace(_PUNCTUATION, ""), normalizers.Lowercase(), *_SPACES],
    "lower": [*_SPACES, normalizers.Lowercase()],
    "whitespace": _SPACES,
}
# Texts that canonicalizing makes one: a tokenizer that gives them the same ids canonicalizes by itself.
_SAME_WHEN_CANONICAL = (("A Red BALL", "a red ball"), ("it's a ball!", "its a ball"), ("red_ball", "red ball"))
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def canonicalizes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer lowers letters and takes punctuation off by itself."""
    return all(tokenizer(one)["input_ids"] == tokenizer(other)["input_ids"] for one, other in _SAME_WHEN_CANONICAL)


def siglip_tokenizer(tokenizer: PreTrainedTokenizerBase, clean: str, context_length: int) -> PreTrainedTokenizerBase:
    """A tokenizer that gives texts the ids that open_clip gives them, when it is asked for `padding="max_length"`.

    Args:
        tokenizer: as open_clip loads it.
        clean: how open_clip cleans texts before it: canonicalize, lower or whitespace.
        context_length: tokens of each text.

    Raises:
        ConfigError: it has no code for cleaning, and does not do it by itself.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return _python_tokenizer(tokenizer, clean, context_length)
    # Tokenizers of known kinds are built anew when they are loaded, without what is added here; the plain kind is not.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    then = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = normalizers.Sequence([*_CLEANINGS[clean], *then])
    tokens = {key: getattr(tokenizer, key) for key in _SPECIAL_TOKENS if getattr(tokenizer, key) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context_length,
        model_input_names=["input_ids"],  # the text tower attends to the tokens that fill a text
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **tokens,
    )


def _python_tokenizer(tokenizer: PreTrainedTokenizerBase, clean: str, context_length: int) -> PreTrainedTokenizerBase:
    """SigLIP's own tokenizer of Transformers is one: it canonicalizes by itself, but for an underscore."""
    pairs = _SAME_WHEN_CANONICAL[:2]
    if clean == "canonicalize" and any(tokenizer(one)["input_ids"] != tokenizer(other)["input_ids"] for one, other in pairs):
        kind = type(tokenizer).__name__
        fail(f"tokenizer {kind}: must lower letters and take punctuation off, as open_clip does, or have a tokenizer.json")
    tokenizer.model_max_length = context_length
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
    return tokenizer


def misfit(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """Why the text tower of a SigLIP cannot take a tokenizer; empty where it can."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        return f"its highest id is {highest}, the text tower has {vocab_size} tokens"
    if tokenizer.pad_token_id is None:
        return "has no pad_token, which fills each text"
    return ""


def differs_from_published(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """Why a tokenizer, which is not the model's own, is none of SigLIP's, or not that of the vocabulary of this size."""
    token_ids, start, end = tokenizer("a dog")["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id
    if not token_ids or token_ids[-1] != end:
        return f"does not end a text with its end token {end}, as SigLIP's do ('a dog' is {token_ids})"
    if token_ids[0] == start:
        return f"starts a text with its start token {start}, which SigLIP's do not ('a dog' is {token_ids})"
    if tokenizer.padding_side != "right":
        return f"fills texts on the {tokenizer.padding_side}, SigLIP's on the right"
    pad = PAD_TOKENS.get(vocab_size, tokenizer.pad_token_id)
    if tokenizer.pad_token_id != pad:
        return f"fills texts with token {tokenizer.pad_token_id}; SigLIP of {vocab_size} tokens fills them with {pad}"
    return ""
