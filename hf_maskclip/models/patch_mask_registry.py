"""The patch masks by name: those of this package, of installed packages, and your own.

A mask of this package is a file of its own and a row of `BUILT_IN`. A mask of an installed package is an entry point:

    [project.entry-points."hf_maskclip.patch_masks"]
    checkerboard = "my_package:CheckerboardMask"
"""

import difflib
import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .patch_masking import PatchMask
from .patch_masking_attentive import AttentivePatchMask
from .patch_masking_block import BlockPatchMask
from .patch_masking_cluster import ClusterPatchMask
from .patch_masking_gaussian import GaussianPatchMask
from .patch_masking_grid import GridPatchMask
from .patch_masking_leverage import LeveragePatchMask
from .patch_masking_none import NoPatchMask
from .patch_masking_pgs import PGSPatchMask
from .patch_masking_random import RandomPatchMask

ENTRY_POINTS = "hf_maskclip.patch_masks"
BUILT_IN: dict[str, type[PatchMask]] = {
    "none": NoPatchMask,
    "random": RandomPatchMask,
    "gaussian": GaussianPatchMask,
    "block": BlockPatchMask,
    "grid": GridPatchMask,
    "cluster": ClusterPatchMask,
    "attentive": AttentivePatchMask,
    "pgs": PGSPatchMask,
    "leverage": LeveragePatchMask,
}
_registered: dict[str, type[PatchMask]] = {}

# What names a mask: a name, a dict of its options, or the mask.
PatchMaskSpec = str | Mapping[str, Any] | PatchMask


def patch_masks() -> dict[str, type[PatchMask]]:
    """All known masks by name: the built-in ones, those of installed packages, and those of `register_patch_mask`.

    Raises:
        ValueError: an installed package offers a mask that cannot be imported, or is none.
    """
    return BUILT_IN | {name: _load(name) for name in _of_installed_packages()} | _registered


@cache
def _of_installed_packages() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


@cache
def _load(name: str) -> type[PatchMask]:
    """The mask of an installed package."""
    entry = _of_installed_packages()[name]
    try:
        mask_class = entry.load()
        check_patch_mask_class(name, mask_class)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        package = entry.dist.name if entry.dist else "an installed package"
        raise ValueError(f"patch mask {name!r} of {package}: cannot be used ({error})") from error
    return mask_class


def forget_installed_packages() -> None:
    """Look for entry points anew, after packages were installed in a running process."""
    _of_installed_packages.cache_clear()
    _load.cache_clear()


def find_patch_mask(name: str) -> type[PatchMask]:
    """The class of a mask. Raises ValueError for a name that no mask has; the message has the known ones."""
    for masks in (BUILT_IN, _registered):
        if isinstance(name, str) and name in masks:
            return masks[name]
    if isinstance(name, str) and name in _of_installed_packages():
        return _load(name)
    known = [*BUILT_IN, *_of_installed_packages(), *_registered]
    close = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "your own is known once its module is imported (--import MODULE)"
    raise ValueError(f"unknown patch mask {name!r}: must be one of {', '.join(known)}; {hint}")


def register_patch_mask(name: str, mask_class: type[PatchMask]) -> None:
    """Make a mask of your own available as `patch_mask={"name": name, ...}`.

    Raises:
        ValueError: the name belongs to a built-in mask.
        TypeError: the class is not a `PatchMask`, or an option of its `__init__` has no default.
    """
    check_patch_mask_class(name, mask_class)
    _registered[name] = mask_class


def check_patch_mask_class(name: str, mask_class: type[PatchMask]) -> None:
    """Raise what [`register_patch_mask`] raises."""
    if not (isinstance(mask_class, type) and issubclass(mask_class, PatchMask)):
        raise TypeError(f"{mask_class!r}: a patch mask must be a subclass of hf_maskclip.PatchMask")
    if name in BUILT_IN:
        raise ValueError(f"patch mask name {name!r} is built in; register yours under another name")
    required = [key for key, default in _option_defaults(mask_class).items() if default is inspect.Parameter.empty]
    if required:
        raise TypeError(f"{mask_class.__name__}: option {required[0]!r} needs a default value")


def _option_defaults(mask_class: type[PatchMask]) -> dict[str, Any]:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(mask_class).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "patch_size" and p.kind not in variadic}


def resolve_patch_mask(spec: PatchMaskSpec, **overrides: Any) -> dict[str, Any]:
    """Spell out a patch mask: `"pgs"`, `{"name": "pgs", ...}` or a mask becomes the dict with every option of that mask.

    Raises:
        ValueError: unknown name, unknown option, a value out of range, or something else than a mask; the message says what is
            allowed.
    """
    given = _as_dict(spec) | overrides
    name: Any = given.pop("name", None)
    mask_class = find_patch_mask(name)
    defaults = _option_defaults(mask_class)
    for key in given:
        if key not in defaults:
            raise ValueError(f"patch mask {name!r} has no option {key!r}: its options are {', '.join(defaults) or 'none'}")
    options = defaults | given
    mask_class(**options)  # the mask checks the values
    return {"name": name, **options}


def _as_dict(spec: Any) -> dict[str, Any]:
    if isinstance(spec, str):
        return {"name": spec}
    if isinstance(spec, PatchMask):
        return patch_mask_options(spec)
    if isinstance(spec, Mapping):
        return dict(spec)
    raise ValueError(f"patch_mask={spec!r}: must be a name, a mapping such as {{'name': 'pgs'}}, or a PatchMask")


def patch_mask_options(mask: PatchMask) -> dict[str, Any]:
    """The name and the options of a mask, by which `build_patch_mask` builds it again.

    Raises:
        ValueError: its class is not registered.
    """
    known = {mask_class: name for name, mask_class in patch_masks().items()}
    if type(mask) not in known:
        raise ValueError(f"patch mask {type(mask).__name__}: its class is unknown, make it known by register_patch_mask")
    return {"name": known[type(mask)]} | {key: getattr(mask, key) for key in _option_defaults(type(mask))}


def scale_mask_ratios(options: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The dict of a patch mask with each option that ends in `mask_ratio` times `factor` in [0, 1]: a step of a ramp.

    A ceiling grows with the ratios that it bounds.
    """
    return dict(options) | {key: options[key] * factor for key in ratio_options(options)}


def set_mask_ratios(spec: PatchMaskSpec, mask_ratio: float) -> dict[str, Any]:
    """The dict of a patch mask that removes this fraction: each option that ends in `mask_ratio` is set to it.

    A mask that has none stays as it is; [`ratio_options`] tells.

    Raises:
        ValueError: as [`resolve_patch_mask`].
    """
    options = resolve_patch_mask(spec)
    return resolve_patch_mask(options | dict.fromkeys(ratio_options(options), mask_ratio))


def ratio_options(options: Mapping[str, Any]) -> list[str]:
    """The options of a patch mask that are a mask ratio. A ceiling that is not there (None) is none, and stays away."""
    return [key for key, value in options.items() if key.endswith("mask_ratio") and value is not None]


def build_patch_mask(spec: PatchMaskSpec, *, patch_size: int = 16, **overrides: Any) -> PatchMask:
    """Build a patch mask from its name or its dict.

    Args:
        spec: `"pgs"`, `{"name": "pgs", "min_mask_ratio": 0.3, ...}` (options left out take their defaults), or a mask.
        patch_size: the side of a patch in pixels.
        overrides: options that replace those of `spec`.

    Example:

        mask = build_patch_mask("pgs", patch_size=16, max_mask_ratio=0.7)
        mask(pixel_values).lengths  # (B,), the visible patches of each image

    Raises:
        ValueError: unknown name, unknown option, or a value out of range; the message says what is allowed.
    """
    if isinstance(spec, PatchMask) and spec.patch_size != patch_size:
        raise ValueError(f"patch mask {spec}: is made for another patch size than {patch_size}")
    if isinstance(spec, PatchMask) and not overrides:
        return spec
    options = resolve_patch_mask(spec, **overrides)
    return find_patch_mask(options.pop("name"))(patch_size=patch_size, **options)
