"""Proves that the text mask `frequency` is CLIPF's: beside a literal transcription, by the chances of words in small cases,
with each kind of tokenizer, whatever data worker reads a sample."""

import math
import pickle
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from families import DUAL_ENCODERS, make_tokenizer
from transformers import ByT5Tokenizer

from hf_maskclip.data.decoding import PairDecoder
from hf_maskclip.data.sources import open_files
from hf_maskclip.errors import ConfigError
from training.data.batches import PairBatches
from training.data.forms import PairForm, train_transform
from training.data.frequency_masking import FrequencyTextMask, frequency_mask_for
from training.data.loader import build_loader
from training.data.pairs import PairSource
from training.data.shuffling import shard_stream
from training.data.words import discard_probabilities, words_of

VOCABULARY = ["a", "the", "red", "ball", "on", "grass", "zebra", "quilted", "xylophone", "7", "fish", "hydrangea"]
COUNTS = {word: 4000 // 2**number for number, word in enumerate(VOCABULARY)}


def random_caption(rng: np.random.Generator, length: int) -> str:
    return " ".join(rng.choice(VOCABULARY, length))


# ---- The definition --------------------------------------------------------------------------------------------------------


def literally(
    caption: str, of_words: list[list[int]], counts: dict[str, int], t: float, room: int, rng: np.random.Generator
) -> list[int]:
    """CLIPF's rule for a caption of plain words: `of_words` are the tokens of each, of which `room` may stay."""
    drawn = rng.random(len(of_words))
    candidates = []
    for place, word in enumerate(caption.split()):
        f = counts.get(word, 0) / sum(counts.values())
        d = max(0, 1 - math.sqrt(t / f)) if f else 0
        candidates.append((drawn[place] - d, place, of_words[place]))
    kept, left = {}, room
    for _, place, tokens in sorted(candidates, reverse=True):
        if len(tokens) <= left:
            kept[place] = tokens
            left -= len(tokens)
    if not kept:
        _, place, tokens = max(candidates)
        kept[place] = tokens[:room]
    return [token for place in sorted(kept) for token in kept[place]]


@pytest.mark.parametrize("text_tokens", [3, 5, 8, 16])
def test_the_mask_is_the_definition_word_by_word(text_tokens, tokenizer):
    """With CLIP's tokenizer, which reads each word as if it stood alone."""
    of_word = {word: tokenizer(word)["input_ids"][1:-1] for word in VOCABULARY}
    assert {len(tokens) for tokens in of_word.values()} > {1, 3}
    captions, num_masked = np.random.default_rng(0), 0
    for seed in range(300):
        caption = random_caption(captions, captions.integers(1, 20))
        counts = dict(list(COUNTS.items())[: captions.integers(2, 12)])  # some words are not counted
        t = 10.0 ** captions.integers(-6, -1)
        whole = tokenizer(caption)["input_ids"]
        masked = FrequencyTextMask(text_tokens, discard_probabilities(counts, t)).encode(
            tokenizer, caption, np.random.default_rng(seed)
        )
        if len(whole) <= text_tokens:
            assert masked == whole
            continue
        of_words = [of_word[word] for word in caption.split()]
        inner = literally(caption, of_words, counts, t, text_tokens - 2, np.random.default_rng(seed))
        assert masked == [tokenizer.bos_token_id, *inner, tokenizer.eos_token_id], caption
        num_masked += 1
    assert num_masked > 100


def chance_of_the_highest(discard: list[float], number: int) -> float:
    """That one word's u - d is above that of all others: the integral over its u."""
    u = (np.arange(200_000) + 0.5) / 200_000
    below = [np.clip(u - discard[number] + d, 0, 1) for other, d in enumerate(discard) if other != number]
    return float(np.prod(below, axis=0).mean())


@pytest.mark.parametrize("counts", [{"a": 90, "red": 10}, {"a": 900, "on": 90, "red": 10}, {"a": 1, "on": 1, "red": 1}])
def test_words_stay_as_often_as_their_frequency_says(counts, tokenizer):
    discard, present = discard_probabilities(counts, 0.01), list(counts)
    expected = [chance_of_the_highest([discard[word] for word in present], number) for number in range(len(present))]
    assert sum(expected) == pytest.approx(1, abs=1e-4)
    if len(counts) == 2:
        a, red = (1 - math.sqrt(0.01 / share) for share in (0.9, 0.1))
        assert expected[0] == pytest.approx((1 - (a - red)) ** 2 / 2, abs=1e-4)
    rng, draws = np.random.default_rng(0), 4000
    mask = FrequencyTextMask(3, discard)
    kept = Counter(tuple(mask.encode(tokenizer, " ".join(present), rng)[1:-1]) for _ in range(draws))
    assert sum(kept.values()) == draws
    for word, chance in zip(present, expected, strict=True):
        tokens = tuple(tokenizer(word)["input_ids"][1:-1])
        assert len(tokens) == 1
        assert abs(kept[tokens] / draws - chance) < 5 * math.sqrt(chance * (1 - chance) / draws), word


def test_discard_probabilities_are_those_of_the_formula_and_small_corpora_have_a_higher_threshold():
    large = {"a": 9_000_000, "dog": 999_999, "zebra": 1}  # the rarest is rarer than 1e-6
    assert discard_probabilities(large) == {
        "a": 1 - math.sqrt(1e-6 / 0.9),
        "dog": pytest.approx(1 - math.sqrt(1e-5), 1e-6),
        "zebra": 0,
    }
    small = {"a": 90, "dog": 9, "zebra": 1}
    assert discard_probabilities(small) == pytest.approx({"a": 1 - math.sqrt(1 / 90), "dog": 1 - math.sqrt(1 / 9), "zebra": 0})
    assert discard_probabilities(small, 0.09) == pytest.approx({"a": 1 - math.sqrt(0.1), "dog": 0, "zebra": 0})
    shares = {word: count / 100 for word, count in reversed(small.items())}
    assert discard_probabilities(shares) == pytest.approx(discard_probabilities(small))


# ---- Words and tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("A red  ball's on-the grass, No. 7!", "a red ball ' s on - the grass , no . 7 !"),
        ("Über NAÏVE cafe\u0301 Straße", "über naïve café straße"),
        ("狗在red草地 ひらがな", "狗 在 red 草 地 ひらがな"),
        ("हिन्दी में ภาษาไทย", "हिन्दी में ภาษาไทย"),
        ("dog❤️👩\u200d👧x_2", "dog ❤️ 👩 \u200d 👧 x _ 2"),
        (" \n\u00a0", ""),
    ],
)
def test_words_are_runs_of_letters_and_digits_and_each_other_character(caption, found):
    assert [word.text for word in words_of(caption)] == found.split()
    ends = [word.end for word in words_of(caption)]
    assert ends == sorted(set(ends))
    assert not ends or not caption[ends[-1] :].strip()


def tokens_by_letters(caption: str, spans: list[tuple[int, int]], token_ids: list[int]) -> list[list[int]]:
    """The tokens of each word of a caption of plain words: those with its letters, and spaces right before them."""
    word_at, number = {}, -1
    for place, letter in enumerate(f" {caption}"):
        number += letter == " "
        word_at[place - 1] = None if letter == " " else number
    of_words, spaces = [[] for _ in caption.split()], []
    for token, span in zip(token_ids, spans, strict=True):
        touched = {word_at[place] for place in range(*span)} - {None}
        spaces.append(token)
        if touched:
            of_words[min(touched)] += spaces
            spaces = []
    assert not spaces
    return of_words


@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_all_tokens_of_a_word_stay_or_go_with_each_kind_of_tokenizer(name):
    tokenizer = make_tokenizer(name)
    mask = frequency_mask_for(tokenizer, 9, COUNTS, 1e-3)
    captions, of_several = np.random.default_rng(0), 0
    for seed in range(100):
        caption = random_caption(captions, 12)
        encoding = tokenizer(caption, return_offsets_mapping=True)
        whole, end = encoding["input_ids"], len(encoding["input_ids"]) - mask.num_last
        words_in = slice(mask.num_first, end)
        of_words = tokens_by_letters(caption, encoding["offset_mapping"][words_in], whole[words_in])
        assert sum(of_words, []) == whole[words_in]
        of_several += sum(len(tokens) > 1 for tokens in of_words)
        room = 9 - mask.num_first - mask.num_last
        inner = literally(caption, of_words, COUNTS, 1e-3, room, np.random.default_rng(seed))
        masked = mask.encode(tokenizer, caption, np.random.default_rng(seed))
        assert masked == [*whole[: mask.num_first], *inner, *whole[end:]]
        assert len(masked) <= 9 < len(whole)
    assert of_several > 100


@pytest.mark.parametrize(
    "caption", ["狗在红色的草地上奔跑着", "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈", "x" * 60, "\u2028 " * 30]
)
@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_captions_of_any_script_have_room_and_keep_their_ends(name, caption):
    tokenizer = make_tokenizer(name)
    for num_tokens in (3, 6):
        mask = frequency_mask_for(tokenizer, num_tokens, COUNTS, 0.0)
        whole, masked = tokenizer(caption)["input_ids"], mask.encode(tokenizer, caption, np.random.default_rng(0))
        if len(whole) > num_tokens:
            assert mask.num_first + mask.num_last < len(masked) <= num_tokens
            assert masked[: mask.num_first] == whole[: mask.num_first]
            assert masked[len(masked) - mask.num_last :] == whole[len(whole) - mask.num_last :]
        else:
            assert masked == whole


def test_a_tokenizer_that_does_not_say_where_tokens_are_is_refused():
    with pytest.raises(ConfigError, match="text_mask='frequency': ByT5Tokenizer of '' does not say where its tokens") as error:
        frequency_mask_for(ByT5Tokenizer(), 8, COUNTS, 0.0)
    assert "\n" not in str(error.value)


# ---- In a loader -----------------------------------------------------------------------------------------------------------


def every_epoch(stream, epoch):
    return stream


def tokens_by_key(folder: Path, tokenizer, num_workers: int, seed: int = 0) -> dict[str, list[int]]:
    """Of one pass over the pairs."""
    mask = frequency_mask_for(tokenizer, 6, {"number": 40, "a": 40, "red": 10}, 0.0)
    split = {"process": 0, "num_processes": 1, "num_workers": num_workers, "seed": seed}
    stream = shard_stream(open_files(f"{folder}/*.tar"), **split)
    form = PairForm(PairDecoder(), train_transform(32, 0.9, 0.5), mask)
    batches = PairBatches([PairSource(partial(every_epoch, stream), lambda step: form)], tokenizer, batch_size=1, seed=seed)
    found: dict[str, list[int]] = {}
    for batch in build_loader(batches, num_workers):
        if batch.starts[0].epoch > 0 or len(found) == 39:
            return found
        found.setdefault(batch.keys[0], batch.input_ids[0].tolist())
    return found


@pytest.mark.slow
def test_seed_and_sample_alone_say_which_words_stay(shards, tokenizer):
    alone, by_two, other = (tokens_by_key(shards, tokenizer, *how) for how in ((0,), (2,), (0, 1)))
    assert len(alone) == 39
    assert len(by_two) > 10
    assert by_two.items() <= alone.items()
    assert alone != other
    mask = frequency_mask_for(tokenizer, 6, COUNTS, 0.0)
    assert pickle.loads(pickle.dumps(mask)) == mask
