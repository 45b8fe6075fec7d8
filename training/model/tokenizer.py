"""A tokenizer without a download: CLIP's kind of byte-level BPE, trained on the run's captions."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

END_OF_WORD = "</w>"


def train_tokenizer(captions: Iterable[str], vocab_size: int, context_length: int) -> CLIPTokenizer:
    """Train a `CLIPTokenizer` on captions.

    The vocabulary is laid out as CLIP's: the 256 bytes, the 256 bytes at the end of a word, the merges, the start and the end
    token. So no text is unknown, and the end token has the highest id.

    Args:
        captions: texts; the order does not matter.
        vocab_size: the most tokens, at least 514.
        context_length: the most tokens of a caption, recorded as `model_max_length`.
    """
    template = CLIPTokenizer()
    start, end = template.bos_token, template.eos_token
    bpe = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    bpe.normalizer = template.backend_tokenizer.normalizer
    bpe.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    word_ends = [byte + END_OF_WORD for byte in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        # Given here, the bytes at word ends have fixed ids. Left to the trainer they get theirs in the random order of a hash
        # map, which decides between pairs of equal count, so that processes and runs would disagree.
        special_tokens=word_ends,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + word_ends + ["".join(merge) for merge in merges] + [start, end]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)
