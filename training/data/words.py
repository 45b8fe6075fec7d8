"""The words of captions, and how often each comes, by which the text mask `frequency` keeps rare words."""

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, pre_tokenizers

from hf_maskclip.errors import as_config_error, fail

FILE = "word_frequencies.json"
CC12M_THRESHOLD = 1e-6
# Chinese has no spaces, so each of its characters is a word. A mark, such as an accent, belongs to the letter before it.
WORDS = r"\p{Han}\p{M}*|[\p{L}\p{M}\p{N}&&[^\p{Han}]]+|\S\p{M}*"
_SPLIT = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)


class Word(NamedTuple):
    """A word of a caption: in lower case, and the place in the caption before which it ends."""

    text: str
    end: int


def words_of(caption: str) -> list[Word]:
    """The words of a caption in their order: runs of letters and digits, and each other visible character by itself.

    No tokenizer has a say in this, so that counts are of the same words with each.
    """
    return [Word(unicodedata.normalize("NFC", word.lower()), end) for word, (_, end) in _SPLIT.pre_tokenize_str(caption)]


def count_words(captions: Iterable[str]) -> dict[str, float]:
    """How often each word comes."""
    return dict(Counter(word.text for caption in captions for word in words_of(caption)))


def read_given_counts(path: str) -> dict[str, float]:
    """The counts in a JSON `{word: count}` that somebody has made; shares of any sum do as well.

    Upper case counts as lower case. Of a key of several words, such as `t-shirt`, each gets the count.

    Raises:
        ConfigError: the file cannot be read or has other content.
    """
    with as_config_error("word_frequencies", path):
        content = json.loads(Path(path).read_text(encoding="utf-8").removeprefix("\ufeff"), object_pairs_hook=_without_repeats)
    counts: dict[str, float] = {}
    for text, count in content.items() if isinstance(content, dict) else ():
        if isinstance(count, bool) or not isinstance(count, (int, float)) or not 0 < count < math.inf:
            fail(f"word_frequencies={path!r}: the count of {text!r} is {str(count)[:40]}: must be a number above 0")
        for word in words_of(text):
            counts[word.text] = counts.get(word.text, 0) + count
    if not counts:
        fail(f'word_frequencies={path!r}: has no words: must be JSON such as {{"a": 120, "dog": 3}}')
    return counts


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, number in Counter(key for key, _ in pairs).items() if number > 1]
    if repeated:
        raise ValueError(f"{repeated[0]!r} comes more than once")
    return dict(pairs)


def save_counts(folder: Path, counts: Mapping[str, float]) -> None:
    """Write the counts into a run's folder or a checkpoint, the most frequent word first."""
    ordered = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    (folder / FILE).write_text(json.dumps(ordered, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


def counts_of_checkpoint(checkpoint: Path, given: str) -> dict[str, float]:
    """The counts that a run began with, exactly.

    Args:
        given: the file of the option `word_frequencies`, or empty; where it is still there it must have the same counts.

    Raises:
        ConfigError: it has others, or the checkpoint has none.
    """
    if not (checkpoint / FILE).is_file():
        fail(f"resume: {checkpoint} has no {FILE}, which text_mask='frequency' goes by")
    counts = json.loads((checkpoint / FILE).read_text(encoding="utf-8"))
    if given and Path(given).is_file() and read_given_counts(given) != counts:
        fail(f"resume: word_frequencies={given!r} differs from {checkpoint / FILE}: give the same, or another output_dir")
    return counts


def discard_probabilities(counts: Mapping[str, float], threshold: float = 0.0) -> dict[str, float]:
    """CLIPF's d(w) = max(0, 1 - sqrt(t / f(w))) of each word w, f(w) being its share of all words.

    Args:
        threshold: t. 0 stands for CC12M's 1e-6, or the share of the rarest word where that is more: in few captions no word is
            rarer than 1e-6, and all would be discarded nearly alike.
    """
    total = math.fsum(counts.values())  # of which the order of words does not matter
    t = threshold or max(CC12M_THRESHOLD, min(counts.values()) / total)
    return {word: max(0.0, 1 - math.sqrt(t / (count / total))) for word, count in counts.items()}
