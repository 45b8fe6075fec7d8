"""Training pictures for SigLIP 2 NaFlex: each in its own aspect ratio, cut into at most so many patches.

Shapes: B pictures, n patches of a picture, L the most of any, P patch side in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches, get_image_size_for_max_num_patches


class GridPatches(NamedTuple):
    """A picture as patches, uint8 (n, P * P * 3), and the rows and columns that they lie in, n = rows * columns."""

    patches: torch.Tensor
    rows: int
    columns: int


@dataclass(frozen=True)
class NaFlexTransform:
    """A random crop of the picture's own shape, and flip; resized as the image processor does, to `max_num_patches` or fewer.

    Args:
        crop_scale: the least share of the picture's area in the crop; 1 is off.
        flip: the probability of a horizontal flip.
    """

    patch_size: int
    max_num_patches: int
    crop_scale: float
    flip: float

    def __call__(self, picture: Image.Image) -> GridPatches:
        share = math.sqrt(float(torch.empty(()).uniform_(self.crop_scale, 1.0)))  # of each side
        size = [max(1, round(share * side)) for side in (picture.height, picture.width)]
        picture = v2.RandomHorizontalFlip(self.flip)(v2.RandomCrop(size)(picture))
        height, width = get_image_size_for_max_num_patches(*size, self.patch_size, self.max_num_patches)
        pixels = F.resize(F.pil_to_tensor(picture), [height, width], v2.InterpolationMode.BILINEAR, antialias=True)
        patches = convert_image_to_patches(pixels, self.patch_size)
        return GridPatches(patches, height // self.patch_size, width // self.patch_size)


def stack_grids(pictures: Sequence[GridPatches], max_num_patches: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """Pixels uint8 (B, L, P * P * 3), zeros in the padding, L = `max_num_patches`; and rows and columns (B, 2)."""
    first = pictures[0].patches
    pixels = first.new_zeros(len(pictures), max_num_patches, first.shape[1])
    for row, picture in enumerate(pictures):
        pixels[row, : len(picture.patches)] = picture.patches
    return pixels, torch.tensor([[picture.rows, picture.columns] for picture in pictures])


def normalize_grids(
    pixels: torch.Tensor, spatial_shapes: torch.LongTensor, mean: Sequence[float], std: Sequence[float]
) -> dict[str, torch.Tensor]:
    """The arguments of NaFlex's vision tower of uint8 pixels (B, L, P * P * 3): normalised, and zero in the padding."""
    is_there = torch.arange(pixels.shape[1], device=pixels.device) < spatial_shapes.prod(dim=1)[:, None]  # (B, L)
    means, stds = (torch.tensor(numbers).to(pixels.device, non_blocking=True) for numbers in (mean, std))
    values = (pixels.float().unflatten(2, (-1, 3)) / 255 - means) / stds  # (B, L, P * P, 3)
    values = values.flatten(2) * is_there[..., None]
    return {"pixel_values": values, "pixel_attention_mask": is_there.int(), "spatial_shapes": spatial_shapes}
