"""What training changes about a mask from step to step: the mask of a phase, its ratio, and the teacher of masks that need one.

Shapes: B images of this process, C channels, L patches.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from .averaging import MovingAverage
from .errors import as_config_error, fail
from .models.masked_tower import PatchMaskedTower
from .models.patch_mask_registry import (
    build_patch_mask,
    patch_mask_options,
    ratio_options,
    resolve_patch_mask,
    scale_mask_ratios,
    set_mask_ratios,
)
from .models.patch_masking import PatchMask, PatchSelection
from .models.patch_masking_attentive import class_attention
from .models.selection_by_picture import hashed_seed
from .phases import Phase, Timeline


def seed_of(*numbers: int) -> int:
    """A seed below 2^63 for these numbers."""
    return hashed_seed(repr(numbers).encode())


class MaskSchedule:
    """Chooses the visible patches by the step of a training.

    Anchors of the cluster mask are removed from the first step of a ramp: they have no ratio.

    Args:
        vision_model: whose patch mask chooses, where the phase has no other.
        timeline: the phases of the training.
        autocast: the context that a teacher of a mask computes in.

    Attributes:
        keeps_all: whether no phase leaves out a patch.
        has_chance: whether another generator gives other patches in each phase that leaves out some.
        teacher: of masks that need `patch_scores`, else None.

    Raises:
        ConfigError: a mask that cannot be built, or a ratio for a mask that has none.
    """

    def __init__(
        self,
        vision_model: PatchMaskedTower,
        timeline: Timeline,
        *,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.vision_model, self.timeline, self.autocast = vision_model, timeline, autocast
        masks = [self._checked_mask(phase) for phase in timeline.phases]
        self.keeps_all = all(mask.keeps_all for mask in masks)
        self.has_chance = all(mask.has_chance for mask in masks if not mask.keeps_all)
        asking = {number: mask for number, mask in enumerate(masks) if mask.needs_patch_scores}
        self.teacher = AttentionTeacher(vision_model, list(asking.values())) if asking else None
        self.last_scored_step = max((timeline.steps_of(number).stop - 1 for number in asking), default=0)

    def select(
        self, pixel_values: torch.Tensor, step: int, generator: torch.Generator, **images: torch.Tensor
    ) -> PatchSelection | None:
        """The visible patches of images at a step counted from 1; None where all are.

        Args:
            pixel_values: (B, C, H, W), or of NaFlex (B, L, P * P * C), whose `spatial_shapes` are in `images`.
        """
        mask = self.mask_at(step)
        if mask.keeps_all:
            return None
        scores = None
        if mask.needs_patch_scores:
            with self.autocast():
                scores = self.teacher.scores(pixel_values, **images)
        options = {"patch_mask": mask, "patch_scores": scores, "progress": self.timeline.progress(step - 1)}
        return self.vision_model.select_patches(pixel_values, generator=generator, **images, **options)

    def after_step(self, step: int) -> None:
        """Let the teacher follow the weights that this step's update gave, as long as it is asked again."""
        if self.teacher is not None and step < self.last_scored_step:
            self.teacher.update(self.vision_model, self.timeline.progress(step))

    def mask_at(self, step: int) -> PatchMask:
        """The mask of a step, with the ratios that it has then."""
        phase = self.timeline.phase_at(step)
        return self._mask_of(phase, self.timeline.progress_in_phase(step) if phase.ramp else 1.0)

    def _mask_of(self, phase: Phase, ramp: float) -> PatchMask:
        """The mask of a phase, its ratios times `ramp`."""
        if phase.patch_mask is None and phase.mask_ratio is None and not phase.ramp:
            return self.vision_model.patch_mask
        config = self.vision_model.config
        options = resolve_patch_mask(config.patch_mask if phase.patch_mask is None else phase.patch_mask)
        if phase.mask_ratio is not None:
            options = set_mask_ratios(options, phase.mask_ratio)
        return build_patch_mask(scale_mask_ratios(options, ramp), patch_size=config.patch_size)

    def _checked_mask(self, phase: Phase) -> PatchMask:
        """The whole mask of a phase. Raises ConfigError where it cannot be built, or has no ratio that the phase could set."""
        with as_config_error(f"{phase.name}: patch_mask", phase.patch_mask):
            mask = self._mask_of(phase, 1.0)
        needs_ratio = "could grow" if phase.ramp else "could be set" if phase.mask_ratio is not None else ""
        if needs_ratio and not ratio_options(options := patch_mask_options(mask)):
            fail(f"{phase.name}: the patch mask {options['name']!r} has no mask_ratio that {needs_ratio}")
        return mask


class AttentionTeacher:
    """An exponential moving average of the vision tower, by whose attention a mask chooses (A-CLIP, arXiv 2212.08653).

    Its momentum grows from the mask's `momentum` to 1 by a half cosine over training.

    Raises:
        ConfigError: the masks' `teacher_image_size` is no multiple of the patch size, or they need different teachers.
    """

    def __init__(self, vision_model: PatchMaskedTower, masks: Sequence[PatchMask]):
        self.mask = masks[0]
        if len({(mask.momentum, mask.teacher_image_size) for mask in masks}) > 1:
            fail("phases: their masks share one teacher, so momentum and teacher_image_size must be the same in all of them")
        patch_size = vision_model.config.patch_size
        if self.mask.teacher_image_size % patch_size:
            fail(f"teacher_image_size={self.mask.teacher_image_size}: must be a multiple of the patch size {patch_size}")
        self.average = MovingAverage(vision_model, self.momentum(0.0)).eval().requires_grad_(False)
        self.average.module.set_attn_implementation("eager")  # the one that shows its weights

    def momentum(self, progress: float) -> float:
        """At a share of training in [0, 1]: 1 - (1 - momentum) (1 + cos(pi progress)) / 2."""
        return 1 - (1 - self.mask.momentum) * (1 + math.cos(math.pi * progress)) / 2

    def update(self, vision_model: PatchMaskedTower, progress: float) -> None:
        self.average.momentum = self.momentum(progress)
        self.average.update_parameters(vision_model)

    def scores(self, pixel_values: torch.Tensor, **images: torch.Tensor) -> torch.Tensor:
        """The attention (B, L) that the average pays to each patch of images."""
        return class_attention(self.average.module, pixel_values, self.mask.teacher_image_size, **images)
