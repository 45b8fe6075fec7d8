"""From MaskCLIP to folders that need no package: plain CLIP, or the masked model with its code."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import custom_object_save

from ..errors import ConfigError
from ..models.configuration_maskclip import MaskCLIPVisionConfig
from ..models.modeling_maskclip import (
    MaskCLIPForImageClassification,
    MaskCLIPModel,
    MaskCLIPVisionModel,
    MaskCLIPVisionModelWithProjection,
)
from ..models.patch_mask_registry import BUILT_IN
from ..models.towers import find_family

if TYPE_CHECKING:  # they import torchvision, which takes seconds
    from transformers import ProcessorMixin
    from transformers.image_processing_utils import BaseImageProcessor


class Twin(NamedTuple):
    """The class of Transformers that a MaskCLIP class becomes, and the Auto classes that load the latter by its code."""

    plain: type[PreTrainedModel]
    auto_classes: tuple[str, ...]


TWINS: dict[type[PreTrainedModel], Twin] = {
    MaskCLIPModel: Twin(CLIPModel, ("AutoModel", "AutoModelForZeroShotImageClassification")),
    MaskCLIPForImageClassification: Twin(CLIPForImageClassification, ("AutoModel", "AutoModelForImageClassification")),
    MaskCLIPVisionModel: Twin(CLIPVisionModel, ("AutoModel",)),
    MaskCLIPVisionModelWithProjection: Twin(CLIPVisionModelWithProjection, ("AutoModel",)),
}


def load_maskclip(source: str | Path) -> PreTrainedModel:
    """The MaskCLIP model of a MaskCLIP or CLIP folder, or Hub id, in the class that its configuration names.

    Raises:
        ConfigError: the folder holds a model of another kind.
    """
    by_name = {kind.__name__: masked for masked, twin in TWINS.items() for kind in (masked, twin.plain)}
    config = AutoConfig.from_pretrained(source)
    (architecture,) = config.architectures or [None]
    if architecture not in by_name:
        raise ConfigError(f"{source}: architecture {architecture!r} must be one of {', '.join(by_name)}")
    vision_config = getattr(config, "vision_config", config)
    # Named, so that a model without a mask is loaded without the word that it has none.
    return by_name[architecture].from_pretrained(source, patch_mask=getattr(vision_config, "patch_mask", "none"))


def export_to_clip(
    model: PreTrainedModel,
    output_dir: str | Path,
    processor: "ProcessorMixin | BaseImageProcessor",
    remote_code: bool = False,
) -> None:
    """Write a trained model as `model_type: clip`, with its processor and tokenizer, for `AutoModel` and `pipeline`.

    The patch mask stays in the configuration (`vision_config.patch_mask`), which Transformers keeps and ignores, so that
    `MaskCLIPModel.from_pretrained(output_dir)` trains on with it.

    Args:
        model: the trained model, of any MaskCLIP class; the export is of its twin in Transformers.
        output_dir: a folder, made if it does not exist.
        processor: the `CLIPProcessor` (tokenizer and image processor) that the model was trained with; an image processor is
            enough where the model has no text.
        remote_code: write the masked model instead, and the code of its classes beside it:
            `AutoModel.from_pretrained(output_dir, trust_remote_code=True)` trains on with the patch mask, without this package.

    Example:

        export_to_clip(model, "clip-pgs-tiny", processor)
        AutoModel.from_pretrained("clip-pgs-tiny")  # a CLIPModel, also where this package is not installed

    Raises:
        ConfigError: the model is no MaskCLIP, has adapters that are not merged, or is quantised. Or its patch mask is one of
            your own, whose code is not in this package.
    """
    _check_exportable(model)
    if remote_code:
        _save_with_code(model, output_dir)
    else:
        # The weights are handed over, not copied: the shell has none of its own to initialise.
        plain = TWINS[type(model)].plain
        clip = plain.from_pretrained(None, config=_plain_config(model.config), state_dict=model.state_dict())
        clip.save_pretrained(output_dir)
    save_processor(processor, output_dir)


def exported_class(model: PreTrainedModel) -> str:
    """The name of the class of Transformers that a model is exported as."""
    return TWINS[type(model)].plain.__name__ if type(model) in TWINS else type(model).__name__


def export(
    model: PreTrainedModel,
    output_dir: str | Path,
    processor: "ProcessorMixin | BaseImageProcessor",
    remote_code: bool = False,
) -> None:
    """Write a trained model of any family, with its processor, as its plain class in Transformers.

    A MaskCLIP is written by [`export_to_clip`]. The patch mask stays in the configuration, where [`add_patch_mask`] finds it.

    Args:
        remote_code: write the masked model with its code; a MaskCLIP alone needs that.

    Raises:
        ConfigError: a model of no known family, one with adapters that are not merged, or one that is quantised. Or remote code
            for a model that has none.
    """
    if type(model) in TWINS:
        export_to_clip(model, output_dir, processor, remote_code)
        return
    name, family = type(model).__name__, find_family(type(model.config).model_type)
    if family is None or name not in family.mixins:
        raise ConfigError(f"export of a {name}: is no model of a known family that was loaded by Transformers")
    if remote_code and family.model_type == "clip":
        raise ConfigError(f"--remote_code: {name} has no code of its own; load it as a Mask{name}")
    if remote_code:
        raise ConfigError(
            f"--remote_code: {name} needs none, its export is that class of Transformers, and add_patch_mask masks it"
        )
    check_weights(model)
    model.save_pretrained(output_dir)  # `add_patch_mask` has changed classes of its parts, and no key
    save_processor(processor, output_dir)


def save_processor(processor: "ProcessorMixin | BaseImageProcessor", output_dir: str | Path) -> None:
    """Write a processor with the file that Transformers 4 reads beside that of Transformers 5."""
    from transformers import ProcessorMixin  # it imports torchvision, which whoever has a processor has waited for

    processor.save_pretrained(output_dir)
    image_processor = processor.image_processor if isinstance(processor, ProcessorMixin) else processor
    kind = type(image_processor).__name__.removesuffix("Pil")  # Transformers 4 has one class for both
    content = json.loads(image_processor.to_json_string()) | {"image_processor_type": kind}
    text = json.dumps(content, indent=2) + "\n"
    Path(output_dir, "preprocessor_config.json").write_text(text, encoding="utf-8")


def _check_exportable(model: PreTrainedModel) -> None:
    """Raise a ConfigError for what would be exported with other weights than the model's, with the line that helps."""
    name = type(model).__name__
    if type(model) not in TWINS:
        hint = (
            "merge its adapters first: export_to_clip(model.merge_and_unload(), ...)" if hasattr(model, "peft_config") else ""
        )
        hint = hint or f"must be one of {', '.join(kind.__name__ for kind in TWINS)}"
        raise ConfigError(f"export of a {name}: {hint}")
    check_weights(model)


def check_weights(model: PreTrainedModel) -> None:
    """Raise a ConfigError where the weights are not those that the class has: with adapters, quantised, or changed."""
    name = type(model).__name__
    with torch.device("meta"):
        expected = type(model)(copy.deepcopy(model.config)).state_dict()
    weights = model.state_dict()
    if adapters := [key for key in weights if ".lora_" in key or ".base_layer." in key]:
        raise ConfigError(f"export of a {name} with adapters, such as {adapters[0]!r}: merge them first, by merge_and_unload()")
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        found = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which is none of its weights"
        raise ConfigError(f"export of a {name}: it {found}; a quantised model cannot be exported, nor one with changed layers")
    for key, weight in weights.items():
        is_plain = type(weight) is torch.Tensor and weight.is_floating_point()
        if not is_plain or weight.shape != expected[key].shape:
            kind = f"a {type(weight).__name__} {tuple(weight.shape)} of {weight.dtype}"
            raise ConfigError(f"export of a {name}: {key!r} is {kind}; a quantised model cannot be exported")


def _plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(config, MaskCLIPVisionConfig):
        return CLIPVisionConfig.from_dict(_without_classes(config))
    parts = {"text_config": config.text_config, "vision_config": config.vision_config}
    plain = {key: _without_classes(part) for key, part in parts.items()}
    return CLIPConfig.from_dict(_without_classes(config) | plain)


def _without_classes(config: PreTrainedConfig) -> dict:
    return {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures", "auto_map")}


def _save_with_code(model: PreTrainedModel, output_dir: str | Path) -> None:
    vision_config = model.config if isinstance(model.config, MaskCLIPVisionConfig) else model.config.vision_config
    name = vision_config.patch_mask["name"]
    if name not in BUILT_IN:
        allowed = ", ".join(BUILT_IN)
        raise ConfigError(f"patch mask {name!r} is your own, remote code cannot carry it: must be one of {allowed}")
    model.save_pretrained(output_dir)
    # Not by `register_for_auto_class`: a class so marked writes its code whenever it is saved, and has one Auto class only.
    config = copy.deepcopy(model.config)
    config.auto_map = {auto_class: _code_reference(type(model)) for auto_class in TWINS[type(model)].auto_classes}
    config.auto_map["AutoConfig"] = _code_reference(type(config))
    config.save_pretrained(output_dir)
    custom_object_save(model, output_dir)  # the modeling file, and what it imports


def _code_reference(kind: type) -> str:
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
