"""Weights, gradients and moments split over the processes (FSDP2), for models that do not fit on each device as a whole.

FSDP2 cannot shard a scalar such as CLIP's `logit_scale`, and Accelerate's plugin can neither leave one out nor run on CPUs. So
this module calls `fully_shard` itself. The scalar stays whole on every process.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import is_torch_version
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_maskclip import MaskCLIPModel
from hf_maskclip.distributed import world_size
from hf_maskclip.errors import fail
from training.config import TrainingConfig
from training.model.optimization import build_optimizer
from training.parallel.interface import Parallel, autocast_forward, check_is_clip, check_process_group

# Whole tensors on the CPU of every process, from and to the parts of all.
WHOLE = StateDictOptions(full_state_dict=True)


def fsdp_requested() -> bool:
    """Whether the launch file asks for FSDP (`distributed_type: FSDP`). Accelerate itself is not to see it."""
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"


class FullyShardedParallel(Parallel):
    title = "FSDP"

    def wrap(self, config: TrainingConfig) -> None:
        check_shardable(self.model, config)
        check_process_group(self.title)
        autocast_forward(self.model, self.accelerator)
        self.wrapped_model = shard(self.model, self.accelerator)
        self.optimizer = build_optimizer(self.model, config)
        self.accelerator.register_for_checkpointing(ShardedState(self.model, self.optimizer))

    def whole_model(self, model: MaskCLIPModel) -> MaskCLIPModel:
        copy = MaskCLIPModel(model.config)
        copy.load_state_dict(get_model_state_dict(model, options=WHOLE))
        return copy.to(model.logit_scale.device)

    @staticmethod
    def has_saved(checkpoint: Path) -> bool:
        return (checkpoint / "custom_checkpoint_0.pkl").is_file() and not (checkpoint / "optimizer.bin").is_file()


def check_shardable(model: MaskCLIPModel, config: TrainingConfig) -> None:
    """Raise a ConfigError for options that need whole weights at every step, and for a PyTorch that is too old."""
    check_is_clip("FSDP", model, config)
    if is_torch_version("<", "2.7"):
        fail(f"FSDP: needs PyTorch 2.7, this is {torch.__version__}; use DDP")
    name = config.patch_mask["name"] if isinstance(config.patch_mask, dict) else "of the model"
    for option, is_used in {
        "ema_momentum": config.ema_momentum,
        f"patch_mask {name}": model.vision_model.patch_mask.needs_whole_weights,
        "compile": config.compile,
        "lora_rank": config.lora_rank,
    }.items():
        if is_used:
            fail(f"{option}: needs whole weights on every process, which FSDP splits; use DDP")


def shard(model: MaskCLIPModel, accelerator: Accelerator) -> MaskCLIPModel:
    """Move a model to this process's device and split its weights over all processes, layer by layer, in place.

    With `fsdp_reshard_after_forward: false` in the launch file they stay whole from the forward to the backward pass.
    """
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    model.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (world_size(),))
    for layer in (*model.vision_model.encoder.layers, *model.text_model.encoder.layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard, ignored_params={model.logit_scale})
    model.logit_scale.register_post_accumulate_grad_hook(_average_gradient)
    return model


def _average_gradient(parameter: torch.Tensor) -> None:
    dist.all_reduce(parameter.grad)
    parameter.grad /= world_size()


class ShardedState:
    """The weights and moments of all processes as one state, for Accelerate's checkpoints."""

    def __init__(self, model: MaskCLIPModel, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer, options=WHOLE)
        return {"model": model_state, "optimizer": optimizer_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=WHOLE,
        )
