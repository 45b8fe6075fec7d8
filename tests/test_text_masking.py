"""Proves that a text mask keeps the number of tokens asked for, in order, with the start and the end token."""

import numpy as np
import pytest

from training.data.text_masking import TextMask

CAPTION = [100, *range(20), 101]


def masked(name: str, num_tokens: int = 8, draws: int = 300) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [TextMask(name, num_tokens)(CAPTION, rng) for _ in range(draws)]


@pytest.mark.parametrize("name", ["none", "random", "truncate", "block"])
def test_start_and_end_stay_and_order_is_kept(name):
    for num_tokens in (3, 8, 21):
        for tokens in masked(name, num_tokens):
            assert len(tokens) == num_tokens
            assert tokens[0] == 100
            assert tokens[-1] == 101
            assert tokens[1:-1] == sorted(set(tokens[1:-1]))


@pytest.mark.parametrize("name", ["none", "random", "truncate", "block"])
def test_short_captions_stay_whole(name):
    assert masked(name, 22) == [CAPTION] * 300
    assert masked(name, 77, draws=1) == [CAPTION]


def test_truncate_keeps_the_first_block_a_run_and_random_any():
    assert masked("truncate") == [[100, *range(6), 101]] * 300
    blocks = {tuple(tokens[1:-1]) for tokens in masked("block")}
    assert blocks == {tuple(range(first, first + 6)) for first in range(15)}
    kept = [token for tokens in masked("random") for token in tokens[1:-1]]
    counts = np.bincount(kept, minlength=20)
    # 300 draws of 6 in 20: 90 each, with a variance of 63 each.
    assert ((counts - 90) ** 2 / 63).sum() * 19 / 20 < 43.8  # chi-square, 19 degrees of freedom, 0.1 %
    assert len({tuple(tokens) for tokens in masked("random")}) > 250
