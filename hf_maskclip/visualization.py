"""Patch masks as pictures.

Shapes: B images, L patches.
"""

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms import v2
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .patch_edges import patch_edges
from .patch_masking import build_patch_mask, patch_grid

DROPPED_GREY = 0.72  # of the dropped patches
INCHES_PER_IMAGE = 1.6


def draw_patch_masks(
    images: list[Image.Image],
    masks: Mapping[str, Mapping[str, Any] | str],
    *,
    image_size: int,
    patch_size: int,
    seed: int = 0,
) -> Figure:
    """A figure with a row for each picture: the picture, its edge strength by patch, and what each mask leaves visible.

    Args:
        images: pictures of any size; they are resized and centre-cropped as for CLIP.
        masks: column titles and the masks below them, as names or dicts.
        image_size, patch_size: in pixels.
        seed: of the masks' randomness.
    """
    to_square = v2.Compose([v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size), v2.PILToTensor()])
    pixels = torch.stack([to_square(image.convert("RGB")) for image in images]) / 255  # (B, 3, H, W)
    pixel_values = v2.functional.normalize(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    rows, columns = patch_grid(pixel_values, patch_size)
    edges = patch_edges(pixel_values, patch_size).view(-1, rows, columns)

    figure = Figure(figsize=(INCHES_PER_IMAGE * (2 + len(masks)), INCHES_PER_IMAGE * len(images) + 0.5), layout="constrained")
    axes = figure.subplots(len(images), 2 + len(masks), squeeze=False)
    for row, image, edge in zip(axes, pixels, edges, strict=True):
        _show(row[0], image)
        row[1].imshow(edge.numpy(), cmap="magma", vmin=0, vmax=1)
    for column, (_, spec) in enumerate(masks.items(), start=2):
        generator = torch.Generator().manual_seed(seed)
        selection = build_patch_mask(spec, patch_size=patch_size)(pixel_values, generator=generator)
        visible = selection.visible(rows * columns)  # (B, L)
        for row, image, seen in zip(axes, pixels, visible, strict=True):
            _show(row[column], grey_out(image, seen.view(rows, columns), patch_size))
            row[column].set_xlabel(f"{seen.float().mean():.0%} kept", fontsize=7, labelpad=1)
    for axis, title in zip(axes[0], ["image", "edges", *masks], strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def grey_out(image: torch.Tensor, visible: torch.Tensor, patch_size: int) -> torch.Tensor:
    """An image (3, H, W) in [0, 1] whose dropped patches are grey; `visible` is a BoolTensor (rows, columns)."""
    pixels = visible.repeat_interleave(patch_size, dim=0).repeat_interleave(patch_size, dim=1)  # (H, W)
    return torch.where(pixels, image, torch.tensor(DROPPED_GREY))


def _show(axis: Axes, image: torch.Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy())
