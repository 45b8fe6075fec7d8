"""Gradients and moments split over the processes by DeepSpeed (ZeRO-2, arXiv 1910.02054); float32 weights stay whole on each.

Accelerate does not see it. Its wrapper changes the weights inside `backward()`, before the loop has looked at the loss, and it
keeps bf16 weights under mixed precision.
"""

import os
from pathlib import Path
from typing import Any

from accelerate.utils import compare_versions, is_deepspeed_available

from hf_maskclip.errors import fail
from hf_maskclip.losses import clamp_logit_scale
from training.config import TrainingConfig
from training.model.optimization import build_optimizer
from training.parallel.interface import Parallel, autocast_forward, check_is_clip, check_process_group

OLDEST = "0.19"  # in which the loop may say when a step is
# What a launch file's `deepspeed_config` may set. `training/launch/fsdp2.yaml` is there to split the weights as well.
SETTINGS = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "",
}
TAG = "deepspeed"  # the folder of its files in a checkpoint


def deepspeed_requested() -> bool:
    """Whether the launch file asks for DeepSpeed (`distributed_type: DEEPSPEED`). Accelerate itself is not to see it.

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


class DeepSpeedParallel(Parallel):
    """DeepSpeed's engine. The model's weights become parts of its buffers, under their names and in float32."""

    title = "DeepSpeed"

    def wrap(self, config: TrainingConfig) -> None:
        import deepspeed

        if config.lora_rank:
            fail(f"lora_rank={config.lora_rank}: adapters have few moments, which DeepSpeed would share; use DDP")
        check_process_group(self.title)
        check_is_clip(self.title, self.model, config)
        deepspeed.utils.logger.setLevel("WARNING")
        autocast_forward(self.model, self.accelerator)
        self.model.to(self.accelerator.device)
        self.optimizer = build_optimizer(self.model, config)
        settings = {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "zero_optimization": {"stage": 2},
            "gradient_clipping": config.max_grad_norm,
            "managed_gradient_accumulation": False,  # a step is when the loop says so, after one chunk or several
        }
        # DeepSpeed 0.19 cannot send a scalar round, and sends none with this mark; the seed makes it the same on all processes.
        self.model.logit_scale.ds_optim_param = True
        self.wrapped_model, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        self.accelerator.register_save_state_pre_hook(self._save)
        self.accelerator.register_load_state_pre_hook(self._load)

    def step(self) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        self.wrapped_model.step()
        clamp_logit_scale(self.model)
        # DeepSpeed keeps a float32 copy in the optimizer; clamp that as well.
        safe_set_full_fp32_param(self.model.logit_scale, self.model.logit_scale.detach())

    @staticmethod
    def has_saved(checkpoint: Path) -> bool:
        return (checkpoint / TAG).is_dir()

    def _save(self, models: list[Any], weights: list[Any], folder: str) -> None:
        self.wrapped_model.save_checkpoint(folder, tag=TAG, save_latest=False)

    def _load(self, models: list[Any], folder: str) -> None:
        saved_by = len([*Path(folder, TAG).glob("*_optim_states.pt")])
        if saved_by != self.accelerator.num_processes:
            fail(f"resume: {folder} was saved by {saved_by} processes of DeepSpeed, which goes on with as many only")
        self.wrapped_model.load_checkpoint(folder, tag=TAG)
