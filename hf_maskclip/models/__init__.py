"""The models and their patch masks: what an export with remote code carries.

Importing this package registers its classes with the Auto classes of Transformers.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    CLIPProcessor,
    CLIPTokenizer,
)

from .configuration_maskclip import MaskCLIPConfig, MaskCLIPVisionConfig
from .modeling_maskclip import MaskCLIPForImageClassification, MaskCLIPModel, MaskCLIPVisionModelWithProjection
from .modeling_maskclip_vision import MaskCLIPVisionModel


def _register() -> None:
    for config_class in (MaskCLIPConfig, MaskCLIPVisionConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)  # in place of what the package has put there
    # Where several classes share a configuration, AutoModel takes the one that `architectures` in config.json names.
    AutoModel.register(MaskCLIPConfig, (MaskCLIPModel, MaskCLIPForImageClassification))
    AutoModel.register(MaskCLIPVisionConfig, (MaskCLIPVisionModel, MaskCLIPVisionModelWithProjection))
    AutoModelForZeroShotImageClassification.register(MaskCLIPConfig, MaskCLIPModel)
    AutoModelForImageClassification.register(MaskCLIPConfig, MaskCLIPForImageClassification)
    AutoProcessor.register(MaskCLIPConfig, CLIPProcessor)
    AutoTokenizer.register(MaskCLIPConfig, tokenizer_class=CLIPTokenizer)
    # Both: the lookup goes by class name over all that is registered, so one alone would hide the other for plain CLIP too.
    image_processors = {"torchvision": CLIPImageProcessor, "pil": CLIPImageProcessorPil}
    for config_class in (MaskCLIPConfig, MaskCLIPVisionConfig):
        AutoImageProcessor.register(config_class, image_processor_classes=image_processors)


_register()
