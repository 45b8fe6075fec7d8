"""Which patches a training step sees: the mask's randomness, its schedule, and the teacher of masks that need one.

Shapes: B images of this process, C channels, L patches.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_maskclip import MaskCLIPVisionModel, PatchMask, PatchSelection, build_patch_mask
from hf_maskclip.errors import fail
from hf_maskclip.models.patch_mask_registry import scale_mask_ratios
from hf_maskclip.models.patch_masking_attentive import class_attention
from training.config import TrainingConfig
from training.data.batches import Batch


class PatchSelector:
    """Chooses the visible patches of each step of a run.

    The randomness is a function of seed, step and process, so that any step can be replayed. Over the first
    `config.mask_schedule` of the steps the mask ratios grow linearly from 0. (Anchors of the cluster mask are removed from
    step 1: they have no ratio.) The last `config.unmasked_tuning_steps` see whole images.

    Raises:
        ConfigError: a schedule for a mask that has no ratio.
    """

    def __init__(self, vision_model: MaskCLIPVisionModel, config: TrainingConfig, num_steps: int, accelerator: Accelerator):
        self.vision_model, self.accelerator, self.seed = vision_model, accelerator, config.seed
        self.num_steps, self.num_masked_steps = num_steps, num_steps - config.unmasked_tuning_steps
        self.options = vision_model.config.patch_mask
        self.ramp = config.mask_schedule
        if self.ramp and scale_mask_ratios(self.options, 0.0) == self.options:
            fail(f"mask_schedule={self.ramp}: the patch mask {self.options['name']!r} has no mask_ratio that could grow")
        self.generator = torch.Generator(accelerator.device)
        self.teacher = None
        if vision_model.patch_mask.needs_patch_scores:
            self.teacher = AttentionTeacher(vision_model)
            accelerator.register_for_checkpointing(self.teacher.average)

    def select(self, pixel_values: torch.Tensor, step: int, chunk: int = 0) -> PatchSelection | None:
        """The visible patches of images (B, C, H, W), a chunk of the batch, at a step counted from 1; None where all are."""
        if self.vision_model.patch_mask.keeps_all or step > self.num_masked_steps:
            return None
        progress = (step - 1) / self.num_steps
        self.generator.manual_seed(mask_seed(self.seed, step, self.accelerator.process_index, chunk))
        scores = None
        if self.teacher is not None:
            with self.accelerator.autocast():
                scores = self.teacher.scores(pixel_values)
        return self.vision_model.select_patches(
            pixel_values, progress=progress, generator=self.generator, patch_mask=self._mask_at(progress), patch_scores=scores
        )

    def after_step(self, step: int) -> None:
        """Let the teacher follow the weights that this step's update gave, as long as it is asked again."""
        if self.teacher is not None and step < self.num_masked_steps:
            self.teacher.update(self.vision_model, step / self.num_steps)

    def _mask_at(self, progress: float) -> PatchMask | None:
        """The mask with its ratios scaled where they still grow; None, the model's own, after that."""
        if progress >= self.ramp:
            return None
        options = scale_mask_ratios(self.options, progress / self.ramp)
        return build_patch_mask(options, patch_size=self.vision_model.config.patch_size)


class AttentionTeacher:
    """An exponential moving average of the vision tower, by whose attention a mask chooses (A-CLIP, arXiv 2212.08653).

    Its momentum grows from the mask's `momentum` to 1 by a half cosine over training.

    Raises:
        ConfigError: the mask's `teacher_image_size` is no multiple of the patch size.
    """

    def __init__(self, vision_model: MaskCLIPVisionModel):
        self.mask = vision_model.patch_mask
        patch_size = vision_model.config.patch_size
        if self.mask.teacher_image_size % patch_size:
            fail(f"teacher_image_size={self.mask.teacher_image_size}: must be a multiple of the patch size {patch_size}")
        self.average = AveragedModel(vision_model).eval().requires_grad_(False)
        self.average.module.set_attn_implementation("eager")  # the one that shows its weights
        self.average.update_parameters(vision_model)  # its first update copies; from here on it averages

    def momentum(self, progress: float) -> float:
        """At a share of training in [0, 1]: 1 - (1 - momentum) (1 + cos(pi progress)) / 2."""
        return 1 - (1 - self.mask.momentum) * (1 + math.cos(math.pi * progress)) / 2

    def update(self, vision_model: MaskCLIPVisionModel, progress: float) -> None:
        self.average.multi_avg_fn = get_ema_multi_avg_fn(self.momentum(progress))
        self.average.update_parameters(vision_model)

    def scores(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The attention (B, L) that the average pays to each patch of images (B, C, H, W)."""
        return class_attention(self.average.module, pixel_values, self.mask.teacher_image_size)


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
