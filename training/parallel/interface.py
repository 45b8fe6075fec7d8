"""What the loop and the run know of how several processes train one model."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import PreTrainedModel

from hf_maskclip import MaskCLIPModel
from hf_maskclip.errors import fail
from hf_maskclip.losses import clamp_logit_scale
from training.config import TrainingConfig


class Parallel(ABC):
    """A model on this process's device, in the wrapper that makes the gradients of all processes one, and its optimizer.

    Building one moves and wraps the model, and registers what checkpoints have to hold.

    Attributes:
        wrapped_model: what the loop calls and calls `backward` through.
        optimizer: of the model's weights.
    """

    title: ClassVar[str]
    wrapped_model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, config: TrainingConfig):
        """Raises ConfigError for a model or an option that cannot be trained in this way."""
        self.model, self.accelerator, self.max_grad_norm = model, accelerator, config.max_grad_norm
        self.wrap(config)

    @abstractmethod
    def wrap(self, config: TrainingConfig) -> None:
        """Set `wrapped_model` and `optimizer`."""

    def step(self) -> None:
        """Clip the gradients, change the weights by them, forget them, and bound the logit scale. All processes call this."""
        if self.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.wrapped_model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clamp_logit_scale(self.model)

    def whole_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with all of its weights. All processes call this."""
        return model

    @staticmethod
    @abstractmethod
    def has_saved(checkpoint: Path) -> bool:
        """Whether a checkpoint is one of a run of this kind."""


def check_process_group(title: str) -> None:
    """Raise a ConfigError where a run that is to be split over processes was started as a single one."""
    if not (dist.is_available() and dist.is_initialized()):
        fail(f"{title}: splits a model over processes, and this run is a single one; start it by python training/train.py")


def check_is_clip(title: str, model: PreTrainedModel, config: TrainingConfig) -> None:
    """Raise a ConfigError for what only whole weights are tried with: another family than CLIP, and the sigmoid loss."""
    if not isinstance(model, MaskCLIPModel):
        fail(f"{title}: splits CLIP alone so far, not a {type(model).__name__}; use DDP")
    if config.loss == "sigmoid":
        fail(f"loss={config.loss!r}: its bias is not split by {title}; use DDP")


def autocast_forward(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Run a model's forward pass under the run's autocast, as Accelerate does where it wraps a model."""
    if accelerator.mixed_precision == "bf16":
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
