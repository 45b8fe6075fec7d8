"""open_clip's checkpoints, read and written: its names for CLIP's weights.

Shapes: D width, E projection size, P patch size, L patches, S context length.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from ..errors import ConfigError, fail
from .checkpoint import read_checkpoint
from .open_clip_architecture import config_of_model_cfg, end_token, open_clip_config, with_sizes_of
from .open_clip_folder import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, OpenClipModel, find_open_clip_model
from .open_clip_pixels import image_processor_of, preprocess_cfg_of
from .tokens import LEGACY_END_TOKEN

if TYPE_CHECKING:  # they import torchvision, which takes seconds
    from transformers import CLIPImageProcessor, CLIPProcessor

# Transformers' name: open_clip's, and whether open_clip keeps the matrix transposed.
_TOP = {
    "logit_scale": ("logit_scale", False),
    "visual_projection.weight": ("visual.proj", True),  # (E, D)
    "text_projection.weight": ("text_projection", True),  # (E, D)
    "vision_model.embeddings.class_embedding": ("visual.class_embedding", False),
    "vision_model.embeddings.patch_embedding.weight": ("visual.conv1.weight", False),  # (D, 3, P, P)
    "vision_model.embeddings.position_embedding.weight": ("visual.positional_embedding", False),  # (1 + L, D)
    "text_model.embeddings.token_embedding.weight": ("token_embedding.weight", False),
    "text_model.embeddings.position_embedding.weight": ("positional_embedding", False),  # (S, D)
}
_NORMS = {
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.final_layer_norm": "ln_final",
}
_TOWERS = {"vision_model.encoder.layers": "visual.transformer.resblocks", "text_model.encoder.layers": "transformer.resblocks"}
_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_LAYER |= {"self_attn.out_proj": "attn.out_proj"}
_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")


def to_open_clip_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a `CLIPModel` under open_clip's names; queries, keys and values become one matrix (3 D, D)."""
    converted = {}
    for name, weight in weights.items():
        theirs, is_transposed = _open_clip_name(name)
        if theirs.endswith(".q_proj"):
            parts = [weights[name.replace("q_proj", part)] for part in _QUERY_KEY_VALUE]
            converted[theirs.replace(".q_proj", "")] = torch.cat(parts)
        elif not theirs.endswith((".k_proj", ".v_proj")):
            converted[theirs] = weight.t().contiguous() if is_transposed else weight
    return converted


def from_open_clip_weights(weights: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """open_clip's weights under the names of a `CLIPModel`.

    Args:
        names: those of its weights.
    """
    converted = {}
    for name in names:
        theirs, is_transposed = _open_clip_name(name)
        base, _, part = theirs.rpartition(".")
        if part in _QUERY_KEY_VALUE:
            converted[name] = weights[base].chunk(3)[_QUERY_KEY_VALUE.index(part)].clone()
        else:
            converted[name] = weights[theirs].t().contiguous() if is_transposed else weights[theirs]
    return converted


def _open_clip_name(name: str) -> tuple[str, bool]:
    """open_clip's name of a weight, for a part of `in_proj_weight` or `in_proj_bias` with `.q_proj`, ... at its end."""
    if name in _TOP:
        return _TOP[name]
    module, _, kind = name.rpartition(".")  # kind: weight or bias
    if module in _NORMS:
        return f"{_NORMS[module]}.{kind}", False
    tower = next(tower for tower in _TOWERS if name.startswith(tower))
    number, _, part = module.removeprefix(f"{tower}.").partition(".")
    block = f"{_TOWERS[tower]}.{number}"
    if part in _LAYER:
        return f"{block}.{_LAYER[part]}.{kind}", False
    return f"{block}.attn.in_proj_{kind}.{part.removeprefix('self_attn.')}", False


# ---------------------------------------------------------------------------------------------------- from open_clip


@dataclass
class Conversion:
    """A converted model.

    Attributes:
        image_processor: that prepares pictures as the model's were.
        end_token: that texts are pooled at, as `CLIPTextConfig.eos_token_id` says it: 2 is the highest of a caption.
        extra: the names in the checkpoint that are no weights of it.
        averages: the keys of averages that the checkpoint holds beside its weights.
        remarks: what was taken for granted, or otherwise than a file says, a line each.
    """

    model: CLIPModel
    image_processor: "CLIPImageProcessor"
    end_token: int
    extra: list[str]
    averages: list[str]
    remarks: list[str]


def convert_open_clip_checkpoint(
    checkpoint: str | Path, model_name: str = "", token_ids: Mapping[str, int] | None = None, key: str = ""
) -> Conversion:
    """Read a checkpoint of open_clip, or of a fork of it such as those of CLIP-PGS and cluster masking.

    Args:
        checkpoint: `.pt` (weights, or a training checkpoint with `state_dict`; read without unpickling objects),
            `.safetensors`, or a folder for open_clip's `local-dir:`. Architecture and preparation of pictures are those of
            the `open_clip_config.json` in the folder, or beside the file.
        model_name: open_clip's name, such as `ViT-B-16`, where no such file says it; `-quickgelu` is OpenAI's activation.
        token_ids: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`; by default those of CLIP.
        key: which of the file's sets of weights, such as `state_dict_ema`.

    Raises:
        ConfigError: an unknown name, a file of another kind, a part that a CLIP of Transformers has not, or weights that are
            missing or of other sizes.
    """
    return convert_open_clip_model(find_open_clip_model(checkpoint, model_name), token_ids or {}, key)


def convert_open_clip_model(source: OpenClipModel, token_ids: Mapping[str, int], key: str) -> Conversion:
    """As [`convert_open_clip_checkpoint`], of a model that was found."""
    config_of_model_cfg(source.model_cfg, {})  # what it cannot be is said first
    read = read_checkpoint(source.weights, key)
    weights = read.weights
    if "logit_scale" in weights and weights["logit_scale"].numel() == 1:  # open_clip has it with and without a dimension
        weights["logit_scale"] = weights["logit_scale"].reshape(())
    model_cfg = with_sizes_of(weights, source.model_cfg) if source.preprocess_cfg is None else source.model_cfg
    config = config_of_model_cfg(model_cfg, token_ids)
    with torch.device("meta"):
        expected = CLIPModel(config).state_dict()
    extra = _check_shapes(source, weights, expected)
    image_size = config.vision_config.image_size
    image_processor = image_processor_of(source.preprocess_cfg or {}, image_size)
    end = end_token(model_cfg)
    if end != LEGACY_END_TOKEN and config.text_config.eos_token_id != end:
        found = config.text_config.eos_token_id
        fail(f"{source.weights}: its texts are pooled at the token {end}, the tokenizer's end token is {found}")
    converted = {name: weight.float() for name, weight in from_open_clip_weights(weights, list(expected)).items()}
    model = CLIPModel.from_pretrained(None, config=config, state_dict=converted)
    return Conversion(model, image_processor, end, extra, read.averages, source.remarks(image_size))


def _check_shapes(
    source: OpenClipModel, weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> list[str]:
    """The names that are no weights of the model. Raises ConfigError for weights that are missing or of other sizes."""
    shapes = {name: tuple(weight.shape) for name, weight in to_open_clip_weights(expected).items()}
    wrong = [
        f"{name} is {tuple(weights[name].shape) if name in weights else 'missing'}, {source.name} has {shape}"
        for name, shape in shapes.items()
        if name not in weights or tuple(weights[name].shape) != shape
    ]
    extra = sorted(set(weights) - set(shapes))
    wrong += [
        f"{name} is of a layer that {source.name} does not have" for name in extra if name.endswith(".attn.in_proj_weight")
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ConfigError(f"{source.weights}: does not fit {source.name}: {'; '.join(wrong[:3])}{more}")
    return extra


# ------------------------------------------------------------------------------------------------------ to open_clip


def export_to_open_clip(model: CLIPModel, output_dir: str | Path, processor: "CLIPProcessor") -> None:
    """Write a model for `open_clip.create_model_and_transforms("local-dir:OUTPUT_DIR")`, with its tokenizer.

    Raises:
        ConfigError: an activation, or a preparation of pictures, that open_clip does not have.
    """
    output_dir = Path(output_dir)
    config = {"model_cfg": open_clip_config(model.config), "preprocess_cfg": preprocess_cfg_of(processor)}
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in to_open_clip_weights(model.state_dict()).items()}
    output_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output_dir / OPEN_CLIP_WEIGHTS)
    (output_dir / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor.tokenizer.save_pretrained(output_dir)
