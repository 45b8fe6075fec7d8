"""Shorter captions in training: text masking as FLIP and CLIPA use it (arXiv 2212.00794, arXiv 2305.07017)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

TextMaskName = Literal["none", "random", "truncate", "block"]


@dataclass(frozen=True)
class TextMask:
    """Keeps at most `num_tokens` tokens of each caption, in their order, among them the start token and the end token.

    Args:
        name: which of the words' tokens stay. `"truncate"`: the first; `"random"`: a random choice; `"block"`: a run that
            starts at random; `"none"`: as `"truncate"`, which is what CLIP does with captions beyond its context.
        num_tokens: at least 3, so that one token of a word stays.
    """

    name: TextMaskName
    num_tokens: int

    def __call__(self, token_ids: list[int], rng: np.random.Generator) -> list[int]:
        """The tokens of one caption (start, words, end), masked."""
        if len(token_ids) <= self.num_tokens:
            return token_ids
        start, *words, end = token_ids
        num_words = self.num_tokens - 2
        if self.name == "random":
            kept = [words[i] for i in sorted(rng.choice(len(words), num_words, replace=False))]
        else:
            first = rng.integers(len(words) - num_words + 1) if self.name == "block" else 0
            kept = words[first : first + num_words]
        return [start, *kept, end]
