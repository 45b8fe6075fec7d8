"""Which patches a training step sees: a draw that can be replayed, and the chunks of a batch.

Shapes: B images of this process, C channels, L patches.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from hf_maskclip import PatchSelection
from hf_maskclip.mask_schedule import MaskSchedule
from hf_maskclip.models.masked_tower import PatchMaskedTower
from training.config import TrainingConfig
from training.data.batches import Batch


class PatchSelector:
    """Chooses the visible patches of each step of a run, by its [`MaskSchedule`].

    The randomness is a function of seed, step and process, so that any step can be replayed.

    Raises:
        ConfigError: a schedule for a mask that has no ratio.
    """

    def __init__(self, vision_model: PatchMaskedTower, config: TrainingConfig, num_steps: int, accelerator: Accelerator):
        self.seed, self.process = config.seed, accelerator.process_index
        self.schedule = MaskSchedule(
            vision_model,
            num_steps,
            ramp=config.mask_schedule,
            unmasked_tuning_steps=config.unmasked_tuning_steps,
            autocast=accelerator.autocast,
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


class Chunk:
    """Some rows of a batch. Their patches are chosen when they are first asked for, and are the same from then on.

    Args:
        batch: of [`training.data.batches.PairBatches`].
        rows: of the batch.
        normalize: from rows of a batch to the arguments of the vision tower, on its device.
        select: from these arguments to the visible patches.
    """

    def __init__(
        self,
        batch: Batch,
        rows: slice,
        normalize: Callable[[Batch, slice], dict[str, torch.Tensor]],
        select: Callable[..., PatchSelection | None],
    ):
        self.batch, self.rows = batch, rows
        self.normalize, self.select = normalize, select

        self.selection: PatchSelection | None = None
        self.is_chosen = False

    def __len__(self) -> int:
        return len(self.batch.keys[self.rows])

    def encode_inputs(self) -> dict[str, Any]:
        """The model's arguments, made anew at each call, so that no more than one chunk need be on the device."""
        images = self.normalize(self.batch, self.rows)
        device = images["pixel_values"].device
        if not self.is_chosen:
            self.selection, self.is_chosen = self.select(**images), True
        texts = {name: tokens[self.rows].to(device) for name, tokens in self.batch.texts.items()}
        return texts | images | {"patch_selection": self.selection, "apply_patch_mask": self.selection is not None}

    def kept_share(self, num_patches: int) -> torch.Tensor:
        """Of `num_patches` an image, the share that is visible, 0-d. Of NaFlex's images many have fewer from the start."""
        if self.selection is not None:
            return self.selection.kept_share(num_patches)
        if self.batch.spatial_shapes is None:
            return torch.tensor(1.0)
        return self.batch.spatial_shapes[self.rows].prod(dim=1).float().mean() / num_patches


def kept_shares(chunks: list[Chunk], num_patches: int, device: torch.device) -> torch.Tensor:
    """The share of patches that is visible, of each of N chunks, on the device (N,)."""
    return torch.stack([chunk.kept_share(num_patches).float().to(device) for chunk in chunks])


def step_seed(seed: int, step: int, process: int, chunk: int = 0) -> int:
    """A seed for each (seed, step, process, chunk), below 2^63."""
    return (((seed * 1_000_003 + step) * 65_536 + process) * 4_096 + chunk) % 2**63
