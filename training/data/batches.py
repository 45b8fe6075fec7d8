"""Batches of image-text pairs from a stream: decoded, cropped, tokenised in worker processes; bad samples skipped and counted.

Shapes: B pairs, S caption tokens.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_maskclip.data.decoding import SkippedSample, sample_key
from hf_maskclip.errors import TrainingStopped
from training.data.forms import PairForm
from training.data.naflex import GridPatches, NaFlexTransform, stack_grids
from training.data.skipping import SkipMonitor
from training.data.windows import Place, Windows

Sample = tuple[list[torch.Tensor | GridPatches], list[int], str]  # the pixels of each crop, token ids, key


@dataclass
class Batch:
    """A batch of pairs for one process. Of V crops of a picture, which follow one another, each is a row of its own.

    Attributes:
        pixel_values: uint8 (B * V, 3, H, W); for NaFlex (B * V, L, P * P * 3), L patches of side P.
        texts: the arguments of the text tower, (B, S) each.
        keys: of the B samples.
        skipped: by cause, the samples passed over since this worker's last batch.
        worker: the number of the data worker that made it.
        start, end: where that worker was before and after it.
        spatial_shapes: for NaFlex, the rows and columns of patches (B * V, 2).
    """

    pixel_values: torch.Tensor
    texts: dict[str, torch.Tensor]
    keys: list[str]
    skipped: Counter[str]
    worker: int
    start: Place
    end: Place
    spatial_shapes: torch.LongTensor | None = None

    def pin_memory(self) -> "Batch":
        """The batch in memory from which a GPU copies by itself. PyTorch's loader calls this, in a thread."""
        texts = {name: tokens.pin_memory() for name, tokens in self.texts.items()}
        # Grids stay as they are: they are few numbers, which the host reads as well.
        return replace(self, pixel_values=self.pixel_values.pin_memory(), texts=texts)

    @property
    def input_ids(self) -> torch.LongTensor:
        return self.texts["input_ids"]

    @property
    def num_crops(self) -> int:
        """V, of each picture."""
        return len(self.pixel_values) // len(self.keys)

    @property
    def image_size(self) -> int | None:
        """The side of its pictures, in pixels; None for NaFlex, whose sizes differ."""
        return self.pixel_values.shape[-1] if self.spatial_shapes is None else None


@dataclass(frozen=True)
class Stopped:
    """What comes in place of a batch where no more can come."""

    reason: str


@dataclass(frozen=True)
class TextForm:
    """The arguments of a family's text tower.

    Attributes:
        names: what it takes of a tokenizer's outputs.
        whole_length: that captions are padded to, for a tower that reads the last position. 0: to the longest of a batch,
            which is exact for a tower that is causal and pools at the end token, or is told what is padding.
    """

    names: tuple[str, ...] = ("input_ids",)
    whole_length: int = 0


def pad_tokens(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[list[int]], max_length: int, form: TextForm
) -> dict[str, torch.Tensor]:
    """The arguments of the text tower, (B, S) each; S is the longest caption rounded up to a multiple of 8, at most
    `max_length`, or the form's length."""
    length = form.whole_length or min(max_length, -(-max(map(len, token_ids)) // 8) * 8)
    padded = tokenizer.pad(
        {"input_ids": token_ids}, padding="max_length", max_length=length, return_attention_mask=True, return_tensors="pt"
    )
    return {name: padded[name] for name in form.names}


class PairBatches(torch.utils.data.IterableDataset):
    """Endless training batches of the shards that fall to this process and worker.

    An epoch is one pass over all samples. Where no more batch can come, the last item is a [`Stopped`].

    Args:
        open_epoch: the stream of an epoch, by its number. (`IterableDataset.set_epoch` will not do: it sets the epoch of all
            workers of a process, which need not be in the same one.)
        form_at: from the number of a training step to the form of its pairs.
        max_skipped_share: of a worker's last 1,000 samples, how many may give no pair.
        positions: where each worker begins, by its number; those left out begin at the beginning. The window that it is in is
            read again, but not decoded.
        first_step: that the first batch of the first worker is for. The workers take turns.
        window_size: rows that are shuffled together, as in [`Windows`].
    """

    def __init__(
        self,
        open_epoch: Callable[[int], datasets.IterableDataset],
        form_at: Callable[[int], PairForm],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int,
        max_skipped_share: float = 0.5,
        positions: dict[int, Place] | None = None,
        text_form: TextForm = TextForm(),
        first_step: int = 1,
        window_size: int = 0,
    ):
        self.open_epoch, self.form_at, self.first_step = open_epoch, form_at, first_step
        self.tokenizer, self.text_form, self.window_size = tokenizer, text_form, window_size
        self.batch_size, self.seed, self.max_skipped_share = batch_size, seed, max_skipped_share
        self.positions: dict[int, Place] = positions or {}

    def __iter__(self) -> Iterator[Batch | Stopped]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        step = self.first_step + worker
        start = self.positions.get(worker, Place())
        pairs: dict[str, Sample] = {}  # by their keys: in one batch, a pair would be its own negative
        skipped: Counter[str] = Counter()
        num_repeated = 0  # since a pair was added
        try:
            monitor = SkipMonitor(self.max_skipped_share)
            windows = Windows(self.open_epoch, self.window_size, [self.seed, worker])
            for row, place in endless_rows(windows, start, monitor):
                sample = self._read(row, place.epoch, self.form_at(step), monitor)
                if isinstance(sample, SkippedSample):
                    skipped[str(sample)] += 1
                    continue
                if sample[2] in pairs:
                    skipped["key_repeated"] += 1
                    num_repeated += 1
                    self._check_progress(len(pairs), num_repeated)
                    continue
                pairs[sample[2]], num_repeated = sample, 0
                if len(pairs) == self.batch_size:
                    yield self._collate(list(pairs.values()), self.form_at(step), skipped, worker, start, place)
                    pairs, skipped, start, step = {}, Counter(), place, step + num_workers
        except TrainingStopped as stopped:  # raised here, it would reach the training process as a traceback
            yield Stopped(str(stopped))

    def _check_progress(self, num_pairs: int, num_repeated: int) -> None:
        """Raises TrainingStopped where all pairs of an unfinished batch came twice again, and no other."""
        if num_repeated > 2 * num_pairs:
            raise TrainingStopped(
                f"a data worker has {num_pairs} different pairs, too few for batch_size={self.batch_size}: "
                "use a smaller one, or fewer num_workers"
            )

    def _read(self, row: dict[str, Any], epoch: int, form: PairForm, monitor: SkipMonitor) -> Sample | SkippedSample:
        """Pixels, token ids and key of a row, or the SkippedSample in place of one that gives no pair."""
        shard = str(row.get("__url__", "the stream"))
        try:
            sample = self._decode(row, epoch, form)
        except SkippedSample as skipped:
            monitor.count_skipped(str(skipped), sample_key(row), shard)
            return skipped
        monitor.count_used(shard)
        return sample

    def _decode(self, row: dict[str, Any], epoch: int, form: PairForm) -> Sample:
        key = sample_key(row)
        rng = np.random.default_rng([self.seed, epoch, zlib.crc32(key.encode())])
        picture, caption = form.decoder(row, rng)
        token_ids = form.text_mask.encode(self.tokenizer, caption, rng)
        # The transforms draw from PyTorch's global generator; seeded by the sample they do not depend on order or worker.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            return [form.transform(picture) for _ in range(form.num_crops)], token_ids, key

    def _collate(
        self, samples: list[Sample], form: PairForm, skipped: Counter[str], worker: int, start: Place, end: Place
    ) -> Batch:
        crops, token_ids, keys = zip(*samples, strict=True)
        pixels = [crop for of_picture in crops for crop in of_picture]
        texts = pad_tokens(self.tokenizer, list(token_ids), form.text_mask.num_tokens, self.text_form)
        if isinstance(form.transform, NaFlexTransform):
            pixel_values, spatial_shapes = stack_grids(pixels, form.transform.max_num_patches)
        else:
            pixel_values, spatial_shapes = torch.stack(pixels), None
        return Batch(pixel_values, texts, list(keys), skipped, worker, start, end, spatial_shapes)


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
