"""Masks without chance, for inference: a picture's own pixels seed its mask, so its batch has no part in it.

Shapes: B batch, C channels, L patches of an image, K kept patches; b images of a part of the batch.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from .patch_masking import PatchSelection

# Chooses from one picture (1, C, H, W), with its scores (1, L) or None, by a generator.
Choice = Callable[[torch.Tensor, torch.Tensor | None, torch.Generator], PatchSelection]


@torch.compiler.disable
def select_by_picture(choose: Choice, pixel_values: torch.Tensor, patch_scores: torch.Tensor | None = None) -> PatchSelection:
    """Choose from each picture by itself, with a generator that its pixels seed.

    The same pixels get the same patches: alone, in any batch and on any process. What a mask measures over a batch, such as
    cluster's automatic threshold, is measured of one picture.

    Pixels count to the last bit. Another precision, or a resize with other last bits, gives another draw. So does another kind
    of device, whose generator differs.

    The pixels are read on the host. So this waits for the device, and ends a graph that is compiled.

    Args:
        choose: with the mask, from one picture.
        pixel_values: (B, C, H, W), as the model gets them.
        patch_scores: (B, L), or None.

    Raises:
        ValueError: scores of another number of pictures.
    """
    if patch_scores is not None and len(patch_scores) != len(pixel_values):
        raise ValueError(f"patch_scores of {len(patch_scores)} images: there are {len(pixel_values)} images")
    chosen = []
    for row, seed in enumerate(map(seed_of, pixel_values.detach().cpu())):
        # A copy, so that its place in a batch's memory has no part in the last bits of sums.
        picture = pixel_values[row : row + 1].clone(memory_format=torch.contiguous_format)
        scores = None if patch_scores is None else patch_scores[row : row + 1]
        chosen.append(choose(picture, scores, torch.Generator(pixel_values.device).manual_seed(seed)))
    rows = torch.arange(len(chosen), device=pixel_values.device).split(1)
    return in_order(list(zip(rows, chosen, strict=True)), len(chosen))


def seed_of(picture: torch.Tensor) -> int:
    """The hash of a picture (C, H, W) in its own precision, a whole number below 2^63."""
    values = picture.contiguous().view(-1).view(torch.uint8).numpy()
    return hashed_seed(values)


def hashed_seed(content: Any) -> int:
    """A seed below 2^63 for bytes: a hash, for a generator on a CPU reads the lower 32 bits of a seed alone."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def in_order(chosen: list[tuple[torch.Tensor, PatchSelection]], batch: int) -> PatchSelection:
    """One selection for a batch, of those that were made for some of its images (b,) each.

    Where all of them keep one number of patches, it has no lengths, and nothing is packed.
    """
    if len(chosen) == 1:
        return chosen[0][1]
    is_fixed = all(s.lengths is None for _, s in chosen) and len({s.indices.shape[1] for _, s in chosen}) == 1
    most = max(selection.indices.shape[1] for _, selection in chosen)
    first = chosen[0][1].indices
    indices, lengths = first.new_zeros(batch, most), first.new_zeros(batch)
    for members, selection in chosen:
        missing = most - selection.indices.shape[1]
        # Padding repeats the first patch, which every image has.
        padded = torch.cat([selection.indices, selection.indices[:, :1].expand(-1, missing)], dim=1)  # (b, K)
        counts = selection.valid().sum(dim=1) if selection.lengths is None else selection.lengths
        indices.index_copy_(0, members, padded)
        lengths.index_copy_(0, members, counts.to(lengths.dtype))
    return PatchSelection(indices, None if is_fixed else lengths)
