"""The optimizer of a run: which weights decay, the learning rate, and averaged weights."""

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from training.config import TrainingConfig


def build_optimizer(model: PreTrainedModel, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW as CLIP has it (arXiv 2103.00020)."""
    groups = parameter_groups(model, config.weight_decay)
    for group in groups:  # from the start on, as in each checkpoint
        group["initial_lr"] = config.learning_rate
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, num_steps: int, warmup_steps: int, steps_done: int
) -> LambdaLR:
    """Linear warm-up, then a half cosine to 0.

    It depends on the options and the step alone. So it is no part of a checkpoint, and a run that goes on with other options
    has the learning rates of these.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = config.learning_rate
    return get_cosine_schedule_with_warmup(optimizer, warmup_steps, num_steps, last_epoch=steps_done - 1)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, embeddings and the logit scale do not."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim >= 2 and "embedding" not in name].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def build_average(model: PreTrainedModel, momentum: float) -> AveragedModel | None:
    """An exponential moving average of the weights, which starts at theirs; None for a momentum of 0."""
    if not momentum:
        return None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(momentum))
    average.update_parameters(model)  # its first update copies; from here on it averages
    return average
