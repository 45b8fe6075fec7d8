"""The kinds of models that go to open_clip and back, and which of them a name, a file or a model is of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import CLIPModel, PreTrainedConfig, PreTrainedModel, SiglipModel

from ..errors import fail
from . import open_clip_architecture as clip
from . import open_clip_pixels as pixels
from . import open_clip_siglip as siglip
from . import open_clip_siglip_weights as siglip_weights
from . import open_clip_weights as clip_weights

if TYPE_CHECKING:  # they import torchvision, which takes seconds
    from transformers import CLIPImageProcessor, SiglipImageProcessor

Weights = Mapping[str, torch.Tensor]
_COMPARED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "patch_size")


@dataclass(frozen=True)
class Family:
    """What one kind of model has of its own.

    Attributes:
        name: what messages call it.
        config_of: the configuration of Transformers, of a `model_cfg` and a tokenizer's ids.
        with_sizes_of: a `model_cfg` with the sizes that weights have.
        to_open_clip_weights: open_clip's names for the weights of the model, as `read_checkpoint` gives them.
        from_open_clip_weights: the model's names for open_clip's weights.
        image_processor_of: of a `preprocess_cfg` and an image size.
        end_token: that texts are pooled at, of a `model_cfg`; None where they are pooled at the last position.
        preprocess_cfg: how pictures are prepared where no file says it.
        preparation: the same in words.
        layer_ends: what the name ends with of a matrix that each layer has.
    """

    name: str
    model_class: type[PreTrainedModel]
    config_of: Callable[[Mapping[str, Any], Mapping[str, int]], PreTrainedConfig]
    with_sizes_of: Callable[[Weights, dict[str, Any]], dict[str, Any]]
    to_open_clip_weights: Callable[[Weights], dict[str, torch.Tensor]]
    from_open_clip_weights: Callable[[Weights, list[str]], dict[str, torch.Tensor]]
    image_processor_of: Callable[[Mapping[str, Any], int], "CLIPImageProcessor | SiglipImageProcessor"]
    end_token: Callable[[Mapping[str, Any]], int | None]
    preprocess_cfg: Mapping[str, Any]
    preparation: str
    layer_ends: tuple[str, ...]


CLIP = Family(
    name="CLIP",
    model_class=CLIPModel,
    config_of=clip.config_of_model_cfg,
    with_sizes_of=clip.with_sizes_of,
    to_open_clip_weights=clip_weights.to_open_clip_weights,
    from_open_clip_weights=clip_weights.from_open_clip_weights,
    image_processor_of=pixels.image_processor_of,
    end_token=clip.end_token,
    preprocess_cfg={},
    preparation="as is open_clip's default",
    layer_ends=(".attn.in_proj_weight",),
)
SIGLIP = Family(
    name="SigLIP",
    model_class=SiglipModel,
    config_of=siglip.config_of_model_cfg,
    with_sizes_of=siglip.with_sizes_of,
    to_open_clip_weights=siglip_weights.to_open_clip_weights,
    from_open_clip_weights=siglip_weights.from_open_clip_weights,
    image_processor_of=pixels.siglip_image_processor_of,
    end_token=lambda model_cfg: None,
    preprocess_cfg=siglip.SQUASHED,
    preparation="as is SigLIP's default, squashed and with mean and std 0.5",
    layer_ends=(".attn.in_proj_weight", ".attn.qkv.weight"),
)


def family_of(model_cfg: Mapping[str, Any]) -> Family:
    """What a `model_cfg` is of; CLIP where it is of neither, whose reader says why it is no CLIP."""
    return SIGLIP if siglip.is_siglip(model_cfg) else CLIP


def named_model_cfg(model_name: str) -> dict[str, Any]:
    """The `model_cfg` of a model of open_clip by its name, in any spelling. Raises ConfigError for an unknown name."""
    if "siglip" in model_name.lower():
        return siglip.named_model_cfg(model_name)
    return clip.named_model_cfg(model_name)


def check_same_architecture(model_name: str, model_cfg: Mapping[str, Any], source: str) -> None:
    """Raise a ConfigError where a file says another architecture than a name; sizes of pictures and texts may differ."""
    named_cfg = named_model_cfg(model_name)
    family, other = family_of(named_cfg), family_of(model_cfg)
    named, read = family.config_of(named_cfg, {}), other.config_of(model_cfg, {})
    if family is not other:
        fail(f"--open_clip_model {model_name}: is a {family.name}, {source} says a {other.name}")
    if named_cfg["embed_dim"] != model_cfg["embed_dim"]:
        fail(f"--open_clip_model {model_name}: embed_dim is {named_cfg['embed_dim']}, {source} says {model_cfg['embed_dim']}")
    for tower in ("vision_config", "text_config"):
        there, here = (config.to_dict()[tower] for config in (read, named))
        for key in _COMPARED:
            if here.get(key) != there.get(key):
                says = f"its {tower}.{key} is {here.get(key)}, {source} says {there.get(key)}"
                fail(f"--open_clip_model {model_name}: {says}")


def known_models() -> str:
    """The names of open_clip's models that can be read, for a message."""
    return f"one of {', '.join([*clip.MODELS, *siglip.MODELS])}"
