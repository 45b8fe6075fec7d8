"""Which patches a training step sees: a draw that can be replayed, and the chunks of a batch.

Shapes: B images of this process, C channels, L patches.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from hf_maskclip import PatchSelection
from hf_maskclip.errors import fail
from hf_maskclip.mask_schedule import MaskSchedule, seed_of
from hf_maskclip.models.masked_tower import PatchMaskedTower
from hf_maskclip.models.patch_masking import keep_first, keep_first_of_each, whole_patch_grid
from hf_maskclip.models.selection_by_picture import in_order
from hf_maskclip.phases import Timeline
from training.config import TrainingConfig
from training.data.batches import Batch

logger = logging.getLogger(__name__)


class PatchSelector:
    """Chooses the visible patches of each step of a run, by its [`MaskSchedule`].

    The randomness is a function of seed, step and process, so that any step can be replayed.

    Raises:
        ConfigError: a phase whose mask cannot be built, or a ratio for a mask that has none.
    """

    def __init__(self, vision_model: PatchMaskedTower, config: TrainingConfig, timeline: Timeline, accelerator: Accelerator):
        self.seed, self.process, self.views = config.seed, accelerator.process_index, config.views
        self.schedule = MaskSchedule(vision_model, timeline, autocast=accelerator.autocast)
        self.compares_views = config.views == "two"  # until they were seen to differ
        if config.views in ("two", "complementary") and self.schedule.keeps_all:
            fail(f"views={config.views!r}: two views of a picture differ by their patch mask, and there is none")
        if config.views == "two" and not self.schedule.has_chance:
            fail(
                "views='two': the patch mask has no chance, so both views of a picture are the same; use complementary or crops"
            )
        self.generator = torch.Generator(accelerator.device)
        if self.schedule.teacher is not None:
            accelerator.register_for_checkpointing(self.schedule.teacher.average)

    def select(self, pixel_values: torch.Tensor, step: int, chunk: int = 0, **images: torch.Tensor) -> PatchSelection | None:
        """The visible patches of images, a chunk of the batch, at a step counted from 1; None where all are.

        Arguments as in [`MaskSchedule.select`].
        """
        self.generator.manual_seed(step_seed(self.seed, step, self.process, chunk))
        return self.schedule.select(pixel_values, step, self.generator, **images)

    def select_views(
        self, pixel_values: torch.Tensor, step: int, chunk: int = 0, **images: torch.Tensor
    ) -> list[PatchSelection] | None:
        """As `select`, for each view of the images; None where all patches are visible, and views would be the same."""
        first = self.select(pixel_values, step, chunk, **images)
        if first is None or self.views in ("one", "crops"):  # crops come as pictures of their own
            return None if first is None else [first]
        self.generator.manual_seed(step_seed(self.seed, step, self.process, chunk, view=1))
        is_there = patches_there(pixel_values, self.schedule.vision_model.config.patch_size, **images)
        if self.views == "complementary":
            return [first, complement(first, is_there, self.generator)]
        second = self.schedule.select(pixel_values, step, self.generator, **images)
        if self.compares_views:
            self._compare(*(selection.visible(is_there.shape[1]) for selection in (first, second)))
        return [first, second]

    def _compare(self, first: torch.BoolTensor, second: torch.BoolTensor) -> None:
        """Say where the first two views (B, L) that leave out something are the same."""
        if first.all():
            return
        self.compares_views = False
        if torch.equal(first, second):
            logger.warning(
                "views='two': both masks of each of the first %d pictures are the same, so the second view adds nothing there; "
                "another mask, complementary or crops would differ",
                len(first),
            )


class Chunk:
    """Some rows of a batch. Their patches are chosen when they are first asked for, and are the same from then on.

    Args:
        batch: of [`training.data.batches.PairBatches`].
        rows: of the batch.
        normalize: from rows of a batch's pictures to the arguments of the vision tower, on its device.
        select: from these arguments to the visible patches, for each view of the pictures.
        options: further arguments of the model.
    """

    def __init__(
        self,
        batch: Batch,
        rows: slice,
        normalize: Callable[[Batch, slice], dict[str, torch.Tensor]],
        select: Callable[..., list[PatchSelection] | None],
        options: dict[str, Any],
    ):
        self.batch, self.rows, self.options = batch, rows, options
        self.picture_rows = slice(rows.start * batch.num_crops, rows.stop * batch.num_crops)
        self.normalize, self.select = normalize, select

        self.selection: PatchSelection | None = None
        self.is_chosen, self.num_views = False, 1

    def __len__(self) -> int:
        return len(self.batch.keys[self.rows])

    def encode_inputs(self) -> dict[str, Any]:
        """The model's arguments, made anew at each call, so that no more than one chunk need be on the device."""
        images = self.normalize(self.batch, self.picture_rows)
        device = images["pixel_values"].device
        if not self.is_chosen:
            chosen, self.is_chosen = self.select(**images), True
            self.num_views = len(chosen) if chosen else 1
            self.selection = interleave(chosen) if chosen else None
        if self.num_views > 1:  # a picture's views follow one another
            images = {name: values.repeat_interleave(self.num_views, dim=0) for name, values in images.items()}
        texts = {name: tokens[self.rows].to(device, non_blocking=True) for name, tokens in self.batch.texts.items()}
        choice = {"patch_selection": self.selection, "apply_patch_mask": self.selection is not None}
        return texts | images | choice | self.options

    def kept_share(self, num_patches: int) -> torch.Tensor:
        """Of `num_patches` an image, the share that is visible, 0-d. Of NaFlex's images many have fewer from the start."""
        if self.selection is not None:
            return self.selection.kept_share(num_patches)
        if self.batch.spatial_shapes is None:
            return torch.tensor(1.0)
        return self.batch.spatial_shapes[self.picture_rows].prod(dim=1).float().mean() / num_patches


def kept_shares(chunks: list[Chunk], num_patches: int, device: torch.device) -> torch.Tensor:
    """The share of patches that is visible, of each of N chunks, on the device (N,)."""
    return torch.stack([chunk.kept_share(num_patches).float().to(device, non_blocking=True) for chunk in chunks])


def patches_per_image(batch: Batch, patch_size: int) -> int:
    """L of the pictures of a batch; of NaFlex's, with their padding."""
    if batch.spatial_shapes is not None:
        return batch.pixel_values.shape[1]
    return math.prod(whole_patch_grid(batch.pixel_values, patch_size))


def patches_there(pixel_values: torch.Tensor, patch_size: int, spatial_shapes=None, **_: torch.Tensor) -> torch.BoolTensor:
    """Which patches of each image are no padding, (B, L)."""
    batch, device = len(pixel_values), pixel_values.device
    if spatial_shapes is None:
        num_patches = math.prod(whole_patch_grid(pixel_values, patch_size))
        return torch.ones(batch, num_patches, dtype=torch.bool, device=device)
    return torch.arange(pixel_values.shape[1], device=device) < spatial_shapes.prod(dim=1)[:, None]


def complement(selection: PatchSelection, is_there: torch.BoolTensor, generator: torch.Generator) -> PatchSelection:
    """As many patches of each image: those that a selection has dropped, or a random part of them; then random others.

    Args:
        is_there: which patches are no padding, (B, L).
    """
    visible = selection.visible(is_there.shape[1])  # (B, L)
    noise = torch.rand(visible.shape, generator=generator, device=visible.device)
    order = (noise + visible.float() + 2 * (~is_there).float()).argsort(dim=1)  # dropped ones, visible ones, padding
    if selection.lengths is None:
        return keep_first(order, selection.indices.shape[1])
    return keep_first_of_each(order, selection.lengths, selection.indices.shape[1])


def interleave(views: list[PatchSelection]) -> PatchSelection:
    """One selection for V views of B images, (B * V, K): a picture's views one after another."""
    batch, device = len(views[0].indices) * len(views), views[0].indices.device
    rows = [torch.arange(view, batch, len(views), device=device) for view in range(len(views))]
    return in_order(list(zip(rows, views, strict=True)), batch)


def step_seed(seed: int, step: int, process: int, chunk: int = 0, view: int = 0) -> int:
    """A seed below 2^63 for each (seed, step, process, chunk, view)."""
    return seed_of(seed, step, process, chunk, view)
