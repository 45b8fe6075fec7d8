"""The optimizer of a run: which weights decay, the learning rate of each tower, and averaged weights."""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from hf_maskclip.averaging import MovingAverage
from hf_maskclip.phases import Timeline
from training.config import TrainingConfig
from training.model.freezing import tower_of


def build_optimizer(model: PreTrainedModel, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW as CLIP has it (arXiv 2103.00020)."""
    groups = parameter_groups(model, config.weight_decay)
    set_peaks(groups, config)  # from the start on, as in each checkpoint
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainingConfig, timeline: Timeline, warmup_steps: int) -> LambdaLR:
    """Linear warm-up to the peak of each group, then a half cosine to 0, over the samples of the run.

    It depends on the options and the step alone. So it is no part of a checkpoint, and a run that goes on with other options
    has the learning rates of these. By samples it has no jump where other processes go on with a run.
    """
    warmup = warmup_steps * timeline.samples_per_step

    def share_of_peak(steps_done: int) -> float:
        seen = timeline.samples_seen(steps_done)
        if seen < warmup:
            return seen / warmup
        return (1 + math.cos(math.pi * (seen - warmup) / max(1, timeline.samples - warmup))) / 2

    set_peaks(optimizer.param_groups, config)
    return LambdaLR(optimizer, share_of_peak, last_epoch=timeline.steps_done - 1)


def set_peaks(groups: list[dict[str, Any]], config: TrainingConfig) -> None:
    """Give each group of `parameter_groups` the learning rate of its tower, for a schedule to scale."""
    peaks = {"vision": config.learning_rate_vision, "text": config.learning_rate_text}
    for group in groups:
        group["initial_lr"] = peaks.get(group["tower"]) or config.learning_rate


def learning_rates(schedule: LambdaLR, config: TrainingConfig) -> dict[str, float]:
    """The learning rates of the next step, by the options that were given for them."""
    peaks = {"learning_rate_vision": config.learning_rate_vision, "learning_rate_text": config.learning_rate_text}
    given = {"learning_rate": config.learning_rate} | {name: peak for name, peak in peaks.items() if peak}
    share = schedule.lr_lambdas[0](schedule.last_epoch)
    return {name: peak * share for name, peak in given.items()}


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The weights that are trained, by tower. Matrices decay; biases, norms, embeddings and the logit scale do not."""
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and "embedding" not in name
            groups.setdefault((tower_of(name), decays), []).append(parameter)
    decay = {True: weight_decay, False: 0.0}
    return [{"params": weights, "weight_decay": decay[d], "tower": tower} for (tower, d), weights in groups.items()]


def build_average(model: PreTrainedModel, momentum: float) -> MovingAverage | None:
    """An exponential moving average of the weights; None for a momentum of 0."""
    return MovingAverage(model, momentum) if momentum else None
