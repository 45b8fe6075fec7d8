"""The pairs of a source that fall to a data worker: decoded, cropped, tokenised; what gives no pair is counted."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_maskclip.data.decoding import SkippedSample, sample_key
from training.data.forms import PairForm
from training.data.naflex import GridPatches
from training.data.skipping import SkipMonitor
from training.data.windows import Place, Windows


@dataclass(frozen=True)
class PairSource:
    """A source of pairs, as data workers read it.

    Attributes:
        open_epoch: the stream of an epoch, by its number. (`IterableDataset.set_epoch` will not do: it sets the epoch of all
            workers of a process, which need not be in the same one.)
        form_at: from the number of a training step to the form of its pairs.
        window_size: rows that are shuffled together, as in [`Windows`].
        name: what counts and messages call it.
        share: of the samples; those of all sources add up to 1.
    """

    open_epoch: Callable[[int], datasets.IterableDataset]
    form_at: Callable[[int], PairForm]
    window_size: int = 0
    name: str = "the stream"
    share: float = 1.0


@dataclass(frozen=True)
class Pair:
    """A picture, as the pixels of each of its crops, and a caption, as token ids."""

    crops: list[torch.Tensor | GridPatches]
    token_ids: list[int]
    key: str


class PairReader:
    """The pairs of a source that fall to a data worker, in their order and without end.

    Args:
        number: of the source among those of the run.
        worker: the number of the data worker.
        seed: of crops and flips, and of the order of rows.
        place: where it begins. The window that it is in is read again, but not decoded.
        max_skipped_share: of the last 1,000 samples, how many may give no pair.
    """

    def __init__(
        self,
        source: PairSource,
        tokenizer: PreTrainedTokenizerBase,
        number: int,
        worker: int,
        seed: int,
        place: Place,
        max_skipped_share: float,
    ):
        self.source, self.tokenizer, self.number, self.seed, self.place = source, tokenizer, number, seed, place
        self.monitor = SkipMonitor(max_skipped_share)
        windows = Windows(source.open_epoch, source.window_size, [seed, worker, number])
        self.rows = endless_rows(windows, place, self.monitor)

    def next_pair(self, step: int) -> Pair | SkippedSample:
        """The next row as a pair for a training step, or the cause why it gives none; `place` is then behind it.

        Raises:
            TrainingStopped: too many samples give no pair.
        """
        row, self.place = next(self.rows)
        shard = str(row.get("__url__", "the stream"))
        try:
            pair = self._decode(row, self.source.form_at(step))
        except SkippedSample as skipped:
            self.monitor.count_skipped(str(skipped), sample_key(row), shard)
            return skipped
        self.monitor.count_used(shard)
        return pair

    def _decode(self, row: dict[str, Any], form: PairForm) -> Pair:
        key = sample_key(row)
        rng = np.random.default_rng([self.seed, self.place.epoch, zlib.crc32(key.encode(), self.number)])
        picture, caption = form.decoder(row, rng)
        token_ids = form.text_mask.encode(self.tokenizer, caption, rng)
        # The transforms draw from PyTorch's global generator; seeded by the sample they do not depend on order or worker.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            return Pair([form.transform(picture) for _ in range(form.num_crops)], token_ids, key)


def endless_rows(windows: Windows, place: Place, monitor: SkipMonitor) -> Iterator[tuple[dict[str, Any], Place]]:
    """The rows of a stream from a place on, epoch after epoch, each with the place after it.

    Raises:
        TrainingStopped: too many samples give no pair.
    """
    while True:
        is_empty = place == Place(place.epoch)
        for row, after in windows.epoch_from(place):
            is_empty = False
            yield row, after
        if is_empty:
            monitor.count_skipped("epoch_empty", "", "the stream")
        monitor.end_epoch()
        place = Place(place.epoch + 1)
