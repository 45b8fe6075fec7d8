"""What a vision tower is asked that it cannot do, or that is probably not meant: one line each.

Shapes: B batch, C channels, K kept patches.
"""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from .patch_masking import PatchSelection, whole_patch_grid

# Keywords of Transformers that speak of masks, too.
_NO_PATCH_MASKS = ("attention_mask", "bool_masked_pos")
# What encodes a batch twice, first without gradients. For inference it sets the evaluation mode itself.
_GRADIENT_CACHES = ("hf_maskclip.losses", "sentence_transformers", "grad_cache")


def check_no_typo(kwargs: Mapping[str, Any]) -> None:
    """Raise a TypeError for a keyword that is nearly one of ours, which Transformers would pass over in silence."""
    for key in kwargs:
        if ("mask" in key or "patch" in key) and key not in _NO_PATCH_MASKS:
            known = "patch_selection, apply_patch_mask, patch_mask, patch_scores"
            raise TypeError(f"unexpected keyword argument {key!r}: those about patches are {known}")


def warn_of_masks_without_gradients() -> None:
    """Warn that a model in training mode masks where no gradient is taken, except in the first pass of a gradient cache."""
    if torch.compiler.is_compiling():
        return
    frame = inspect.currentframe()
    while frame is not None:
        if f"{frame.f_globals.get('__name__')}.".startswith(tuple(f"{name}." for name in _GRADIENT_CACHES)):
            return
        frame = frame.f_back
    warnings.warn(
        "a model in training mode masks patches at random, here without gradients: call model.eval() for whole images,"
        " or pass apply_patch_mask=True if masked features are wanted",
        stacklevel=2,
    )


def check_selection(selection: PatchSelection, pixel_values: torch.Tensor, patch_size: int) -> None:
    """Raise a ValueError where a selection does not fit images (B, C, H, W).

    What can be seen without waiting for a device is checked everywhere; the indices themselves on a CPU alone.
    """
    rows, columns = whole_patch_grid(pixel_values, patch_size)
    _check_shapes(selection, len(pixel_values), rows * columns)
    if selection.indices.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_indices(selection, torch.full((len(pixel_values),), rows * columns))


def check_selection_of(selection: PatchSelection, num_patches: torch.LongTensor) -> None:
    """As [`check_selection`], for images whose numbers of patches (B,) differ."""
    if num_patches.device.type != "cpu" or torch.compiler.is_compiling():
        return
    _check_shapes(selection, len(num_patches), int(num_patches.max()))
    if selection.indices.device.type == "cpu":
        _check_indices(selection, num_patches)


def _check_shapes(selection: PatchSelection, batch: int, most: int) -> None:
    if not isinstance(selection, PatchSelection):
        raise ValueError(f"patch_selection of type {type(selection).__name__}: must be a PatchSelection")
    indices, lengths = selection.indices, selection.lengths
    if indices.ndim != 2 or indices.dtype not in (torch.int64, torch.int32) or not 1 <= indices.shape[1] <= most:
        found = f"{tuple(indices.shape)} of {indices.dtype}"
        raise ValueError(f"patch_selection.indices {found}: must be whole numbers (B, K), K from 1 to {most}")
    if len(indices) != batch or (lengths is not None and lengths.shape != (batch,)):
        shape = None if lengths is None else tuple(lengths.shape)
        raise ValueError(f"patch_selection of {len(indices)} images, lengths {shape}: there are {batch} images")


def _check_indices(selection: PatchSelection, num_patches: torch.Tensor) -> None:
    """Raise a ValueError for an index that is none of the image's `num_patches` (B,), on a CPU."""
    indices, lengths = selection.indices, selection.lengths
    if bool((indices < 0).any()) or bool((indices >= num_patches[:, None]).any()):
        raise ValueError(f"patch_selection.indices: must be from 0 to {int(num_patches.max()) - 1}, the patches of an image")
    if lengths is not None and not 1 <= int(lengths.min()) <= int(lengths.max()) <= indices.shape[1]:
        raise ValueError(f"patch_selection.lengths: must be from 1 to {indices.shape[1]}, the columns of indices")
