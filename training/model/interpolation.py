"""A model between the weights that a run began with and the tuned ones (WiSE-FT, arXiv 2109.01903)."""

import copy

import torch
from transformers import PreTrainedModel

Weights = dict[str, torch.Tensor]


def between(first: Weights, tuned: PreTrainedModel, share: float) -> PreTrainedModel:
    """A new model with `share * tuned + (1 - share) * first`. A weight that is the same in both stays so to the last bit.

    Args:
        first: under the keys of the tuned model, on any device.
    """
    weights = {key: torch.lerp(first[key].to(weight.device), weight, share) for key, weight in tuned.state_dict().items()}
    with torch.random.fork_rng(devices=[]):  # random weights are drawn, and replaced at once
        model = type(tuned)(copy.deepcopy(tuned.config))
    model.load_state_dict(weights)
    return model.to(tuned.device)
