"""Configurations: those of CLIP, with a patch mask in the vision part."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from .patch_mask_registry import resolve_patch_mask

MODEL_TYPES = {"clip": "maskclip", "clip_vision_model": "maskclip_vision_model"}


class FromCLIPMixin:
    """Reads the configurations of CLIP, too, without the warning that the model type differs: it may."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        for part in (config, config.get("vision_config", {})):
            part["model_type"] = MODEL_TYPES.get(part.get("model_type"), part.get("model_type"))
        return config, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As `PreTrainedConfig.from_dict`. Raises ValueError for an option of a mask that is outside of `patch_mask`."""
        check_no_option_of_a_mask(kwargs.keys() - {"patch_mask"})
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def of(cls, config: PreTrainedConfig):
        """The configuration itself; of CLIP's classes, the same with the mask `none`."""
        if isinstance(config, cls):
            return config
        options = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        if isinstance(options.get("vision_config"), dict):
            options["vision_config"].pop("model_type", None)
        return cls(**options)


def check_no_option_of_a_mask(keys: set[str]) -> None:
    """Raise a ValueError for an unknown key that speaks of a mask."""
    for key in sorted(keys):
        if "mask" in key:
            raise ValueError(f"unknown option {key!r}: the options of a mask go into patch_mask={{'name': ..., ...}}")


@strict
class MaskCLIPVisionConfig(FromCLIPMixin, CLIPVisionConfig):
    """`CLIPVisionConfig` with a patch mask.

    Args:
        patch_mask: the name of a mask, a dict such as `{"name": "pgs", "min_mask_ratio": 0.3}`, or a mask. It is kept, and
            saved, as the dict with all options of that mask. `"none"` is CLIP. It can be assigned at any time: a model that has
            this configuration follows.

    Raises:
        ValueError: unknown mask or option, a value out of range, or a patch size that does not divide the image size.
    """

    model_type = "maskclip_vision_model"
    base_config_key = "vision_config"

    patch_mask: Any = "none"

    def __post_init__(self, **kwargs):
        check_no_option_of_a_mask(set(kwargs))
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size}: must be a multiple of patch_size={self.patch_size}")
        super().__post_init__(**kwargs)
        self.architectures = self.architectures or ["MaskCLIPVisionModel"]

    def __setattr__(self, key, value):
        super().__setattr__(key, resolve_patch_mask(value) if key == "patch_mask" else value)


@strict
class MaskCLIPConfig(FromCLIPMixin, CLIPConfig):
    """`CLIPConfig` whose vision part is a [`MaskCLIPVisionConfig`]; the text part is CLIP's.

    Args:
        patch_mask: that of the vision part, which keeps it.
    """

    model_type = "maskclip"
    sub_configs_defaults = {"vision_config": MaskCLIPVisionConfig, "text_config": CLIPTextConfig}

    vision_config: dict | MaskCLIPVisionConfig | None = None

    def __post_init__(self, **kwargs):
        patch_mask = kwargs.pop("patch_mask", None)
        check_no_option_of_a_mask(set(kwargs))
        super().__post_init__(**kwargs)
        self.architectures = self.architectures or ["MaskCLIPModel"]
        if patch_mask is not None:
            self.patch_mask = patch_mask

    @property
    def patch_mask(self) -> dict[str, Any]:
        """The patch mask of the vision part, with all options."""
        return self.vision_config.patch_mask

    @patch_mask.setter
    def patch_mask(self, value: Any) -> None:
        self.vision_config.patch_mask = value


__all__ = ["MaskCLIPConfig", "MaskCLIPVisionConfig"]
