"""Dual encoders of every family from a folder or the Hub, each in its own class; what is none is refused before it is read."""

from typing import Any

from transformers import AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from .errors import as_config_error, fail
from .models.modeling_maskclip import MaskCLIPModel
from .models.patch_mask_registry import PatchMaskSpec, find_patch_mask, resolve_patch_mask
from .models.towers import Family, add_patch_mask, find_family, known_families


def family_of_folder(source: str) -> Family:
    """The family of the dual encoder in a folder or under a Hub id, by its `config.json` alone.

    Raises:
        ConfigError: a model of no known family, or a tower without texts.
    """
    with as_config_error("model", source):
        config, _ = PreTrainedConfig.get_config_dict(source)
    model_type = config.get("model_type")
    family = find_family(model_type)
    if family is None or model_type == family.tower_type or model_type == "maskclip_vision_model":
        fail(f"{source}: is a {model_type!r}, no image and text encoder of a known family; known are {known_families()}")
    return family


def load_dual_encoder(source: str, patch_mask: PatchMaskSpec = "none", **loading: Any) -> PreTrainedModel:
    """The dual encoder of a folder or Hub id, in the class of its family; a CLIP as a [`MaskCLIPModel`].

    Args:
        patch_mask: a name, a dict or a mask; `"none"` leaves a model of another family than CLIP as it is.
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
    mask = resolve_patch_mask(patch_mask)
    return model if find_patch_mask(mask["name"]).keeps_all else add_patch_mask(model, mask)


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
