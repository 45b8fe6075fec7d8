"""CLIP pre-training on a well-chosen part of each image's patches, inside 🤗 Transformers.

Importing this package registers its models with the Auto classes.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion.clip import export_to_clip
    from .conversion.open_clip import convert_open_clip_checkpoint
    from .losses import ContrastiveLoss, SigmoidLoss, cached_contrastive_backward
    from .models.configuration_maskclip import MaskCLIPConfig, MaskCLIPVisionConfig
    from .models.modeling_maskclip import (
        MaskCLIPForImageClassification,
        MaskCLIPModel,
        MaskCLIPVisionModelWithProjection,
    )
    from .models.modeling_maskclip_vision import MaskCLIPVisionModel
    from .models.patch_mask_registry import build_patch_mask, register_patch_mask, resolve_patch_mask
    from .models.patch_masking import Citation, PatchMask, PatchSelection
    from .models.patch_masking_attentive import class_attention
    from .models.towers import add_patch_mask
    from .trainer_callback import PatchMaskCallback

__version__ = "0.1.0"

# Where each public name is; it is imported when it is asked for.
_MODULES = {
    "Citation": "models.patch_masking",
    "add_patch_mask": "models.towers",
    "ContrastiveLoss": "losses",
    "MaskCLIPConfig": "models.configuration_maskclip",
    "MaskCLIPForImageClassification": "models.modeling_maskclip",
    "MaskCLIPModel": "models.modeling_maskclip",
    "MaskCLIPVisionConfig": "models.configuration_maskclip",
    "MaskCLIPVisionModel": "models.modeling_maskclip_vision",
    "MaskCLIPVisionModelWithProjection": "models.modeling_maskclip",
    "PatchMask": "models.patch_masking",
    "PatchMaskCallback": "trainer_callback",
    "PatchSelection": "models.patch_masking",
    "SigmoidLoss": "losses",
    "build_patch_mask": "models.patch_mask_registry",
    "class_attention": "models.patch_masking_attentive",
    "cached_contrastive_backward": "losses",
    "convert_open_clip_checkpoint": "conversion.open_clip",
    "export_to_clip": "conversion.clip",
    "register_patch_mask": "models.patch_mask_registry",
    "resolve_patch_mask": "models.patch_mask_registry",
}
__all__ = [
    "Citation",
    "ContrastiveLoss",
    "MaskCLIPConfig",
    "MaskCLIPForImageClassification",
    "MaskCLIPModel",
    "MaskCLIPVisionConfig",
    "MaskCLIPVisionModel",
    "MaskCLIPVisionModelWithProjection",
    "PatchMask",
    "PatchMaskCallback",
    "PatchSelection",
    "SigmoidLoss",
    "add_patch_mask",
    "build_patch_mask",
    "class_attention",
    "cached_contrastive_backward",
    "convert_open_clip_checkpoint",
    "export_to_clip",
    "register_patch_mask",
    "resolve_patch_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def _is_for_help() -> bool:
    """Whether this process is the command line, or prints the help of a program: neither waits for PyTorch."""
    program, *words = sys.argv or [""]
    return Path(program).stem == "hf-maskclip" or not {"-h", "--help"}.isdisjoint(words)


if not _is_for_help():
    from .auto_config import register_on_demand

    register_on_demand()
