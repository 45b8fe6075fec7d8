"""Configurations: those of CLIP, with a patch mask in the vision part."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from .patch_mask_registry import resolve_patch_mask


class FromCLIPMixin:
    """Reads the configurations of CLIP folders, too, without the warning that the model type differs: it may."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        for part in (config, config.get("vision_config", {})):
            if part.get("model_type") in ("clip", "clip_vision_model"):
                part["model_type"] = f"mask{part['model_type']}"
        return config, kwargs


@strict
class MaskCLIPVisionConfig(FromCLIPMixin, CLIPVisionConfig):
    """`CLIPVisionConfig` with a patch mask.

    Args:
        patch_mask: the name of a mask or a dict such as `{"name": "pgs", "min_mask_ratio": 0.3}`. It is kept, and saved, as the
            dict with all options of that mask. `"none"` is CLIP.

    Raises:
        ValueError: unknown mask or option, a value out of range, or a patch size that does not divide the image size.
    """

    model_type = "maskclip_vision_model"
    base_config_key = "vision_config"

    patch_mask: dict[str, Any] | str = "none"

    def __post_init__(self, **kwargs):
        self.patch_mask = resolve_patch_mask(self.patch_mask)
        for key in kwargs:
            if "mask" in key:
                raise ValueError(f"unknown option {key!r}: the options of a mask go into patch_mask={{'name': ..., ...}}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size}: must be a multiple of patch_size={self.patch_size}")
        super().__post_init__(**kwargs)


@strict
class MaskCLIPConfig(FromCLIPMixin, CLIPConfig):
    """`CLIPConfig` whose vision part is a [`MaskCLIPVisionConfig`]; the text part is CLIP's."""

    model_type = "maskclip"
    sub_configs_defaults = {"vision_config": MaskCLIPVisionConfig, "text_config": CLIPTextConfig}

    vision_config: dict | MaskCLIPVisionConfig | None = None


__all__ = ["MaskCLIPConfig", "MaskCLIPVisionConfig"]
