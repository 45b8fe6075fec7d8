"""The contract that every patch mask keeps, and the registry that finds one by name.

Shapes: B batch, C channels, L patches of an image, K kept patches, P patch side in pixels, D width.
A *patch mask* says which patches of an image are encoded; an *attention mask* is Transformers'. `mask_ratio` is always the
fraction that is removed, in [0, 1).
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn


class PatchSelection(NamedTuple):
    """Which patches of a batch of images are encoded.

    Attributes:
        indices: LongTensor (B, K). The first `lengths[b]` entries of row b are its visible patches, distinct and ascending in
            raster order; what follows is padding (it repeats the row's first entry).
        lengths: LongTensor (B,), the number of visible patches of each image, or None where it is K for all of them.
    """

    indices: torch.LongTensor
    lengths: torch.LongTensor | None = None

    def valid(self) -> torch.BoolTensor:
        """BoolTensor (B, K): True for the entries of `indices` that are not padding."""
        if self.lengths is None:
            return torch.ones_like(self.indices, dtype=torch.bool)
        positions = torch.arange(self.indices.shape[1], device=self.indices.device)
        return positions < self.lengths[:, None]  # (B, K)

    def visible(self, num_patches: int) -> torch.BoolTensor:
        """BoolTensor (B, L): True for the patches that are encoded."""
        # Padding goes to an extra column L, which is cut off again.
        columns = self.indices.masked_fill(~self.valid(), num_patches)
        visible = torch.zeros(len(columns), num_patches + 1, dtype=torch.bool, device=columns.device)
        return visible.scatter_(1, columns, True)[:, :num_patches]

    def kept_share(self, num_patches: int) -> torch.Tensor:
        """0-d float tensor: visible patches over all patches of the batch."""
        if self.lengths is None:
            return torch.tensor(self.indices.shape[1] / num_patches)
        return self.lengths.float().mean() / num_patches


class PatchMask(nn.Module, ABC):
    """Base class of the masks: a module without parameters that selects the visible patches of each image.

    A mask of your own subclasses this, implements `forward`, and is made known by `register_patch_mask`. The keyword arguments
    of its `__init__` other than `patch_size` are its options: they must have defaults, and they are what `config.json` keeps.
    """

    citation: ClassVar[str] = ""
    # Whether `forward` takes and needs `patch_scores` (B, L), how much a teacher attends to each patch. The training program
    # keeps a teacher for subclasses of `AttentivePatchMask`.
    needs_patch_scores: ClassVar[bool] = False

    def __init__(self, *, patch_size: int = 16):
        super().__init__()
        self.patch_size = patch_size

    @property
    def needs_patch_embeds(self) -> bool:
        """Whether `forward` reads `patch_embeds`."""
        return False

    @abstractmethod
    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_embeds: torch.Tensor | None = None,
        *,
        progress: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> PatchSelection:
        """Select the visible patches.

        Args:
            pixel_values: (B, C, H, W), normalised as for the model. H and W are multiples of the patch size.
            patch_embeds: (B, L, D), the patch embeddings, for masks that compare those too.
            progress: the share of training that is done, in [0, 1].
            generator: the source of randomness, on the device of `pixel_values`; PyTorch's global one by default.
        """


def keep_count(num_patches: int, mask_ratio: float) -> int:
    """How many of `num_patches` stay when the fraction `mask_ratio` is removed: L - round(L * ratio), at least 1.

    The product is exact in the ratio's decimal form, so 0.1 steps never lose a patch to binary rounding.
    """
    return max(1, num_patches - round(num_patches * Fraction(str(mask_ratio))))


def patch_grid(pixel_values: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """The rows and columns of patches in images (B, C, H, W). Raises where the patch size does not divide the image."""
    height, width = pixel_values.shape[-2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"image of {height} x {width} pixels: both sides must be multiples of the patch size {patch_size}")
    return height // patch_size, width // patch_size


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images (B, C, H, W) into patches (B, L, C, P * P) in raster order, in float32: always a copy."""
    rows, columns = patch_grid(pixel_values, patch_size)
    batch, channels = pixel_values.shape[:2]
    patches = pixel_values.float().reshape(batch, channels, rows, patch_size, columns, patch_size)
    patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, P, P)
    return patches.clone(memory_format=torch.contiguous_format).view(batch, rows * columns, channels, patch_size * patch_size)


def keep_first(order: torch.Tensor, num_kept: int) -> PatchSelection:
    """Keep the first `num_kept` patches of each row of `order` (B, L), which lists all patches; one count for all images."""
    return PatchSelection(order[:, :num_kept].sort(dim=1).values)


def keep_first_of_each(order: torch.Tensor, num_kept: torch.Tensor, max_kept: int) -> PatchSelection:
    """Keep the first `num_kept[b]` patches of row b of `order` (B, L), which lists all patches.

    Args:
        order: (B, L).
        num_kept: LongTensor (B,), each in [1, max_kept].
        max_kept: K of the result. A bound that is known without looking at the data spares a wait for the device.
    """
    num_patches = order.shape[1]
    padding = torch.arange(max_kept, device=order.device) >= num_kept[:, None]  # (B, K)
    indices = order[:, :max_kept].masked_fill(padding, num_patches).sort(dim=1).values  # padding sorts to the end
    return PatchSelection(torch.where(indices == num_patches, indices[:, :1], indices), num_kept)


def sort_with_random_ties(priority: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Indices (B, L) that sort each row of `priority` (B, L) ascending; equal ones come in the random order of `noise` (B, L).

    A plain sort leaves ties in raster order, so that of equal patches the upper ones would always go first.
    """
    shuffled = noise.argsort(dim=1)
    return shuffled.gather(1, priority.gather(1, shuffled).argsort(dim=1, stable=True))


def check_ratio(name: str, value: float) -> float:
    """Return a mask ratio that lies in [0, 1); raise a ValueError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: must be a number in [0, 1), the fraction of patches that is removed")
    return value


def check_range(name: str, value: float, low: float, high: float) -> float:
    """Return a number that lies in [low, high]; raise a ValueError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: must be a number from {low:g} to {high:g}")
    return value


def check_integer(name: str, value: int, low: int, high: int) -> int:
    """Return a whole number that lies in [low, high]; raise a ValueError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: must be a whole number from {low} to {high}")
    return value


def check_choice(name: str, value: Any, choices: tuple) -> Any:
    """Return a value that is one of `choices`; raise a ValueError that names it otherwise."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")
    return value


_registered: dict[str, type[PatchMask]] = {}


def built_in_patch_masks() -> dict[str, type[PatchMask]]:
    """The masks of this package by name."""
    # Imported here because the masks import the contract from this module.
    from .patch_masking_attentive import AttentivePatchMask
    from .patch_masking_block import BlockPatchMask
    from .patch_masking_cluster import ClusterPatchMask
    from .patch_masking_gaussian import GaussianPatchMask
    from .patch_masking_grid import GridPatchMask
    from .patch_masking_none import NoPatchMask
    from .patch_masking_pgs import PGSPatchMask
    from .patch_masking_random import RandomPatchMask

    return {
        "none": NoPatchMask,
        "random": RandomPatchMask,
        "gaussian": GaussianPatchMask,
        "block": BlockPatchMask,
        "grid": GridPatchMask,
        "cluster": ClusterPatchMask,
        "attentive": AttentivePatchMask,
        "pgs": PGSPatchMask,
    }


def patch_masks() -> dict[str, type[PatchMask]]:
    """All known masks by name: the built-in ones, then those of `register_patch_mask`."""
    return built_in_patch_masks() | _registered


def register_patch_mask(name: str, mask_class: type[PatchMask]) -> None:
    """Make a mask of your own available as `patch_mask={"name": name, ...}`.

    Raises:
        ValueError: the name belongs to a built-in mask.
        TypeError: the class is not a `PatchMask`, or an option of its `__init__` has no default.
    """
    if not (isinstance(mask_class, type) and issubclass(mask_class, PatchMask)):
        raise TypeError(f"{mask_class!r}: a patch mask must be a subclass of hf_maskclip.PatchMask")
    if name in built_in_patch_masks():
        raise ValueError(f"patch mask name {name!r} is built in; register yours under another name")
    required = [key for key, default in _option_defaults(mask_class).items() if default is inspect.Parameter.empty]
    if required:
        raise TypeError(f"{mask_class.__name__}: option {required[0]!r} needs a default value")
    _registered[name] = mask_class


def _option_defaults(mask_class: type[PatchMask]) -> dict[str, Any]:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(mask_class).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "patch_size" and p.kind not in variadic}


def resolve_patch_mask(spec: str | Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """Spell out a patch mask: `"pgs"` or `{"name": "pgs", ...}` becomes the dict with every option of that mask.

    Raises:
        ValueError: unknown name, unknown option, or a value out of range; the message says what is allowed.
    """
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    given |= overrides
    name = given.pop("name", None)
    known = patch_masks()
    if name not in known:
        hint = "; masks of your own are made known by hf_maskclip.register_patch_mask"
        raise ValueError(f"unknown patch mask {name!r}: must be one of {', '.join(known)}{hint}")
    defaults = _option_defaults(known[name])
    for key in given:
        if key not in defaults:
            raise ValueError(f"patch mask {name!r} has no option {key!r}: its options are {', '.join(defaults) or 'none'}")
    options = defaults | given
    known[name](**options)  # the mask checks the values
    return {"name": name, **options}


def scale_mask_ratios(options: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The dict of a patch mask with each option that ends in `mask_ratio` times `factor` in [0, 1]: a step of a ramp."""
    return {key: value * factor if key.endswith("mask_ratio") else value for key, value in options.items()}


def build_patch_mask(spec: str | Mapping[str, Any], *, patch_size: int = 16, **overrides: Any) -> PatchMask:
    """Build a patch mask from its name or its dict.

    Args:
        spec: `"pgs"`, or `{"name": "pgs", "min_mask_ratio": 0.3, ...}`; options left out take their defaults.
        patch_size: the side of a patch in pixels.
        overrides: options that replace those of `spec`.

    Raises:
        ValueError: unknown name, unknown option, or a value out of range; the message says what is allowed.
    """
    options = resolve_patch_mask(spec, **overrides)
    return patch_masks()[options.pop("name")](patch_size=patch_size, **options)
