"""Gradients and moments split over the processes by DeepSpeed (ZeRO-2, arXiv 1910.02054); float32 weights stay whole on each.

A launch file with `distributed_type: DEEPSPEED` asks for it. Accelerate does not see it: its wrapper changes the weights inside
`backward()`, before the loop has looked at the loss, and keeps bf16 weights under mixed precision.
"""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import compare_versions, is_deepspeed_available
from transformers.models.clip.modeling_clip import CLIPOutput

from hf_maskclip import MaskCLIPModel
from training.config import TrainingConfig
from training.errors import fail
from training.optimization import clamp_logit_scale

OLDEST = "0.19"  # in which the loop may say when a step is
# What a launch file's `deepspeed_config` may set. `training/accelerate/fsdp2.yaml` is there to split the weights as well.
SETTINGS = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "",
}
TAG = "deepspeed"  # the folder of its files in a checkpoint


def take_over_deepspeed() -> bool:
    """Whether `accelerate launch` asks for DeepSpeed; Accelerate itself is not to see it.

    Raises:
        ConfigError: DeepSpeed is absent or too old, or the launch file asks for what is not supported.
    """
    if os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return False
    if not is_deepspeed_available() or compare_versions("deepspeed", "<", OLDEST):
        fail(f"ACCELERATE_USE_DEEPSPEED=true: needs DeepSpeed {OLDEST} or later (pip install 'deepspeed>={OLDEST}')")
    for name, allowed in SETTINGS.items():
        if (value := os.environ.get(name, allowed)) != allowed:
            fail(f"{name}={value}: must be {allowed or 'empty'}; what else DeepSpeed does follows from the run's options")
    return True


def check_same_kind(checkpoint: Path, uses_deepspeed: bool) -> None:
    """Raise a ConfigError where a run with DeepSpeed would go on from a checkpoint without, or the other way round."""
    if (checkpoint / TAG).is_dir() != uses_deepspeed:
        word = "without" if uses_deepspeed else "with"
        fail(f"resume: {checkpoint} was saved {word} DeepSpeed: go on {word} it, or use another output_dir and the export")


class ZeroEngine(torch.nn.Module):
    """DeepSpeed's engine around a model and the optimizer of its weights, on this process.

    Args:
        model: moves to the process's device; its weights become parts of DeepSpeed's buffers, under their names and in float32.
        optimizer: of the model's weights; it gets this process's part of them.
    """

    def __init__(
        self, model: MaskCLIPModel, optimizer: torch.optim.Optimizer, accelerator: Accelerator, config: TrainingConfig
    ):
        import deepspeed

        super().__init__()
        deepspeed.utils.logger.setLevel("WARNING")
        self.model = model.to(accelerator.device)
        settings = {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "zero_optimization": {"stage": 2},
            "gradient_clipping": config.max_grad_norm,
            "managed_gradient_accumulation": False,  # a step is when the loop says so, after one chunk or several
        }
        # DeepSpeed 0.19 cannot send a scalar round, and sends none with this mark; the seed makes it the same on all processes.
        model.logit_scale.ds_optim_param = True
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def forward(self, *args: Any, **kwargs: Any) -> CLIPOutput:
        return self.engine(*args, **kwargs)

    def step(self) -> None:
        """Clip the gradients, change the weights, forget the gradients, and bound the logit scale."""
        from deepspeed.utils import safe_set_full_fp32_param

        self.engine.step()
        clamp_logit_scale(self.model)
        safe_set_full_fp32_param(self.model.logit_scale, self.model.logit_scale.detach())  # that of the optimizer, too

    def _save(self, models: list[Any], weights: list[Any], folder: str) -> None:
        self.engine.save_checkpoint(folder, tag=TAG, save_latest=False)

    def _load(self, models: list[Any], folder: str) -> None:
        self.engine.load_checkpoint(folder, tag=TAG)
