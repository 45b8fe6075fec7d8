"""Patch masks as pictures.

Shapes: B images, L patches.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torchvision.transforms import v2
from transformers import CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .models.patch_edges import patch_edges
from .models.patch_mask_registry import build_patch_mask
from .models.patch_masking import PatchMask, PatchSelection, patch_grid
from .models.patch_masking_attentive import class_attention
from .models.patch_masking_pgs import PGSPatchMask

DROPPED_GREY = 0.72  # of the dropped patches
INCHES_PER_IMAGE = 1.6


def draw_patch_masks(
    images: list[Image.Image],
    masks: Mapping[str, Mapping[str, Any] | str],
    *,
    image_size: int,
    patch_size: int,
    teacher: CLIPVisionModel | None = None,
    seed: int = 0,
    panels_per_row: int | None = None,
) -> Figure:
    """A figure with a row for each picture: the picture, its edge strength by patch, and what each mask leaves visible.

    Args:
        images: pictures of any size; they are resized and centre-cropped as for CLIP.
        masks: column titles and the masks below them, as names or dicts.
        image_size, patch_size: in pixels.
        teacher: for the attentive mask: a vision tower in evaluation mode with eager attention.
        seed: of the masks' randomness.
        panels_per_row: break the row of a picture after so many panels; by default it is never broken.
    """
    pixels, pixel_values = _to_squares(images, image_size)
    rows, columns = patch_grid(pixel_values, patch_size)
    edges = patch_edges(pixel_values, patch_size).view(-1, rows, columns)

    figure, axes = _panels(len(images), ["image", "edges", *masks], panels_per_row)
    for row, image, edge in zip(axes, pixels, edges, strict=True):
        _show(row[0], image)
        _show_map(row[1], edge)
    for column, spec in enumerate(masks.values(), start=2):
        mask = build_patch_mask(spec, patch_size=patch_size)
        selection = _select(mask, pixel_values, teacher, seed)
        visible = selection.visible(rows * columns)  # (B, L)
        for row, image, seen in zip(axes, pixels, visible, strict=True):
            _show_visible(row[column], image, seen.view(rows, columns), patch_size)
    return figure


def draw_pgs_steps(
    images: list[Image.Image],
    mask: Mapping[str, Any] | str = "pgs",
    *,
    image_size: int,
    patch_size: int,
    seed: int = 0,
    panels_per_row: int | None = None,
) -> Figure:
    """A figure with a row for each picture: the stages of CLIP-PGS on the way to what it leaves visible.

    The stages: the edge strength of each patch; the protected edge patches; the candidates; each patch's largest similarity
    to a candidate, before and after optimal transport; the result. Arguments as in [`draw_patch_masks`].
    """
    pgs = build_patch_mask(mask, patch_size=patch_size)
    if not isinstance(pgs, PGSPatchMask):
        raise ValueError(f"mask={mask!r}: the stages are those of 'pgs'")
    pixels, pixel_values = _to_squares(images, image_size)
    rows, columns = patch_grid(pixel_values, patch_size)
    stages = pgs.stages(pixel_values, generator=torch.Generator().manual_seed(seed))
    visible = pgs.select(stages).visible(rows * columns)  # (B, L)

    titles = ["image", "edge strength", "edge patches, kept", "candidates", "similarity", "after transport (log)", "visible"]
    figure, axes = _panels(len(images), titles, panels_per_row)
    for b, (row, image) in enumerate(zip(axes, pixels, strict=True)):
        _show(row[0], image)
        _show_map(row[1], stages.edge_strength[b].view(rows, columns))
        _show_visible(row[2], image, stages.is_edge[b].view(rows, columns), patch_size)
        _show(row[3], image)
        for candidate in stages.candidates[b].tolist():
            y, x = divmod(candidate, columns)
            corner = (x * patch_size - 0.5, y * patch_size - 0.5)
            row[3].add_patch(Rectangle(corner, patch_size, patch_size, fill=False, edgecolor="red", linewidth=1.2))
        _show_map(row[4], stages.closeness[b].view(rows, columns).clamp(min=0))
        # On a log scale: the candidates themselves take most of the mass.
        balanced = stages.balanced[b].view(rows, columns).clamp(min=1e-6).log()
        _show_map(row[5], (balanced - balanced.min()) / (balanced.max() - balanced.min()).clamp(min=1e-6))
        _show_visible(row[6], image, visible[b].view(rows, columns), patch_size)
    return figure


def grey_out(image: torch.Tensor, visible: torch.Tensor, patch_size: int) -> torch.Tensor:
    """An image (3, H, W) in [0, 1] whose dropped patches are grey; `visible` is a BoolTensor (rows, columns)."""
    pixels = visible.repeat_interleave(patch_size, dim=0).repeat_interleave(patch_size, dim=1)  # (H, W)
    return torch.where(pixels, image, torch.tensor(DROPPED_GREY))


def _to_squares(images: list[Image.Image], image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (B, 3, H, W) in [0, 1], and the same as a model takes them."""
    to_square: Callable = v2.Compose([v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size), v2.PILToTensor()])
    pixels = torch.stack([to_square(image.convert("RGB")) for image in images]) / 255
    return pixels, v2.functional.normalize(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def _select(mask: PatchMask, pixel_values: torch.Tensor, teacher: CLIPVisionModel | None, seed: int) -> PatchSelection:
    generator = torch.Generator().manual_seed(seed)
    if not mask.needs_patch_scores:
        return mask(pixel_values, generator=generator)
    if teacher is None:
        raise ValueError("the attentive mask goes by a teacher's attention: pass teacher=...")
    return mask(pixel_values, generator=generator, patch_scores=class_attention(teacher, pixel_values))


def _panels(num_rows: int, titles: list[str], panels_per_row: int | None) -> tuple[Figure, Any]:
    """A figure and its panels, a row for each picture; titled above the first, or above each where rows are broken."""
    per_row = panels_per_row or len(titles)
    lines = -(-len(titles) // per_row)  # of each picture
    figure = Figure(figsize=(INCHES_PER_IMAGE * per_row, INCHES_PER_IMAGE * num_rows * lines + 0.5), layout="constrained")
    axes = figure.subplots(num_rows * lines, per_row, squeeze=False).reshape(num_rows, -1)[:, : len(titles)]
    for axis in figure.axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row in axes if lines > 1 else axes[:1]:
        for axis, title in zip(row, titles, strict=True):
            axis.set_title(title, fontsize=9)
    return figure, axes


def _show(axis: Axes, image: torch.Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy())


def _show_map(axis: Axes, values: torch.Tensor) -> None:
    axis.imshow(values.numpy(), cmap="magma", vmin=0, vmax=1)


def _show_visible(axis: Axes, image: torch.Tensor, visible: torch.Tensor, patch_size: int) -> None:
    _show(axis, grey_out(image, visible, patch_size))
    axis.set_xlabel(f"{visible.float().mean():.0%} kept", fontsize=7, labelpad=1)
