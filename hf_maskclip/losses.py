"""The contrastive loss over the pairs of all processes.

Shapes: B pairs of this process, W processes, E projection size.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F


class _GatherWithGradient(torch.autograd.Function):
    """Concatenate equal-sized tensors (B, E) of all processes to (W * B, E); the backward pass sums what each one used."""

    @staticmethod
    def forward(ctx, features: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, features.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_gradient(features: torch.Tensor) -> torch.Tensor:
    """Features (B, E) of every process in order of rank, (W * B, E), with gradients that flow back to each process.

    `accelerator.gather` carries no gradient, which is why this exists. Without a process group it is the identity.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return features
    return _GatherWithGradient.apply(features)


class ContrastiveLoss(nn.Module):
    """CLIP's loss (arXiv 2103.00020): each image finds its caption among all captions, and each caption its image.

    On W processes each computes the logits of its own B rows against all W * B columns (local loss, gather with gradient). The
    mean over processes, of the loss and of the gradients that DDP averages, is that of the whole batch on one process.
    """

    def forward(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
        """The loss in float32, a 0-d tensor.

        Args:
            image_embeds: (B, E), unit length; B is the same on every process.
            text_embeds: (B, E), unit length.
            logit_scale: the factor on the cosines (the exponential of CLIP's parameter), 0-d.
        """
        image_embeds, text_embeds = image_embeds.float(), text_embeds.float()
        all_images, all_texts = gather_with_gradient(image_embeds), gather_with_gradient(text_embeds)  # (W * B, E)
        first = dist.get_rank() * len(image_embeds) if len(all_images) > len(image_embeds) else 0
        targets = torch.arange(first, first + len(image_embeds), device=image_embeds.device)
        logits_per_image = logit_scale.float() * image_embeds @ all_texts.t()  # (B, W * B)
        logits_per_text = logit_scale.float() * text_embeds @ all_images.t()  # (B, W * B)
        return (F.cross_entropy(logits_per_image, targets) + F.cross_entropy(logits_per_text, targets)) / 2
