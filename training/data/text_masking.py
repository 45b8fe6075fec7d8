"""Shorter captions in training: text masking as FLIP and CLIPA use it (arXiv 2212.00794, arXiv 2305.07017)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hf_maskclip.errors import fail

if TYPE_CHECKING:  # the options of the program name masks, and their help does not wait for Transformers
    from transformers import PreTrainedTokenizerBase

TokenMaskName = Literal["none", "random", "truncate", "block"]
TextMaskName = Literal["none", "random", "truncate", "block", "frequency"]


@dataclass(frozen=True)
class TextMask:
    """Keeps at most `num_tokens` tokens of each caption, in their order, among them the start token and the end token.

    Args:
        name: which of the words' tokens stay. `"truncate"`: the first; `"random"`: a random choice; `"block"`: a run that
            starts at random; `"none"`: as `"truncate"`, which is what CLIP does with captions beyond its context.
        num_tokens: at least 3, so that one token of a word stays.
        num_first, num_last: the tokens before and after the words, as the tokenizer makes them.
    """

    name: TokenMaskName
    num_tokens: int
    num_first: int = 1
    num_last: int = 1

    def encode(self, tokenizer: "PreTrainedTokenizerBase", caption: str, rng: np.random.Generator) -> list[int]:
        """The tokens of a caption, masked."""
        return self(tokenizer(caption, verbose=False)["input_ids"], rng)

    def __call__(self, token_ids: list[int], rng: np.random.Generator) -> list[int]:
        """The tokens of one caption (start, words, end), masked."""
        if len(token_ids) <= self.num_tokens:
            return token_ids
        end = len(token_ids) - self.num_last
        words = token_ids[self.num_first : end]
        num_words = self.num_tokens - self.num_first - self.num_last
        if self.name == "random":
            kept = [words[i] for i in sorted(rng.choice(len(words), num_words, replace=False))]
        else:
            first = rng.integers(len(words) - num_words + 1) if self.name == "block" else 0
            kept = words[first : first + num_words]
        return [*token_ids[: self.num_first], *kept, *token_ids[end:]]


def text_mask_for(tokenizer: "PreTrainedTokenizerBase", name: TokenMaskName, num_tokens: int) -> TextMask:
    """A text mask that keeps the tokens which a tokenizer puts around words."""
    return TextMask(name, num_tokens, *tokens_around(tokenizer))


def tokens_around(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, int]:
    """How many tokens a tokenizer puts before the words of a text, and how many after them."""
    token_ids, special = tokenizer("a dog")["input_ids"], set(tokenizer.all_special_ids)
    is_word = [token not in special for token in token_ids]
    return is_word.index(True), is_word[::-1].index(True)


def check_text_mask(name: TextMaskName, tokens_of_phases: Sequence[int], word_frequencies: str, word_threshold: float) -> None:
    """Raise a ConfigError where the options of a text mask do not go together."""
    if (name == "none") != (max(tokens_of_phases) == 0):
        fail(f"text_mask={name!r} and text_tokens={max(tokens_of_phases)}: a text mask and its tokens go together")
    for num_tokens in tokens_of_phases:
        if num_tokens in (1, 2):
            fail(f"text_tokens={num_tokens}: must be at least 3 (start, one token of a word, end), or 0")
    for option, value in (("word_frequencies", word_frequencies), ("word_threshold", word_threshold)):
        if value and name != "frequency":
            fail(f"{option}={value!r} and text_mask={name!r}: only text_mask frequency goes by words")
