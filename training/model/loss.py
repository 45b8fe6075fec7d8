"""The loss of a run, and the weights of the model that it reads: the logit scale, and the sigmoid loss a bias."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_maskclip import ContrastiveLoss, SigmoidLoss, cached_contrastive_backward
from hf_maskclip.texts import family_of

LossName = Literal["contrastive", "sigmoid"]
# What SigLIP begins with (arXiv 2303.15343): most pairs are none, and say so from the first step on.
FIRST_SCALE, FIRST_BIAS = math.log(10), -10.0


class MeanOverViews(nn.Module):
    """The mean of a loss over V views of each picture, with one caption encoding (A-CLIP, arXiv 2212.08653)."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
        """As the loss, of images (B * V, E), a picture's views one after another, and texts (B, E)."""
        views = len(image_embeds) // len(text_embeds)
        losses = [self.loss(image_embeds[view::views], text_embeds, *numbers) for view in range(views)]
        return losses[0] if views == 1 else torch.stack(losses).mean()


class PairLoss:
    """The loss over the pairs of all processes, of a model's embeddings.

    Args:
        name: `contrastive` or `sigmoid`.
        model: whose logit scale and bias are read anew at each call: a wrapper may replace them.
    """

    def __init__(self, name: LossName, model: PreTrainedModel):
        self.name, self.model = name, model
        self.loss = MeanOverViews(SigmoidLoss() if name == "sigmoid" else ContrastiveLoss())

    def __call__(self, outputs: Any) -> torch.Tensor:
        """The loss, a number, of a model's outputs for this process's batch."""
        bias = [self.model.logit_bias] if self.name == "sigmoid" else []
        return self.loss(outputs.image_embeds, outputs.text_embeds, self.model.logit_scale.exp(), *bias)

    def of_chance(self, pairs: int) -> float:
        """The least loss, over that many pairs, of a model that tells none from another."""
        if self.name == "contrastive" or pairs == 1:
            return math.log(pairs)
        # Each of an image's logits says that one in `pairs` matches, whose entropy the loss takes so many times.
        return math.log(pairs) + (pairs - 1) * math.log(pairs / (pairs - 1))

    def backward_in_chunks(self, wrapped_model: nn.Module, chunks: Sequence[Callable[[], dict[str, Any]]]) -> torch.Tensor:
        """The gradient of a batch that is encoded in chunks; returns the loss."""
        bias = self.model.logit_bias if self.name == "sigmoid" else None
        return cached_contrastive_backward(wrapped_model, self.model.logit_scale, chunks, self.loss, bias)


def prepare_loss(option: str, model: PreTrainedModel, is_fresh: bool) -> PairLoss:
    """The loss that an option names, and the model's weights for it.

    Args:
        option: `auto` is what the model's family was trained with.
        is_fresh: the model has random weights, and begins with SigLIP's scale and bias.
    """
    name: LossName = family_of(model.config).loss if option == "auto" else option  # type: ignore[assignment]
    bias = model._parameters.get("logit_bias")
    if name == "contrastive" and bias is not None:
        bias.requires_grad_(False)  # it has no part in this loss, and DDP would wait for its gradient
    if name == "sigmoid" and bias is None:
        model.register_parameter("logit_bias", nn.Parameter(torch.tensor(FIRST_BIAS, device=model.device)))
    if name == "sigmoid" and is_fresh:
        nn.init.constant_(model.logit_scale, FIRST_SCALE)
        nn.init.constant_(model.logit_bias, FIRST_BIAS)
    return PairLoss(name, model)


def without_added_bias(model: PreTrainedModel) -> PreTrainedModel:
    """The model as its family has it: without a bias that only the loss has read. Ranking does not need it."""
    if family_of(model.config).loss == "contrastive":
        model._parameters.pop("logit_bias", None)
    return model
