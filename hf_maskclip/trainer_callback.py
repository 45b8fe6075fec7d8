"""What `training/train.py` does with a mask from step to step, for the Trainer of 🤗 Transformers.

Shapes: B images of this process, C channels.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from .errors import fail
from .losses import clamp_logit_scale
from .mask_schedule import MaskSchedule, seed_of
from .models.masked_tower import PatchMaskedTower
from .models.patch_masking import PatchSelection, check_integer, check_range
from .phases import Timeline, phases_of_schedule

logger = logging.get_logger(__name__)

TEACHER_FILE = "patch_mask_teacher.safetensors"  # in each checkpoint of a mask that has a teacher


class PatchMaskCallback(TrainerCallback):
    """Lets the patch mask of a model go by the step of a Trainer, as `training/train.py` does.

    The mask knows the share of training that is done, each process draws patches of its own, the `attentive` mask gets its
    teacher (saved with each checkpoint), and the logit scale of a CLIP stays at most ln 100. It works in the Trainer of
    sentence-transformers, too. Arguments that the model is called with, such as `patch_selection`, come first. Between two
    steps and after the last one the mask is the model's alone.

    Args:
        mask_schedule: the share of the steps over which the mask ratios grow linearly from 0, in [0, 1].
        unmasked_tuning_steps: the last steps, which see whole images.

    Example:

        model = MaskCLIPModel.from_pretrained("runs/quickstart/export", patch_mask="pgs")
        Trainer(model, args, train_dataset=pairs, callbacks=[PatchMaskCallback(mask_schedule=0.3)]).train()

    Raises:
        ValueError: an option out of range. At the start of training: a model without a mask, a schedule for a mask that has no
            ratio, or weights that are split over processes, with a mask that reads them.
    """

    def __init__(self, mask_schedule: float = 0.0, unmasked_tuning_steps: int = 0):
        self.mask_schedule = check_range("mask_schedule", mask_schedule, 0, 1)
        self.unmasked_tuning_steps = check_integer("unmasked_tuning_steps", unmasked_tuning_steps, 0, 2**31)
        self.vision_model: PatchMaskedTower | None = None
        self.step, self.process = 1, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs):
        self.vision_model, self.process = masked_tower(model), args.process_index
        check_integer("unmasked_tuning_steps", self.unmasked_tuning_steps, 0, state.max_steps)
        check_whole_weights(self.vision_model, args)
        self.vision_model.training_selector = None  # of a training that failed; the teacher is a copy
        phases = phases_of_schedule(self.mask_schedule, self.unmasked_tuning_steps / state.max_steps)
        self.schedule = MaskSchedule(self.vision_model, Timeline(phases, state.max_steps))
        if state.global_step and self.schedule.teacher is not None:
            self._load_teacher(checkpoint_of(args, state))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.step = state.global_step + 1
        # For the step alone: the Trainer does not tell its callbacks of an exception, such as one in data, saving or reports.
        self.vision_model.training_selector = self.select

    @torch.compiler.disable
    def select(self, pixel_values: torch.Tensor, **images: torch.Tensor) -> PatchSelection | None:
        """The visible patches of images at this step; arguments as in [`MaskSchedule.select`].

        The draw starts from PyTorch's own generator: what replays that, such as a gradient cache, gets the same patches again.
        """
        drawn = int(torch.randint(2**32, ()))  # on the CPU, the same on all processes, which the Trainer seeds alike
        generator = torch.Generator(pixel_values.device).manual_seed(seed_of(drawn, self.process))
        return self.schedule.select(pixel_values, self.step, generator, **images)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs):
        self.vision_model.training_selector = None
        clamp_logit_scale(model)
        self.schedule.after_step(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.schedule.teacher is not None and args.should_save:
            save_file(self.schedule.teacher.average.state_dict(), checkpoint_of(args, state) / TEACHER_FILE)

    def _load_teacher(self, checkpoint: Path) -> None:
        file = checkpoint / TEACHER_FILE
        if file.is_file():
            self.schedule.teacher.average.load_state_dict(load_file(file))
        else:
            logger.warning(f"{file}: is not there; the teacher of the patch mask starts anew from the model's weights")


def masked_tower(model: nn.Module) -> PatchMaskedTower:
    """The one masked vision tower in a model, whatever is around it. Raises ConfigError where there is none."""
    towers = [module for module in model.modules() if isinstance(module, PatchMaskedTower)]
    if len(towers) != 1:
        fail(f"PatchMaskCallback: {type(model).__name__} has {len(towers)} vision towers with a patch mask, must have one")
    if towers[0].patch_mask.keeps_all:
        fail("PatchMaskCallback: the model has no patch mask, give it one by set_patch_mask or patch_mask=...")
    return towers[0]


def check_whole_weights(vision_model: PatchMaskedTower, args: TrainingArguments) -> None:
    """Raise a ConfigError where processes hold parts of weights that the mask has to read."""
    splits = "FSDP" if args.fsdp else "DeepSpeed ZeRO-3" if is_deepspeed_zero3_enabled() else None
    if splits and vision_model.patch_mask.needs_whole_weights:
        name = vision_model.config.patch_mask["name"]
        fail(f"patch mask {name!r}: needs whole weights on every process, which {splits} splits; use DDP")


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the Trainer's checkpoint at this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
