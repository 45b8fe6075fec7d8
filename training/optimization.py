"""The optimizer of a run: which weights decay, the learning rate, CLIP's bound on the logit scale, and averaged weights."""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_cosine_schedule_with_warmup

from hf_maskclip import MaskCLIPModel
from training.config import TrainingConfig

MAX_LOGIT_SCALE = math.log(100)  # CLIP's bound, without which training can diverge


def build_optimizer(
    model: MaskCLIPModel, config: TrainingConfig, num_steps: int, warmup_steps: int
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW as CLIP has it (arXiv 2103.00020), and its schedule: linear warm-up, then a half cosine to 0."""
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup_steps, num_steps)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, embeddings and the logit scale do not."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim >= 2 and "embedding" not in name].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def build_average(model: MaskCLIPModel, momentum: float) -> AveragedModel | None:
    """An exponential moving average of the weights, which starts at theirs; None for a momentum of 0."""
    if not momentum:
        return None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(momentum))
    average.update_parameters(model)  # its first update copies; from here on it averages
    return average


@torch.no_grad()
def clamp_logit_scale(model: MaskCLIPModel) -> None:
    model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
