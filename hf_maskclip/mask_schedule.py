"""What training changes about a mask from step to step: its ratio, its last steps, and the teacher of masks that need one.

Shapes: B images of this process, C channels, L patches.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .errors import fail
from .models.masked_tower import PatchMaskedTower
from .models.patch_mask_registry import build_patch_mask, scale_mask_ratios
from .models.patch_masking import PatchMask, PatchSelection
from .models.patch_masking_attentive import class_attention


class MaskSchedule:
    """Chooses the visible patches by the step of a training.

    Args:
        vision_model: whose patch mask chooses.
        num_steps: of the training.
        ramp: the share of the steps over which the mask ratios grow linearly from 0. (Anchors of the cluster mask are removed
            from step 1: they have no ratio.)
        unmasked_tuning_steps: the last steps, which see whole images.
        autocast: the context that a teacher of the mask computes in.

    Attributes:
        teacher: of a mask that needs `patch_scores`, else None.

    Raises:
        ConfigError: a ramp for a mask that has no ratio.
    """

    def __init__(
        self,
        vision_model: PatchMaskedTower,
        num_steps: int,
        *,
        ramp: float = 0.0,
        unmasked_tuning_steps: int = 0,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.vision_model, self.autocast, self.ramp = vision_model, autocast, ramp
        self.num_steps, self.num_masked_steps = num_steps, num_steps - unmasked_tuning_steps
        options = vision_model.config.patch_mask
        if ramp and scale_mask_ratios(options, 0.0) == options:
            fail(f"mask_schedule={ramp}: the patch mask {options['name']!r} has no mask_ratio that could grow")
        self.teacher = AttentionTeacher(vision_model) if vision_model.patch_mask.needs_patch_scores else None

    def select(
        self, pixel_values: torch.Tensor, step: int, generator: torch.Generator, **images: torch.Tensor
    ) -> PatchSelection | None:
        """The visible patches of images at a step counted from 1; None where all are.

        Args:
            pixel_values: (B, C, H, W), or of NaFlex (B, L, P * P * C), whose `spatial_shapes` are in `images`.
        """
        if self.vision_model.patch_mask.keeps_all or step > self.num_masked_steps:
            return None
        progress = (step - 1) / self.num_steps
        scores = None
        if self.teacher is not None:
            with self.autocast():
                scores = self.teacher.scores(pixel_values, **images)
        options = {"patch_mask": self._mask_at(progress), "patch_scores": scores}
        return self.vision_model.select_patches(pixel_values, progress=progress, generator=generator, **images, **options)

    def after_step(self, step: int) -> None:
        """Let the teacher follow the weights that this step's update gave, as long as it is asked again."""
        if self.teacher is not None and step < self.num_masked_steps:
            self.teacher.update(self.vision_model, step / self.num_steps)

    def _mask_at(self, progress: float) -> PatchMask | None:
        """The mask with its ratios scaled where they still grow; None, the model's own, after that."""
        if progress >= self.ramp:
            return None
        config = self.vision_model.config
        options = scale_mask_ratios(config.patch_mask, progress / self.ramp)
        return build_patch_mask(options, patch_size=config.patch_size)


class AttentionTeacher:
    """An exponential moving average of the vision tower, by whose attention a mask chooses (A-CLIP, arXiv 2212.08653).

    Its momentum grows from the mask's `momentum` to 1 by a half cosine over training.

    Raises:
        ConfigError: the mask's `teacher_image_size` is no multiple of the patch size.
    """

    def __init__(self, vision_model: PatchMaskedTower):
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

    def update(self, vision_model: PatchMaskedTower, progress: float) -> None:
        self.average.multi_avg_fn = get_ema_multi_avg_fn(self.momentum(progress))
        self.average.update_parameters(vision_model)

    def scores(self, pixel_values: torch.Tensor, **images: torch.Tensor) -> torch.Tensor:
        """The attention (B, L) that the average pays to each patch of images."""
        return class_attention(self.average.module, pixel_values, self.mask.teacher_image_size, **images)
