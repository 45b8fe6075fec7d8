"""What a data source is: a stream of undecoded rows, and how training and evaluation treat it."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import datasets
import numpy as np
from PIL import Image

from ..errors import fail
from .decoding import IMAGE_KEYS, Decoder, SkippedSample
from .tar_files import UNREADABLE

logger = logging.getLogger(__name__)

# So many samples without one usable pair mean wrong keys, not bad luck; so many shards, that it is not the shard.
PATIENCE = 1000
SHARDS_TRIED = 5


@dataclass
class Source:
    """A data source: its stream, and how training and evaluation treat it.

    Args:
        spec: what names it in options and messages.
        stream: undecoded rows, in the order of their shards.
        decoder: from a row to a picture and its caption.
        may_flip: whether captions stay true where a picture is mirrored.
        needs_shuffling: whether neighbours in a shard may be alike, so that rows are shuffled, too.
        eval_data: what a run that trains on it is evaluated on by default; empty: nothing.
    """

    spec: str
    stream: datasets.IterableDataset
    decoder: Decoder
    may_flip: bool = True
    needs_shuffling: bool = True
    eval_data: str = ""

    def check(self, to_the_end: bool = False) -> None:
        """Read up to the first usable pair, so that wrong keys are found before anything expensive starts.

        Args:
            to_the_end: look at all samples; else at the first `PATIENCE`, or `SHARDS_TRIED` shards that cannot be read.

        Raises:
            ConfigError: there is none; the message has the causes, and what could be done.
        """
        causes: Counter[str] = Counter()
        fields: list[str] = []
        reason = ""
        for row in islice(self.stream, None if to_the_end else PATIENCE):
            try:
                self.decoder(row, np.random.default_rng(0))
                return
            except SkippedSample as skipped:
                causes[str(skipped)] += 1
                fields = [key for key in row if not key.startswith("__")] or fields
                reason = row.get("__reason__", reason)
            if causes.total() == PATIENCE and to_the_end:
                logger.warning("%s: no usable image-text pair in the first %d samples; reading on", self.spec, PATIENCE)
            if causes[UNREADABLE] == causes.total() == SHARDS_TRIED and not to_the_end:
                break
        found = ", ".join(f"{cause} {count}" for cause, count in causes.items()) or "it is empty"
        hint = _hint(causes, fields, reason)
        fail(f"{self.spec!r}: no usable image-text pair in the first {causes.total()} samples ({found}); {hint}")

    def captions(self, limit: int) -> Iterator[str]:
        """The captions of the first `limit` samples, pictures untouched."""
        rng = np.random.default_rng(0)
        for row in self.stream.take(limit):
            if "__error__" not in row:
                try:
                    yield from self.decoder.captions(row, rng)
                except SkippedSample:
                    continue

    def pairs(self) -> Iterator[tuple[Image.Image, str]]:
        """The pictures that can be decoded and have a caption, each with one of its captions."""
        for row in self.stream:
            try:
                yield self.decoder(row, np.random.default_rng(0))
            except SkippedSample:
                continue


ADDRESSES = {"url", "image_url", "img_url"}  # fields of pictures that are elsewhere


def _hint(causes: Counter[str], fields: list[str], reason: str) -> str:
    """What a person whose data gives no pair could do."""
    if not causes:
        return "there are no samples in it"
    if set(causes) == {UNREADABLE}:
        return f"no shard can be read ({reason or 'they are damaged'})"
    names = {field.lower() for field in fields}
    has_pictures = not names.isdisjoint(IMAGE_KEYS)
    if causes["image_is_url"] or (not has_pictures and names & ADDRESSES):
        return "the pictures are addresses: download them first, for example by img2dataset"
    if causes["file_unreadable"] == causes.total():
        return "the paths of the pictures lead nowhere: they start from the folder of the file that they stand in"
    shown = ", ".join(fields[:10]) + (" and more" if len(fields) > 10 else "")
    hint = f"the samples have the fields {shown or 'none'}: name them by --image_key and --caption_key"
    if has_pictures and len(names) == 1:
        return "a picture's caption is a text file of its name beside it, or a row of a table such as metadata.csv"
    if causes["image_missing"] and causes["caption_missing"]:
        hint += "; in a tar the files of a sample lie side by side (tar --sort=name), under one name up to its first dot"
    return hint
