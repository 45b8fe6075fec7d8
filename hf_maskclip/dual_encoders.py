"""Models of every family from a folder or the Hub, each in its own class; what is of none is refused before it is read."""

import math
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .errors import as_config_error, fail
from .models.modeling_maskclip import MaskCLIPModel
from .models.modeling_maskclip_vision import MaskCLIPVisionModel
from .models.patch_mask_registry import PatchMaskSpec
from .models.towers import Family, add_patch_mask, find_family, known_families


def family_of_folder(source: str, takes_towers: bool = False) -> Family:
    """The family of the dual encoder in a folder or under a Hub id, by its `config.json` alone.

    Args:
        takes_towers: a vision tower alone will do.

    Raises:
        ConfigError: a model of no known family, or a tower without texts.
    """
    model_type = _type_of(source)
    family = find_family(model_type)
    if family is None or (_is_tower(model_type) and not takes_towers):
        what = "model" if takes_towers else "image and text encoder"
        fail(f"{source}: is a {model_type!r}, no {what} of a known family; known are {known_families()}")
    return family


def _type_of(source: str) -> str:
    with as_config_error("model", source):
        config, _ = PreTrainedConfig.get_config_dict(source)
    return str(config.get("model_type"))


def _is_tower(model_type: str) -> bool:
    return model_type.endswith("_vision_model")


def load_dual_encoder(source: str, patch_mask: PatchMaskSpec | None = None, **loading: Any) -> PreTrainedModel:
    """The dual encoder of a folder or Hub id, in the class of its family and with a patch mask; a CLIP as a [`MaskCLIPModel`].

    Args:
        patch_mask: a name, a dict or a mask; by default the one that the folder records, which may be `"none"`.
        loading: of `from_pretrained`.

    Raises:
        ConfigError: a model of no known family, or one that lacks weights.
    """
    family = family_of_folder(source)
    with as_config_error("model", source):
        if family.model_type == "clip":
            return MaskCLIPModel.from_pretrained(source, patch_mask=patch_mask, **loading)
        model, info = AutoModel.from_pretrained(source, output_loading_info=True, **loading)
    check_complete(source, model, info)
    with as_config_error("patch_mask", patch_mask):
        return add_patch_mask(model, patch_mask or model.config.vision_config.to_dict().get("patch_mask", "none"))


def load_teacher(source: str) -> tuple[PreTrainedModel, tuple[list[float], list[float]]]:
    """A plain vision tower that keeps attention weights, in evaluation mode; and the mean and deviation of its pixels.

    Args:
        source: of a dual encoder, or of a vision tower alone.

    Raises:
        ConfigError: a model of no known family, or one that lacks weights; NaFlex's, which has no one size of pictures.
    """
    family = family_of_folder(source, takes_towers=True)
    if family.model_type == "siglip2":
        fail(f"{source}: is of {family.title}, which sees pictures in their own aspect ratios; these here are squares")
    with as_config_error("model", source):
        if family.model_type == "clip":
            model = MaskCLIPVisionModel.from_pretrained(source, attn_implementation="eager", patch_mask="none")
            return model.eval(), (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        model_class = getattr(transformers, f"{family.prefix}VisionModel") if _is_tower(_type_of(source)) else AutoModel
        model, info = model_class.from_pretrained(source, attn_implementation="eager", output_loading_info=True)
        image_processor = AutoImageProcessor.from_pretrained(source)
    check_complete(source, model, info)
    tower = model if _is_tower(model.config.model_type) else model.get_submodule("vision_model")
    return tower.eval(), (image_processor.image_mean, image_processor.image_std)


def check_complete(source: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise a ConfigError for weights that the checkpoint does not have: Transformers has filled them with random ones."""
    if missing := sorted(info["missing_keys"]):
        name = type(model).__name__
        fail(f"{source}: has no weights for {len(missing)} tensors of {name}, such as {missing[0]!r}; it is no whole {name}")


def load_processor(source: str) -> ProcessorMixin:
    """The processor of a dual encoder: its image processor and its tokenizer.

    Raises:
        ConfigError: the folder lacks one of the two.
    """
    with as_config_error("model", source):
        processor = AutoProcessor.from_pretrained(source)
    if not isinstance(processor, ProcessorMixin):
        fail(f"{source}: has a {type(processor).__name__} alone; a dual encoder has an image processor and a tokenizer")
    return processor


def image_size_of(vision_config: Any, image_processor: Any) -> int:
    """The side in pixels of a square picture that a model sees whole; NaFlex's is what fills its budget of patches."""
    if "max_num_patches" in (budget := image_processor.to_dict()):
        return math.isqrt(budget["max_num_patches"]) * vision_config.patch_size
    return vision_config.image_size


def check_can_be_shown(source: str) -> None:
    """Raise a ConfigError for a model that the demo cannot show: its pictures are squares, and its scores add up to 1."""
    family = family_of_folder(source)
    shown = ("clip", "metaclip_2", "altclip", "chinese_clip")
    if family.model_type not in shown:
        names = ", ".join(title for model_type in shown if (title := find_family(model_type).title))
        fail(f"{source}: is of {family.title}, which the demo cannot show; it shows {names}")
