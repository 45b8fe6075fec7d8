"""A model of any family from the folder that is to be exported."""

import transformers
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from ..dual_encoders import check_complete, family_of_folder, load_processor
from ..errors import ConfigError, as_config_error
from ..models.modeling_maskclip import MaskCLIPModel
from .clip import load_maskclip


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
