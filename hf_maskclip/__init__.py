"""CLIP pre-training on a well-chosen part of each image's patches, inside 🤗 Transformers.

Importing this package registers its models with the Auto classes.
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

from .conversion import export_to_clip
from .conversion_open_clip import convert_open_clip_checkpoint
from .losses import ContrastiveLoss, SigmoidLoss, cached_contrastive_backward
from .models.configuration_maskclip import MaskCLIPConfig, MaskCLIPVisionConfig
from .models.modeling_maskclip import (
    MaskCLIPForImageClassification,
    MaskCLIPModel,
    MaskCLIPVisionModel,
    MaskCLIPVisionModelWithProjection,
)
from .models.patch_mask_registry import build_patch_mask, register_patch_mask
from .models.patch_masking import PatchMask, PatchSelection

__version__ = "0.1.0"


def _register_auto_classes() -> None:
    # Where several classes share a configuration, AutoModel takes the one that `architectures` in config.json names.
    AutoConfig.register(MaskCLIPConfig.model_type, MaskCLIPConfig)
    AutoConfig.register(MaskCLIPVisionConfig.model_type, MaskCLIPVisionConfig)
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


_register_auto_classes()

__all__ = [
    "ContrastiveLoss",
    "MaskCLIPConfig",
    "MaskCLIPForImageClassification",
    "MaskCLIPModel",
    "MaskCLIPVisionConfig",
    "MaskCLIPVisionModel",
    "MaskCLIPVisionModelWithProjection",
    "PatchMask",
    "PatchSelection",
    "SigmoidLoss",
    "build_patch_mask",
    "cached_contrastive_backward",
    "convert_open_clip_checkpoint",
    "export_to_clip",
    "register_patch_mask",
]
