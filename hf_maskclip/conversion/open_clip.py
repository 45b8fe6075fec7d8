"""open_clip's checkpoints, read and written: its names for CLIP's weights, and its configurations.

Shapes: D width, E projection size, P patch size, L patches, S context length.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from ..errors import ConfigError
from .checkpoint import read_checkpoint

if TYPE_CHECKING:  # it imports torchvision, which takes seconds
    from transformers import CLIPProcessor

OPEN_CLIP_WEIGHTS, OPEN_CLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def _model_cfg(embed_dim: int, vision: tuple[int, int, int, int], text: tuple[int, int, int], **kwargs: Any) -> dict[str, Any]:
    image_size, layers, width, patch_size = vision
    text_width, text_heads, text_layers = text
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": image_size, "layers": layers, "width": width, "patch_size": patch_size} | kwargs,
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": text_width,
            "heads": text_heads,
            "layers": text_layers,
        },
    }


# Of open_clip's models: image size, layers, width, patch size of the vision tower; width, heads, layers of the text tower.
MODELS = {
    "ViT-S-32": _model_cfg(384, (224, 12, 384, 32), (384, 6, 12)),
    "ViT-S-16": _model_cfg(384, (224, 12, 384, 16), (384, 6, 12)),
    "ViT-B-32": _model_cfg(512, (224, 12, 768, 32), (512, 8, 12)),
    "ViT-B-16": _model_cfg(512, (224, 12, 768, 16), (512, 8, 12)),
    "ViT-L-14": _model_cfg(768, (224, 24, 1024, 14), (768, 12, 12)),
    "ViT-L-14-336": _model_cfg(768, (336, 24, 1024, 14), (768, 12, 12)),
    "ViT-H-14": _model_cfg(1024, (224, 32, 1280, 14), (1024, 16, 24), head_width=80),
}
QUICK_GELU = "-quickgelu"

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
    """A converted model, and the names in the checkpoint that are no weights of it."""

    model: CLIPModel
    extra: list[str]


def convert_open_clip_checkpoint(
    checkpoint: str | Path, model_name: str, token_ids: Mapping[str, int] | None = None, key: str = ""
) -> Conversion:
    """Read a checkpoint of open_clip, or of a fork of it such as those of CLIP-PGS and cluster masking.

    Args:
        checkpoint: `.pt` (weights, or a training checkpoint with `state_dict`; read without unpickling objects) or
            `.safetensors`.
        model_name: open_clip's name, such as `ViT-B-16`; with `-quickgelu` for OpenAI's activation.
        token_ids: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`; by default those of CLIP.
        key: which of the file's sets of weights, such as `state_dict_ema`.

    Raises:
        ConfigError: an unknown name, a file of another kind, or weights that are missing or of other sizes.
    """
    clip_config(model_name, {})  # an unknown name is said first
    weights = read_checkpoint(Path(checkpoint), key)
    config = clip_config(model_name, token_ids or {}, weights)
    with torch.device("meta"):
        expected = {name: weight for name, weight in CLIPModel(config).state_dict().items()}
    shapes = {name: tuple(weight.shape) for name, weight in to_open_clip_weights(expected).items()}
    wrong = [
        f"{name} is {tuple(weights[name].shape) if name in weights else 'missing'}, {model_name} has {shape}"
        for name, shape in shapes.items()
        if name not in weights or tuple(weights[name].shape) != shape
    ]
    extra = sorted(set(weights) - set(shapes))
    wrong += [
        f"{name} is of a layer that {model_name} does not have" for name in extra if name.endswith(".attn.in_proj_weight")
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ConfigError(f"{checkpoint}: does not fit {model_name}: {'; '.join(wrong[:3])}{more}")
    converted = {name: weight.float() for name, weight in from_open_clip_weights(weights, list(expected)).items()}
    model = CLIPModel.from_pretrained(None, config=config, state_dict=converted)
    return Conversion(model, extra)


def clip_config(model_name: str, token_ids: Mapping[str, int], weights: Mapping[str, torch.Tensor] | None = None) -> CLIPConfig:
    """The configuration of a model of open_clip, with the sizes of weights. Raises ConfigError for an unknown name."""
    is_quick = model_name.lower().endswith(QUICK_GELU)
    spelled = {_spelling(name): name for name in MODELS}
    plain_name = model_name[: -len(QUICK_GELU)] if is_quick else model_name
    plain_name = spelled.get(_spelling(plain_name), plain_name)
    if plain_name not in MODELS:
        raise ConfigError(f"open_clip model {model_name!r}: must be one of {', '.join(MODELS)}, each also with {QUICK_GELU}")
    cfg = _with_sizes_of(weights or {}, MODELS[plain_name])
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    # open_clip's models have GELU where their name does not say otherwise; Transformers' default is OpenAI's approximation.
    activation = "quick_gelu" if is_quick else "gelu"

    def tower(part: dict[str, Any], heads: int) -> dict[str, Any]:
        inner = round(part.get("mlp_ratio", 4) * part["width"])
        sizes = {"hidden_size": part["width"], "intermediate_size": inner, "num_hidden_layers": part["layers"]}
        return sizes | {"num_attention_heads": heads, "hidden_act": activation, "projection_dim": cfg["embed_dim"]}

    ids = {
        "bos_token_id": text["vocab_size"] - 2,
        "eos_token_id": text["vocab_size"] - 1,
        "pad_token_id": text["vocab_size"] - 1,
    }
    return CLIPConfig(
        vision_config=tower(vision, heads=vision["width"] // vision.get("head_width", 64))
        | {"image_size": vision["image_size"], "patch_size": vision["patch_size"]},
        text_config=tower(text, heads=text["heads"])
        | {"vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"]}
        | ids
        | dict(token_ids),
        projection_dim=cfg["embed_dim"],
    )


def _spelling(name: str) -> str:
    return name.lower().replace("/", "-").replace("_", "-").replace("@", "-")


def _with_sizes_of(weights: Mapping[str, torch.Tensor], cfg: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the image size, the context length and the vocabulary that weights have."""
    cfg = copy.deepcopy(cfg)
    positions, places, words = (
        len(weights[name]) if name in weights and weights[name].ndim == 2 else None
        for name in ("visual.positional_embedding", "positional_embedding", "token_embedding.weight")
    )
    if positions and (side := math.isqrt(positions - 1)) ** 2 == positions - 1:
        patch = weights["visual.conv1.weight"].shape[-1] if "visual.conv1.weight" in weights else None
        if patch == cfg["vision_cfg"]["patch_size"]:
            cfg["vision_cfg"]["image_size"] = side * patch
    cfg["text_cfg"]["context_length"] = places or cfg["text_cfg"]["context_length"]
    cfg["text_cfg"]["vocab_size"] = words or cfg["text_cfg"]["vocab_size"]
    return cfg


# ------------------------------------------------------------------------------------------------------ to open_clip


def export_to_open_clip(model: CLIPModel, output_dir: str | Path, processor: "CLIPProcessor") -> None:
    """Write a model for `open_clip.create_model_and_transforms("local-dir:OUTPUT_DIR")`, with its tokenizer.

    Raises:
        ConfigError: an activation that open_clip does not have.
    """
    output_dir = Path(output_dir)
    config = {"model_cfg": open_clip_config(model.config), "preprocess_cfg": _preprocess_cfg(processor)}
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in to_open_clip_weights(model.state_dict()).items()}
    output_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output_dir / OPEN_CLIP_WEIGHTS)
    (output_dir / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor.tokenizer.save_pretrained(output_dir)


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """open_clip's `model_cfg` of a configuration."""
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act not in ("gelu", "quick_gelu") or text.hidden_act != vision.hidden_act:
        raise ConfigError(
            f"hidden_act {vision.hidden_act!r}, {text.hidden_act!r}: open_clip has gelu or quick_gelu, for both towers"
        )
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "patch_size": vision.patch_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
            # open_clip's default pools at the highest id, its own tokenizer's end token; this names the folder's.
            # Of the id 2, which old configurations have, Transformers pools at the highest id too.
            **({"pool_type": "argmax"} if text.eos_token_id == 2 else {"pool_type": "eos", "eos_id": text.eos_token_id}),
            "hf_tokenizer_name": "local",
        },
    }


def _preprocess_cfg(processor: "CLIPProcessor") -> dict[str, Any]:
    """open_clip's `preprocess_cfg`. Raises ConfigError for what open_clip's transform does not do."""
    image_processor = processor.image_processor
    size, crop = image_processor.size, image_processor.crop_size
    interpolation = {3: "bicubic", 2: "bilinear"}.get(int(image_processor.resample))
    if interpolation is None:
        raise ConfigError(f"processor: resample {image_processor.resample}: open_clip has bicubic and bilinear")
    if not (image_processor.do_resize and image_processor.do_rescale and image_processor.do_normalize):
        raise ConfigError("processor: open_clip always resizes, rescales and normalises")
    if abs(image_processor.rescale_factor - 1 / 255) > 1e-6:
        raise ConfigError(f"processor: rescale_factor {image_processor.rescale_factor}: open_clip's is 1/255")
    edge = size.get("shortest_edge")
    if edge is None:
        target, mode = [size.get("height"), size.get("width")], "squash"
        fits = None not in target and (not image_processor.do_center_crop or [crop["height"], crop["width"]] == target)
    else:
        target, mode = [edge, edge], "shortest"
        fits = image_processor.do_center_crop and [crop["height"], crop["width"]] == target
    if not fits:
        found = f"size {dict(size)}, crop_size {crop and dict(crop)}, do_center_crop {image_processor.do_center_crop}"
        raise ConfigError(f"processor: {found}: open_clip resizes to the size that it crops, or squashes")
    mean, std = list(image_processor.image_mean), list(image_processor.image_std)
    return {"size": target, "mean": mean, "std": std, "interpolation": interpolation, "resize_mode": mode}
