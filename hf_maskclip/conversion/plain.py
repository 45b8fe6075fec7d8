"""A model of any family to a folder of its own plain class."""

from pathlib import Path

import transformers
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from ..dual_encoders import check_complete, family_of_folder, load_processor
from ..errors import ConfigError, as_config_error, fail
from ..models.modeling_maskclip import MaskCLIPModel
from ..models.towers import find_family
from .clip import TWINS, check_weights, export_to_clip, load_maskclip, save_processor


def load_for_export(source: str) -> tuple[PreTrainedModel, ProcessorMixin | BaseImageProcessor]:
    """The model of a folder or Hub id in the class that its configuration names, and its processor.

    Raises:
        ConfigError: a model of no known family, or one that lacks weights or its processor.
    """
    family = family_of_folder(source, takes_towers=True)
    if family.model_type == "clip":
        model = load_maskclip(source)
    else:
        with as_config_error("source", source):
            (architecture,) = AutoConfig.from_pretrained(source).architectures or [None]
            if architecture not in family.mixins:
                raise ConfigError(f"{source}: architecture {architecture!r} must be one of {', '.join(family.mixins)}")
            model, info = getattr(transformers, architecture).from_pretrained(source, output_loading_info=True)
        check_complete(source, model, info)
    if isinstance(model, MaskCLIPModel) or type(model).__name__ == f"{family.prefix}Model":
        return model, load_processor(source)
    with as_config_error("source", source):
        return model, AutoImageProcessor.from_pretrained(source)


def export_plain(
    model: PreTrainedModel, output_dir: str | Path, processor: ProcessorMixin | BaseImageProcessor, remote_code: bool = False
) -> None:
    """Write a trained model of any family as its own plain class of Transformers, with its processor.

    A MaskCLIP is written by [`export_to_clip`]. The patch mask stays in the configuration, where [`add_patch_mask`] finds it.

    Args:
        remote_code: write the masked model with its code; a MaskCLIP alone needs that.

    Raises:
        ConfigError: a model of no known family, one with adapters that are not merged, or one that is quantised. Or remote code
            for a family whose export needs none.
    """
    if type(model) in TWINS:
        export_to_clip(model, output_dir, processor, remote_code)
        return
    name, family = type(model).__name__, find_family(type(model.config).model_type)
    if family is None or name not in family.mixins:
        fail(f"export of a {name}: is no model of a known family that was loaded by Transformers")
    if remote_code and family.model_type == "clip":
        fail(f"--remote_code: {name} has no code of its own; load it as a Mask{name}")
    if remote_code:
        fail(f"--remote_code: {name} needs none, its export is that class of Transformers, and add_patch_mask masks it")
    check_weights(model)
    model.save_pretrained(output_dir)
    save_processor(processor, output_dir)
