"""Patch masks as pictures: panels of what a mask leaves visible and why, and figures of these panels.

Shapes: B images, L patches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torchvision.transforms import v2
from transformers import PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .models.patch_edges import patch_edges
from .models.patch_mask_registry import build_patch_mask
from .models.patch_masking import PatchMask, PatchSelection, patch_grid
from .models.patch_masking_attentive import class_attention
from .models.patch_masking_pgs import PGSPatchMask

DROPPED_GREY = 0.72  # of the dropped patches
FRAME_GREY = "0.6"  # of the line round a panel, without which a white picture has no border
INCHES_PER_IMAGE = 1.6


@dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Args:
        title: what it shows.
        pixels: (3, H, W) in [0, 1].
        visible: BoolTensor (rows, columns), the patches that a mask keeps; None where the panel shows no mask.
        boxes: the left and upper corners, in pixels, of patches that are marked.
        patch_size: the side of the marked patches, in pixels.
    """

    title: str
    pixels: torch.Tensor
    visible: torch.Tensor | None = None
    boxes: tuple[tuple[int, int], ...] = ()
    patch_size: int = 0


def draw_patch_masks(images: list[Image.Image], masks: Mapping[str, Mapping[str, Any] | str], **options: Any) -> Figure:
    """A figure with a row for each picture; arguments as in [`mask_panels`]."""
    return draw_panels(mask_panels(images, masks, **options))


def draw_pgs_steps(images: list[Image.Image], mask: Mapping[str, Any] | str = "pgs", **options: Any) -> Figure:
    """A figure with a row for each picture; arguments as in [`pgs_panels`]."""
    return draw_panels(pgs_panels(images, mask, **options))


def mask_panels(
    images: list[Image.Image],
    masks: Mapping[str, Mapping[str, Any] | str],
    *,
    image_size: int,
    patch_size: int,
    teacher: PreTrainedModel | None = None,
    statistics: tuple[Sequence[float], Sequence[float]] = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    seed: int = 0,
) -> list[list[Panel]]:
    """For each picture: the picture, its edge strength by patch, and what each mask leaves visible.

    Args:
        images: pictures of any size; they are resized and centre-cropped as for CLIP.
        masks: the panels' titles and their masks, as names or dicts.
        image_size, patch_size: in pixels.
        teacher: for the attentive mask: a vision tower in evaluation mode with eager attention.
        statistics: mean and standard deviation by which pixels are normalised, as the teacher's image processor does.
        seed: of the masks' randomness.
    """
    pixels, pixel_values = _to_squares(images, image_size, *statistics)
    rows, columns = patch_grid(pixel_values, patch_size)
    edges = patch_edges(pixel_values, patch_size).view(-1, rows, columns)
    panels = [
        [Panel("image", image), Panel("edges", _heat(edge, patch_size))] for image, edge in zip(pixels, edges, strict=True)
    ]
    for title, spec in masks.items():
        mask = build_patch_mask(spec, patch_size=patch_size)
        visible = _select(mask, pixel_values, teacher, seed).visible(rows * columns)  # (B, L)
        for row, image, seen in zip(panels, pixels, visible, strict=True):
            row.append(_masked(title, image, seen.view(rows, columns), patch_size))
    return panels


def pgs_panels(
    images: list[Image.Image],
    mask: Mapping[str, Any] | str = "pgs",
    *,
    image_size: int,
    patch_size: int,
    seed: int = 0,
) -> list[list[Panel]]:
    """For each picture: the stages of CLIP-PGS on the way to what it leaves visible.

    The stages: the edge strength of each patch; the protected edge patches; the candidates; each patch's largest similarity
    to a candidate, before and after optimal transport; the result. Arguments as in [`mask_panels`].
    """
    pgs = build_patch_mask(mask, patch_size=patch_size)
    if not isinstance(pgs, PGSPatchMask):
        raise ValueError(f"mask={mask!r}: the stages are those of 'pgs'")
    pixels, pixel_values = _to_squares(images, image_size)
    rows, columns = patch_grid(pixel_values, patch_size)
    stages = pgs.stages(pixel_values, generator=torch.Generator().manual_seed(seed))
    visible = pgs.select(stages).visible(rows * columns)  # (B, L)

    def panels_of(b: int, image: torch.Tensor) -> list[Panel]:
        edge_strength, is_edge, closeness, balanced, kept = (
            values[b].view(rows, columns)
            for values in (stages.edge_strength, stages.is_edge, stages.closeness, stages.balanced, visible)
        )
        corners = [divmod(candidate, columns) for candidate in stages.candidates[b].tolist()]
        # On a log scale: the candidates themselves take most of the mass.
        mass = balanced.clamp(min=1e-6).log()
        mass = (mass - mass.min()) / (mass.max() - mass.min()).clamp(min=1e-6)
        return [
            Panel("image", image),
            Panel("edge strength", _heat(edge_strength, patch_size)),
            _masked("edge patches, kept", image, is_edge, patch_size),
            Panel("candidates", image, None, tuple((x * patch_size, y * patch_size) for y, x in corners), patch_size),
            Panel("similarity", _heat(closeness.clamp(min=0), patch_size)),
            Panel("after transport (log)", _heat(mass, patch_size)),
            _masked("visible", image, kept, patch_size),
        ]

    return [panels_of(b, image) for b, image in enumerate(pixels)]


def draw_panels(panels: Sequence[Sequence[Panel]]) -> Figure:
    """A figure of panels, a row for each picture, titled above the first."""
    height, width = len(panels), len(panels[0])
    figure = Figure(figsize=(INCHES_PER_IMAGE * width, INCHES_PER_IMAGE * height + 0.5), layout="constrained")
    for number, (axes, row) in enumerate(zip(figure.subplots(height, width, squeeze=False), panels, strict=True)):
        for axis, panel in zip(axes, row, strict=True):
            axis.imshow(panel.pixels.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color=FRAME_GREY, linewidth=0.5)
            if number == 0:
                axis.set_title(panel.title, fontsize=9)
            if panel.visible is not None:
                axis.set_xlabel(f"{panel.visible.float().mean():.0%} kept", fontsize=7, labelpad=1)
            for x, y in panel.boxes:
                size = panel.patch_size
                axis.add_patch(Rectangle((x - 0.5, y - 0.5), size, size, fill=False, edgecolor="red", linewidth=1.2))
    return figure


def grey_out(image: torch.Tensor, visible: torch.Tensor, patch_size: int) -> torch.Tensor:
    """An image (3, H, W) in [0, 1] whose dropped patches are grey; `visible` is a BoolTensor (rows, columns)."""
    return torch.where(_to_pixels(visible, patch_size), image, torch.tensor(DROPPED_GREY))


def _masked(title: str, image: torch.Tensor, visible: torch.Tensor, patch_size: int) -> Panel:
    return Panel(title, grey_out(image, visible, patch_size), visible)


def _heat(values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The colours (3, H, W) of values (rows, columns) in [0, 1], from black to light yellow."""
    colours = torch.tensor(colormaps["magma"](values.numpy())[..., :3]).permute(2, 0, 1).float()
    return _to_pixels(colours, patch_size)


def _to_pixels(values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Values (..., rows, columns) of patches as those of their pixels (..., H, W)."""
    return values.repeat_interleave(patch_size, dim=-2).repeat_interleave(patch_size, dim=-1)


def _to_squares(
    images: list[Image.Image],
    image_size: int,
    mean: Sequence[float] = OPENAI_CLIP_MEAN,
    deviation: Sequence[float] = OPENAI_CLIP_STD,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (B, 3, H, W) in [0, 1], and the same as a model takes them."""
    to_square: Callable = v2.Compose([v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size), v2.PILToTensor()])
    pixels = torch.stack([to_square(image.convert("RGB")) for image in images]) / 255
    return pixels, v2.functional.normalize(pixels, list(mean), list(deviation))


def _select(mask: PatchMask, pixel_values: torch.Tensor, teacher: PreTrainedModel | None, seed: int) -> PatchSelection:
    generator = torch.Generator().manual_seed(seed)
    if not mask.needs_patch_scores:
        return mask(pixel_values, generator=generator)
    if teacher is None:
        raise ValueError("the attentive mask goes by a teacher's attention: pass teacher=...")
    return mask(pixel_values, generator=generator, patch_scores=class_attention(teacher, pixel_values))
