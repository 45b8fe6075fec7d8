"""Weights, gradients and moments split over the processes (FSDP2), for models that do not fit on each device as a whole.

Accelerate gives FSDP2 no model with a scalar parameter, and gives it none on CPUs, so the few calls to PyTorch are made here; a
launch file with `distributed_type: FSDP` asks for them. CLIP's `logit_scale`, a scalar, stays whole on every process.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_maskclip import MaskCLIPModel
from hf_maskclip.losses import world_size
from training.config import TrainingConfig
from training.errors import fail

# Whole tensors on the CPU of every process, from and to the parts of all.
WHOLE = StateDictOptions(full_state_dict=True)


def take_over_sharding() -> bool:
    """Whether `accelerate launch` asks for FSDP; Accelerate itself is not to see it."""
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_shardable(config: TrainingConfig) -> None:
    """Raise a ConfigError for options that need whole weights at every step."""
    mask = config.patch_mask if isinstance(config.patch_mask, dict) else {}
    for name, is_used in {
        "ema_momentum": config.ema_momentum,
        "patch_mask attentive": mask.get("name") == "attentive",
        "embedding_weight": mask.get("embedding_weight"),
        "compile": config.compile,
    }.items():
        if is_used:
            fail(f"{name}: needs whole weights on every process, which FSDP splits; use DDP")


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


def whole_model(model: MaskCLIPModel) -> MaskCLIPModel:
    """A copy with whole weights, on every process. All of them have to call this."""
    copy = MaskCLIPModel(model.config)
    copy.load_state_dict(get_model_state_dict(model, options=WHOLE))
    return copy.to(model.logit_scale.device)


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
