"""Captions of their rarer words: CLIPF's text masking by word frequency (arXiv 2412.16148)."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_maskclip.errors import fail
from training.data.text_masking import tokens_around
from training.data.words import discard_probabilities, words_of


@dataclass(frozen=True)
class FrequencyTextMask:
    """Keeps words of a caption with at most `num_tokens` tokens, in their order, the rarer the likelier.

    The priority of each word is u - d(w): u is uniform in [0, 1), d(w) its discard probability. By falling priority, a word
    stays with all its tokens where there is room for them. Where no word has room, the first one stays in part.

    Args:
        num_tokens: with those around the words, at least 3.
        discard: d(w) of the words that were counted; it is 0 for all others.
        num_first, num_last: the tokens before and after the words, as the tokenizer makes them.
    """

    num_tokens: int
    discard: Mapping[str, float]
    num_first: int = 1
    num_last: int = 1

    def encode(self, tokenizer: PreTrainedTokenizerBase, caption: str, rng: np.random.Generator) -> list[int]:
        """The tokens of a caption (start, words, end), masked."""
        encoding = tokenizer(caption, verbose=False, return_offsets_mapping=True)
        token_ids: list[int] = encoding["input_ids"]
        if len(token_ids) <= self.num_tokens:
            return token_ids
        end = len(token_ids) - self.num_last
        inner = token_ids[self.num_first : end]
        words = words_of(caption)
        starts = [start for start, _ in encoding["offset_mapping"][self.num_first : end]]
        priorities = rng.random(len(words)) - np.array([self.discard.get(word.text, 0.0) for word in words])
        order = np.argsort(-priorities, kind="stable").tolist()
        kept = tokens_of_whole_words(
            word_of_each_token(starts, [word.end for word in words]), order, self.num_tokens - self.num_first - self.num_last
        )
        return [*token_ids[: self.num_first], *(inner[i] for i in kept), *token_ids[end:]]


def word_of_each_token(starts: Sequence[int], word_ends: Sequence[int]) -> list[int]:
    """The number of the word to which each token belongs: the first word that ends after the token's start.

    So a token that holds the space before a word belongs to that word, as do the pieces of a word and the bytes of a character.
    A token that holds several words belongs to the first, and one behind all words to the last.
    """
    return [min(bisect_right(word_ends, start), max(0, len(word_ends) - 1)) for start in starts]


def tokens_of_whole_words(word_of_token: Sequence[int], order: Sequence[int], room: int) -> list[int]:
    """The numbers of the tokens that stay, rising.

    Args:
        word_of_token: for each token, its word.
        order: the words, by falling priority.
        room: the most tokens that stay, at least 1.
    """
    tokens: dict[int, list[int]] = {}
    for token, word in enumerate(word_of_token):
        tokens.setdefault(word, []).append(token)
    with_tokens = [tokens[word] for word in order if word in tokens] or list(tokens.values())
    kept: list[int] = []
    for of_word in with_tokens:
        if len(of_word) <= room - len(kept):
            kept += of_word
    return sorted(kept) or with_tokens[0][:room]


def frequency_mask_for(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, counts: Mapping[str, float], threshold: float
) -> FrequencyTextMask:
    """The mask for a tokenizer and the word counts of a run; `threshold` as in [`discard_probabilities`].

    Raises:
        ConfigError: the tokenizer does not say where in a caption its tokens are.
    """
    if not tokenizer.is_fast:
        name = f"{type(tokenizer).__name__} of {tokenizer.name_or_path!r}"
        fail(f"text_mask='frequency': {name} does not say where its tokens are in a caption; name a fast one by --tokenizer")
    return FrequencyTextMask(num_tokens, discard_probabilities(counts, threshold), *tokens_around(tokenizer))
