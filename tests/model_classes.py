"""The classes of models, each with CLIP's that it is a twin of."""

import torch
from transformers import (
    CLIPForImageClassification,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from hf_maskclip import (
    MaskCLIPForImageClassification,
    MaskCLIPModel,
    MaskCLIPVisionConfig,
    MaskCLIPVisionModel,
    MaskCLIPVisionModelWithProjection,
)

VISION_CLASSES = {
    MaskCLIPVisionModel: CLIPVisionModel,
    MaskCLIPVisionModelWithProjection: CLIPVisionModelWithProjection,
    MaskCLIPForImageClassification: CLIPForImageClassification,
}
ALL_CLASSES = [MaskCLIPModel, *VISION_CLASSES]


def as_class(model: MaskCLIPModel, cls):
    """The model's weights in one of the other classes, with a random classifier where it has one."""
    torch.manual_seed(1)
    other = cls(model.config.vision_config if cls.config_class is MaskCLIPVisionConfig else model.config)
    prefix = "vision_model." if cls is MaskCLIPVisionModel else ""
    weights = {key.removeprefix(prefix): value for key, value in model.state_dict().items()}
    assert set(other.load_state_dict(weights, strict=False).missing_keys) <= {"classifier.weight", "classifier.bias"}
    return other


def vision_of(model) -> MaskCLIPVisionModel:
    """The vision tower of a model, which may be one itself."""
    return model if isinstance(model, MaskCLIPVisionModel) else model.vision_model
