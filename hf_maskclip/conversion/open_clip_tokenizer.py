"""CLIP's own tokenizer, which is open_clip's: made from open_clip's vocabulary where it is installed, or of the Hub."""

import gzip
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import ConfigError, as_config_error
from ..model_folder import check_reachable
from ..options import CLIP_TOKENIZER

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
NUM_MERGES = 49152 - 256 - 2  # that CLIP uses, of more that the file has
CONTEXT_LENGTH = 77
END_OF_WORD = "</w>"


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """CLIP's own tokenizer: from an installed open_clip, which needs no network, or else from the Hub.

    Raises:
        ConfigError: open_clip is not installed, and the Hub cannot be reached.
    """
    vocabulary = find_vocabulary()
    if vocabulary is not None:
        return tokenizer_of_vocabulary(vocabulary)
    try:
        check_reachable(CLIP_TOKENIZER, "tokenizer.json")
    except ConfigError as error:
        way = "name the folder of a tokenizer by --tokenizer, or install open_clip_torch, which has CLIP's"
        raise ConfigError(f"--tokenizer: CLIP's own is not to be had ({error}): {way}") from None
    with as_config_error("--tokenizer", CLIP_TOKENIZER):
        return AutoTokenizer.from_pretrained(CLIP_TOKENIZER)


def find_vocabulary() -> Path | None:
    """The vocabulary in an installed open_clip, found without importing it."""
    spec = find_spec("open_clip")
    places = [Path(place) / VOCABULARY for place in (spec.submodule_search_locations or ())] if spec else []
    return next((place for place in places if place.is_file()), None)


def tokenizer_of_vocabulary(path: Path) -> CLIPTokenizer:
    """The tokenizer of CLIP's file of merges: bytes, bytes at the end of a word, merges, start and end token."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : NUM_MERGES + 1]]  # the first line is a title
    alphabet = list(bytes_to_unicode().values())
    tokens = [*alphabet, *(byte + END_OF_WORD for byte in alphabet), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)
