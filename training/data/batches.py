"""Batches of image-text pairs, made in worker processes of one source or of several.

Shapes: B pairs, S caption tokens.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_maskclip.data.decoding import SkippedSample
from hf_maskclip.errors import TrainingStopped
from training.data.forms import PairForm
from training.data.naflex import NaFlexTransform, stack_grids
from training.data.pairs import Pair, PairReader, PairSource
from training.data.windows import Place

Places = tuple[Place, ...]  # of each source


@dataclass
class Batch:
    """A batch of pairs for one process. Of V crops of a picture, which follow one another, each is a row of its own.

    Attributes:
        pixel_values: uint8 (B * V, 3, H, W); for NaFlex (B * V, L, P * P * 3), L patches of side P.
        texts: the arguments of the text tower, (B, S) each.
        keys: of the B samples.
        skipped: by cause, the samples passed over since this worker's last batch.
        of_sources: the pairs of each source, by its name.
        worker: the number of the data worker that made it.
        starts, ends: where that worker was in each source before and after it.
        spatial_shapes: for NaFlex, the rows and columns of patches (B * V, 2).
    """

    pixel_values: torch.Tensor
    texts: dict[str, torch.Tensor]
    keys: list[str]
    skipped: Counter[str]
    of_sources: Counter[str]
    worker: int
    starts: Places
    ends: Places
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


def stack_pictures(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B, 3, H, W) of B pictures (3, H, W), in channels-last memory, as decoders give them: to turn it takes as long as to
    resize."""
    return torch.stack([picture.permute(1, 2, 0) for picture in pictures]).permute(0, 3, 1, 2)


class PairBatches(torch.utils.data.IterableDataset):
    """Endless training batches of the shards that fall to this process and worker.

    Each batch has of every source its share, rounded up or down by chance. An epoch of a source is one pass over its samples.
    Where no more batch can come, the last item is a [`Stopped`].

    Args:
        max_skipped_share: of a worker's last 1,000 samples of a source, how many may give no pair.
        places: of each source, where each worker begins, by its number; those left out begin at the beginning.
        first_step: that the first batch of the first worker is for. The workers take turns.
    """

    def __init__(
        self,
        sources: Sequence[PairSource],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int,
        max_skipped_share: float = 0.5,
        places: dict[int, Places] | None = None,
        text_form: TextForm = TextForm(),
        first_step: int = 1,
    ):
        self.sources, self.tokenizer, self.batch_size, self.seed = tuple(sources), tokenizer, batch_size, seed
        self.max_skipped_share, self.text_form, self.first_step = max_skipped_share, text_form, first_step
        self.places: dict[int, Places] = places or {}

    def __iter__(self) -> Iterator[Batch | Stopped]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        starts = self.places.get(worker, (Place(),) * len(self.sources))
        readers = [
            PairReader(source, self.tokenizer, number, worker, self.seed, start, self.max_skipped_share)
            for number, (source, start) in enumerate(zip(self.sources, starts, strict=True))
        ]
        try:
            for step in count(self.first_step + worker, num_workers):
                yield self._batch(readers, worker, step)
        except TrainingStopped as stopped:  # raised here, it would reach the training process as a traceback
            yield Stopped(str(stopped))

    def _batch(self, readers: list[PairReader], worker: int, step: int) -> Batch:
        """The next batch. Raises TrainingStopped where no more can come."""
        skipped: Counter[str] = Counter()
        starts = tuple(reader.place for reader in readers)
        pairs: list[Pair] = []
        numbers = self._pairs_of_sources(step)
        for reader, number in zip(readers, numbers, strict=True):
            try:
                pairs += self._read(reader, step, number, skipped)
            except TrainingStopped as stopped:
                raise TrainingStopped(f"{reader.source.name}: {stopped}" if len(readers) > 1 else str(stopped)) from None
        of_sources = Counter({reader.source.name: number for reader, number in zip(readers, numbers, strict=True)})
        ends = tuple(reader.place for reader in readers)
        return self._collate(pairs, self.sources[0].form_at(step), skipped, of_sources, worker, starts, ends)

    def _pairs_of_sources(self, step: int) -> list[int]:
        """The pairs that each source gives to the batch of a step: by systematic sampling, so that shares are right in the mean
        and each number differs by less than 1 from its share."""
        offset = np.random.default_rng([self.seed, step]).random()
        ends = np.cumsum([source.share for source in self.sources]) * self.batch_size
        ends[-1] = self.batch_size  # whatever the sum of the shares is rounded to
        return np.diff(np.ceil(ends - offset).astype(int), prepend=0).tolist()

    def _read(self, reader: PairReader, step: int, number: int, skipped: Counter[str]) -> list[Pair]:
        """So many different pairs of a source; what is passed over is counted in `skipped`."""
        pairs: dict[str, Pair] = {}  # by their keys: in one batch, a pair would be its own negative
        num_repeated = 0  # since a pair was added
        while len(pairs) < number:
            pair = reader.next_pair(step)
            if isinstance(pair, SkippedSample):
                skipped[str(pair)] += 1
            elif pair.key in pairs:
                skipped["key_repeated"] += 1
                num_repeated += 1
                self._check_progress(len(pairs), number, num_repeated)
            else:
                pairs[pair.key], num_repeated = pair, 0
        return list(pairs.values())

    def _check_progress(self, num_pairs: int, number: int, num_repeated: int) -> None:
        """Raises TrainingStopped where all pairs of an unfinished batch came twice again, and no other."""
        if num_repeated > 2 * num_pairs:
            part = f"the {number} that its weight has of " if number < self.batch_size else ""
            raise TrainingStopped(
                f"a data worker has {num_pairs} different pairs, too few for {part}batch_size={self.batch_size}: "
                f"use a smaller one, {'a smaller weight, ' if part else ''}or fewer num_workers"
            )

    def _collate(
        self,
        pairs: list[Pair],
        form: PairForm,
        skipped: Counter[str],
        of_sources: Counter[str],
        worker: int,
        starts: Places,
        ends: Places,
    ) -> Batch:
        pixels = [crop for pair in pairs for crop in pair.crops]
        texts = pad_tokens(self.tokenizer, [pair.token_ids for pair in pairs], form.text_mask.num_tokens, self.text_form)
        if isinstance(form.transform, NaFlexTransform):
            pixel_values, spatial_shapes = stack_grids(pixels, form.transform.max_num_patches)
        else:
            pixel_values, spatial_shapes = stack_pictures(pixels), None
        keys = [pair.key for pair in pairs]
        return Batch(pixel_values, texts, keys, skipped, of_sources, worker, starts, ends, spatial_shapes)
