"""Which patches a training step sees: a draw that can be replayed, and the chunks of a batch.

Shapes: B images of this process, C channels, L patches.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from hf_maskclip import MaskCLIPVisionModel, PatchSelection
from hf_maskclip.mask_schedule import MaskSchedule
from training.config import TrainingConfig
from training.data.batches import Batch


class PatchSelector:
    """Chooses the visible patches of each step of a run, by its [`MaskSchedule`].

    The randomness is a function of seed, step and process, so that any step can be replayed.

    Raises:
        ConfigError: a schedule for a mask that has no ratio.
    """

    def __init__(self, vision_model: MaskCLIPVisionModel, config: TrainingConfig, num_steps: int, accelerator: Accelerator):
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

    def select(self, pixel_values: torch.Tensor, step: int, chunk: int = 0) -> PatchSelection | None:
        """The visible patches of images (B, C, H, W), a chunk of the batch, at a step counted from 1; None where all are."""
        self.generator.manual_seed(mask_seed(self.seed, step, self.process, chunk))
        return self.schedule.select(pixel_values, step, self.generator)


class Chunk:
    """Some rows of a batch. Their patches are chosen when they are first asked for, and are the same from then on.

    Args:
        batch: of [`training.data.batches.PairBatches`].
        rows: of the batch.
        normalize: from bytes (B, C, H, W) to what the model takes, on its device.
        select: from normalised images to their visible patches.
    """

    def __init__(
        self,
        batch: Batch,
        rows: slice,
        normalize: Callable[[torch.Tensor], torch.Tensor],
        select: Callable[[torch.Tensor], PatchSelection | None],
    ):
        self.pixels, self.input_ids = batch.pixel_values[rows], batch.input_ids[rows]
        self.normalize, self.select = normalize, select

        self.selection: PatchSelection | None = None
        self.is_chosen = False

    def encode_inputs(self) -> dict[str, Any]:
        """The model's arguments, made anew at each call, so that no more than one chunk need be on the device."""
        pixel_values = self.normalize(self.pixels)
        if not self.is_chosen:
            self.selection, self.is_chosen = self.select(pixel_values), True
        return {
            "input_ids": self.input_ids.to(pixel_values.device),
            "pixel_values": pixel_values,
            "patch_selection": self.selection,
            "apply_patch_mask": self.selection is not None,
        }


def kept_shares(chunks: list[Chunk], num_patches: int, device: torch.device) -> torch.Tensor:
    """The share of patches that is visible, of each of N chunks, on the device (N,)."""
    shares = [1.0 if chunk.selection is None else chunk.selection.kept_share(num_patches) for chunk in chunks]
    return torch.stack([torch.as_tensor(share, dtype=torch.float32).to(device) for share in shares])


def mask_seed(seed: int, step: int, process: int, chunk: int = 0) -> int:
    """A seed for each (seed, step, process, chunk), below 2^63."""
    return (((seed * 1_000_003 + step) * 65_536 + process) * 4_096 + chunk) % 2**63
