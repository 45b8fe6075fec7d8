"""What stands for this package's configurations with AutoConfig until one is read.

The models import torchvision, which takes seconds. So `import hf_maskclip` registers these in their place; the first
configuration that is read imports the models, which register themselves.
"""

from importlib import import_module
from typing import Any

from transformers import AutoConfig


class ConfigOnDemand:
    """Imports the models, and gives a configuration of the class that this stands for."""

    class_name: str

    def __new__(cls, **options: Any):
        return cls.real_class()(**options)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        return cls.real_class().from_dict(config_dict, **kwargs)

    @classmethod
    def real_class(cls) -> type:
        return getattr(import_module("hf_maskclip.models"), cls.class_name)


class MaskCLIPConfigOnDemand(ConfigOnDemand):
    model_type, class_name = "maskclip", "MaskCLIPConfig"


class MaskCLIPVisionConfigOnDemand(ConfigOnDemand):
    model_type, class_name = "maskclip_vision_model", "MaskCLIPVisionConfig"


def register_on_demand() -> None:
    for stand_in in (MaskCLIPConfigOnDemand, MaskCLIPVisionConfigOnDemand):
        AutoConfig.register(stand_in.model_type, stand_in)
