"""A model between the weights that a run began with and the tuned ones (WiSE-FT, arXiv 2109.01903)."""

import torch
from transformers import PreTrainedModel

from training.model.copying import copy_of

Weights = dict[str, torch.Tensor]


@torch.no_grad()
def between(first: Weights, tuned: PreTrainedModel, share: float) -> PreTrainedModel:
    """A new model with `share * tuned + (1 - share) * first`. A weight that is the same in both stays so to the last bit.

    Args:
        first: under the keys of the tuned model, on any device. What it lacks, the bias of a loss, is the tuned one.
    """
    model = copy_of(tuned)
    weights = model.state_dict()
    for key, weight in first.items():
        weights[key].copy_(torch.lerp(weight.to(weights[key].device), weights[key], share))
    return model
