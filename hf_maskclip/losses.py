"""The losses over the pairs of all processes, their gradient for batches that do not fit into memory, and CLIP's bound on the
logit scale.

Shapes: B pairs of this process, W processes, R rows of a piece of the logits, E projection size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from .distributed import gather_numbers, gather_with_gradient, rank, world_size

MAX_LOGIT_SCALE = math.log(100)  # CLIP's bound, without which training can diverge
# More logits than this are made in pieces, twice: those of 4,096 pairs on one process, 64 MB in float32.
LOGITS_AT_ONCE = 2**24


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> None:
    """Keep the logit scale of a model, or of the CLIP in it, at most at its bound. SigLIP's, beside a bias, has none.

    One that is frozen stays as it is.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        is_scale = name.rpartition(".")[2] == "logit_scale" and parameter.requires_grad
        if is_scale and f"{name.removesuffix('scale')}bias" not in parameters:
            parameter.clamp_(max=MAX_LOGIT_SCALE)


def check_equal_batches(features: torch.Tensor) -> None:
    """Raise on every process where their batches differ in size, which collective calls would answer by hanging.

    Raises:
        ValueError: with the sizes, in order of rank.
    """
    sizes = gather_numbers(len(features))
    if len(set(sizes)) > 1:
        raise ValueError(f"batches of {sizes} pairs on the processes: they must be equal (drop the last ones)")


def sum_over_rows(loss_of: Callable[[slice], torch.Tensor], num_rows: int, num_columns: int) -> torch.Tensor:
    """The sum of a loss over the rows of a matrix of logits, in pieces where the whole would be large.

    A piece is made again for its gradient, so that memory holds the logits of one piece.

    Args:
        loss_of: the sum over some rows.
    """
    rows = max(1, LOGITS_AT_ONCE // num_columns)
    if rows >= num_rows:
        return loss_of(slice(0, num_rows))
    pieces = [slice(first, min(first + rows, num_rows)) for first in range(0, num_rows, rows)]
    # Nothing in it is drawn at random.
    losses = [checkpoint(loss_of, piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.stack(losses).sum()


class ContrastiveLoss(nn.Module):
    """CLIP's loss (arXiv 2103.00020): each image finds its caption among all captions, and each caption its image.

    On W processes each computes the logits of its own B rows against all W * B columns (local loss, gather with gradient). The
    mean over processes, of the loss and of the gradients that DDP averages, is that of the whole batch on one process.

    Example:

        outputs = model(input_ids=input_ids, pixel_values=pixel_values)
        loss = ContrastiveLoss()(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp())
    """

    def forward(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
        """The loss in float32, a 0-d tensor.

        Args:
            image_embeds: (B, E), unit length; B is the same on every process.
            text_embeds: (B, E), unit length.
            logit_scale: the factor on the cosines (the exponential of CLIP's parameter), 0-d.

        Raises:
            ValueError: the processes have batches of different sizes.
        """
        image_embeds, text_embeds = image_embeds.float(), text_embeds.float()
        check_equal_batches(image_embeds)
        all_images, all_texts = gather_with_gradient(image_embeds), gather_with_gradient(text_embeds)  # (W * B, E)
        first = rank() * len(image_embeds)
        targets = torch.arange(first, first + len(image_embeds), device=image_embeds.device)

        def loss_of(rows: slice, embeds: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
            logits = logit_scale.float() * embeds[rows] @ others.t()  # (R, W * B)
            return F.cross_entropy(logits, targets[rows], reduction="sum")

        sums = [
            sum_over_rows(partial(loss_of, embeds=embeds, others=others), len(embeds), len(others))
            for embeds, others in ((image_embeds, all_texts), (text_embeds, all_images))
        ]
        return (sums[0] / len(image_embeds) + sums[1] / len(image_embeds)) / 2


class _Shift(torch.autograd.Function):
    """What the process before this one in the ring holds (B, E); the gradient goes back to it."""

    @staticmethod
    def forward(ctx, features: torch.Tensor) -> torch.Tensor:
        return _exchange(features, towards=1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _exchange(gradient, towards=-1)


def _exchange(tensor: torch.Tensor, towards: int) -> torch.Tensor:
    """Send a tensor to the process `towards` ranks further, and return what came from the other side."""
    received = torch.empty_like(tensor)
    sending = dist.P2POp(dist.isend, tensor.contiguous(), (rank() + towards) % world_size())
    receiving = dist.P2POp(dist.irecv, received, (rank() - towards) % world_size())
    for work in dist.batch_isend_irecv([sending, receiving]):
        work.wait()
    return received


class SigmoidLoss(nn.Module):
    """SigLIP's loss (Zhai et al. 2023, arXiv 2303.15343): each pair of image and caption is a match or not, by itself.

    On W processes the captions go round in a ring, so that no process holds more than B x B logits at a time. The mean over
    processes, of the loss and of the gradients that DDP averages, is that of the whole batch on one process.

    Example:

        outputs = model(input_ids=input_ids, pixel_values=pixel_values)
        loss = SigmoidLoss()(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp(), model.logit_bias)
    """

    def forward(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor,
    ) -> torch.Tensor:
        """The loss in float32, a 0-d tensor: the mean over images of the sum over all captions.

        Args:
            image_embeds, text_embeds, logit_scale: as for [`ContrastiveLoss`].
            logit_bias: what is added to all logits, one number. SigLIP's models have it as a weight. CLIP's have none: give
                such a model an `nn.Parameter` of -10, and train it with the others. Ranking does not need it.
        """
        image_embeds, text_embeds = image_embeds.float(), text_embeds.float()
        check_equal_batches(image_embeds)
        numbers = (logit_scale.float(), logit_bias.float())
        loss = self._chunk_loss(image_embeds, text_embeds, *numbers, are_pairs=True)
        for _ in range(world_size() - 1):
            text_embeds = _Shift.apply(text_embeds)
            loss = loss + self._chunk_loss(image_embeds, text_embeds, *numbers, are_pairs=False)
        return loss

    def _chunk_loss(self, image_embeds, text_embeds, logit_scale, logit_bias, are_pairs: bool) -> torch.Tensor:
        """The loss of images with the captions (B, E) of one process. Of its own, row i of both is a pair."""

        def loss_of(rows: slice) -> torch.Tensor:
            logits = logit_scale * image_embeds[rows] @ text_embeds.t() + logit_bias  # (R, B)
            matches = -torch.ones_like(logits)  # 1 for a pair, else -1
            if are_pairs:
                matches.diagonal(rows.start).fill_(1)
            return -F.logsigmoid(matches * logits).sum()

        return sum_over_rows(loss_of, len(image_embeds), len(text_embeds)) / len(image_embeds)


def cached_contrastive_backward(
    model: nn.Module,
    logit_scale: nn.Parameter,
    chunks: Sequence[Callable[[], dict[str, Any]]],
    loss: nn.Module,
    logit_bias: nn.Parameter | None = None,
) -> torch.Tensor:
    """The gradient of one large batch, computed in chunks (GradCache, Gao et al. 2021, arXiv 2101.06983); returns the loss.

    Each chunk is encoded twice: without gradients for its embeddings, of which the loss of the whole batch is taken; then with
    them, and the loss's gradient flows on from its embeddings. Both passes see the same random numbers of PyTorch's own
    generators, and so the same patches.

    Args:
        model: gives `image_embeds` and `text_embeds` (B / k, E) for the arguments of a chunk; DDP waits for the last chunk.
        logit_scale: the model's parameter, before its exponential.
        chunks: k functions that return the arguments of `model` for a part of the batch; each is called twice, so that no more
            than one chunk need be on the device.
        loss: such as [`ContrastiveLoss`].
        logit_bias: the model's parameter, for a loss that takes it, such as [`SigmoidLoss`].

    Example:

        cached_contrastive_backward(model, model.logit_scale, chunks, ContrastiveLoss())
        optimizer.step()
    """
    states, embeds = [], []
    for make_arguments in chunks:
        arguments = make_arguments()
        states.append(_RandomState(arguments))
        with torch.no_grad():
            outputs = model(**arguments)
        embeds.append((outputs.image_embeds, outputs.text_embeds))
    weights = [logit_scale] if logit_bias is None else [logit_scale, logit_bias]
    value, images, texts, of_weights = _loss_of_embeds(loss, embeds, weights)  # gradients (B, E)
    # Of several views of a picture, a chunk has more images than texts.
    parts = [embeds_of.split([len(chunk[kind]) for chunk in embeds]) for kind, embeds_of in enumerate((images, texts))]
    gradients = list(zip(*parts, strict=True))
    for number, (make_arguments, state, of_chunk) in enumerate(zip(chunks, states, gradients, strict=True), start=1):
        is_last = number == len(chunks)
        no_sync = nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()
        with no_sync, state.replayed():
            outputs = model(**make_arguments())
            # Its gradient is the loss's, by the chain rule.
            surrogate = (outputs.image_embeds * of_chunk[0]).sum() + (outputs.text_embeds * of_chunk[1]).sum()
            for weight, gradient in of_weights if is_last else ():
                surrogate = surrogate + (weight * gradient).sum()
            surrogate.backward()
    return value.detach()


def _loss_of_embeds(
    loss: nn.Module, embeds: list[tuple[torch.Tensor, torch.Tensor]], weights: list[nn.Parameter]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[nn.Parameter, torch.Tensor]]]:
    """The loss of a batch whose chunks have these embeddings (B / k, E), its gradients of images and texts (B, E), and the one
    of each weight beside it.

    Raises:
        ValueError: a loss that does not depend on all of them.
    """
    images, texts = (torch.cat(part).detach().requires_grad_() for part in zip(*embeds, strict=True))
    scale, *bias = copies = [weight.detach().clone().requires_grad_() for weight in weights]
    value = loss(images, texts, scale.exp(), *bias)
    value.backward()
    of_weights = [(weight, copy.grad) for weight, copy in zip(weights, copies, strict=True) if copy.grad is not None]
    if images.grad is None or texts.grad is None or len(of_weights) < len(weights):
        raise ValueError(f"{type(loss).__name__}: must depend on the embeddings of images and texts, and on scale and bias")
    return value, images.grad, texts.grad, of_weights


class _RandomState:
    """The state of the random number generators of the CPU and of the devices of some tensors, to be used again."""

    def __init__(self, arguments: dict[str, Any]):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*arguments.values())

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield
