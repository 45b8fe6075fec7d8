"""open_clip's architectures (`model_cfg`) as configurations of Transformers, and back."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPConfig, CLIPTextConfig

from ..errors import ConfigError, fail
from .tokens import LEGACY_END_TOKEN


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
TANH_GELU = {"approximate": "tanh"}
OPEN_CLIP_VOCABULARY = 49408  # of its own tokenizer, whose end token is the last

# What open_clip takes where a configuration is silent.
_VISION = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
_TEXT |= {"pool_type": "argmax", "eos_id": 2, "hf_tokenizer_name": None}
_DEFAULTS = {"vision_cfg": _VISION, "text_cfg": _TEXT}
# Read elsewhere, of training, of a part that is off, or of what the weights hold.
_WITHOUT_EFFECT = (
    *("norm_kwargs", "act_kwargs", "patch_dropout", "output_tokens", "final_ln_after_pool", "attn_pooler_queries"),
    *("attn_pooler_heads", "pos_embed_type", "pad_id", "timm_pool", "timm_proj", "timm_model_pretrained"),
    *("timm_drop", "timm_drop_path", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
)
# The one form in which a CLIP of Transformers has a part; any other key must be off.
_ONE_FORM = {
    "pool_type": ("tok",),
    "block_type": ("default",),
    "proj_type": ("linear",),
    "tokenizer_kwargs": ({"clean": "lower"},),
}
_TEXT_POOLS = ("argmax", "eos")
_TOP_KEYS = (
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias"),
    "nonscalar_logit_scale",
)


def named_model_cfg(model_name: str) -> dict[str, Any]:
    """The `model_cfg` of a model of open_clip by its name, in any spelling. Raises ConfigError for an unknown name."""
    is_quick = model_name.lower().endswith(QUICK_GELU)
    by_spelling = {spelled(name): name for name in MODELS}
    plain_name = model_name[: -len(QUICK_GELU)] if is_quick else model_name
    plain_name = by_spelling.get(spelled(plain_name), plain_name)
    if plain_name not in MODELS:
        allowed = f"must be one of {', '.join(MODELS)}, each also with {QUICK_GELU}, or a SigLIP, such as ViT-B-16-SigLIP"
        raise ConfigError(f"open_clip model {model_name!r}: {allowed}")
    # open_clip's models have GELU where their name does not say otherwise; Transformers' default is OpenAI's approximation.
    return copy.deepcopy(MODELS[plain_name]) | {"quick_gelu": is_quick}


def clip_config(model_name: str, token_ids: Mapping[str, int], weights: Mapping[str, torch.Tensor] | None = None) -> CLIPConfig:
    """The configuration of a model of open_clip, with the sizes of weights. Raises ConfigError for an unknown name."""
    return config_of_model_cfg(with_sizes_of(weights or {}, named_model_cfg(model_name)), token_ids)


def config_of_model_cfg(model_cfg: Mapping[str, Any], token_ids: Mapping[str, int]) -> CLIPConfig:
    """The configuration of Transformers for a `model_cfg`.

    Args:
        token_ids: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`; by default the last of the vocabulary,
            and the token that texts are pooled at.

    Raises:
        ConfigError: it has a part that a CLIP of Transformers has not.
    """
    vision, text = _part(model_cfg, "vision_cfg"), _part(model_cfg, "text_cfg")
    if unknown := [key for key, value in model_cfg.items() if key not in _TOP_KEYS and value]:
        fail(f"model_cfg.{unknown[0]}: a CLIP of Transformers has no such part")
    if not isinstance(model_cfg.get("embed_dim"), int):
        fail(f"model_cfg.embed_dim={model_cfg.get('embed_dim')!r}: must be a whole number")

    def tower(part: dict[str, Any], heads: int) -> dict[str, Any]:
        inner = int(part["mlp_ratio"] * part["width"])  # as open_clip rounds it
        sizes = {"hidden_size": part["width"], "intermediate_size": inner, "num_hidden_layers": part["layers"]}
        norms = {"eps": 1e-5} | (part.get("norm_kwargs") or {})
        if len(norms) > 1:
            fail(f"norm_kwargs={part['norm_kwargs']!r}: a CLIP of Transformers has eps alone there")
        activation = _activation(part, bool(model_cfg.get("quick_gelu")))
        sizes |= {"num_attention_heads": heads, "hidden_act": activation, "layer_norm_eps": norms["eps"]}
        return sizes | {"projection_dim": model_cfg["embed_dim"]}

    last = text["vocab_size"] - 1
    return CLIPConfig(
        vision_config=tower(vision, heads=vision["width"] // vision["head_width"])
        | {"image_size": vision["image_size"], "patch_size": vision["patch_size"]},
        text_config=tower(text, heads=text["heads"])
        | {"vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"]}
        | {
            "bos_token_id": last - 1,
            "eos_token_id": _end_token(text),
            "pad_token_id": last,
        }
        | dict(token_ids),
        projection_dim=model_cfg["embed_dim"],
    )


def _part(model_cfg: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tower's part with open_clip's defaults. Raises ConfigError for what a CLIP of Transformers has not."""
    given = model_cfg.get(name)
    if not isinstance(given, Mapping):
        fail(f"model_cfg.{name}: must be there, with the sizes of a tower")
    part = _DEFAULTS[name] | {key: value for key, value in given.items() if value is not None}
    for key, value in part.items():
        allowed = _TEXT_POOLS if (name, key) == ("text_cfg", "pool_type") else _ONE_FORM.get(key, ())
        is_read = key in _WITHOUT_EFFECT or (key in _DEFAULTS[name] and key != "pool_type")
        if value and not is_read and value not in allowed:
            fail(f"model_cfg.{name}.{key}={value!r}: a CLIP of Transformers has no such part")
    for key in ("image_size", "patch_size"):
        if isinstance(part.get(key), list) and len(set(part[key])) == 1:
            part[key] = part[key][0]
    for key in ("layers", "width", "head_width", "patch_size", "image_size", "context_length", "vocab_size", "heads"):
        if key in part and not isinstance(part[key], int):
            fail(f"model_cfg.{name}.{key}={part[key]!r}: a CLIP of Transformers has one whole number there")
    if not isinstance(part["mlp_ratio"], (int, float)):
        fail(f"model_cfg.{name}.mlp_ratio={part['mlp_ratio']!r}: must be a number")
    return part


def _activation(part: Mapping[str, Any], is_quick: bool) -> str:
    if not part.get("act_kwargs"):
        return "quick_gelu" if is_quick else "gelu"
    if is_quick or part["act_kwargs"] != TANH_GELU:
        fail(f"act_kwargs={part['act_kwargs']!r}: Transformers has open_clip's GELU plain, or with {TANH_GELU}")
    return "gelu_pytorch_tanh"


def end_token(model_cfg: Mapping[str, Any]) -> int:
    """The token that texts are pooled at, as a configuration of Transformers says it: 2 is the highest of a caption."""
    return _end_token(_part(model_cfg, "text_cfg"))


def _end_token(text: Mapping[str, Any]) -> int:
    if text["pool_type"] == "eos":
        if text["eos_id"] == LEGACY_END_TOKEN:
            fail("model_cfg.text_cfg.eos_id=2: of this end token Transformers pools at the highest id of a caption instead")
        return text["eos_id"]
    is_own = not text["hf_tokenizer_name"] and text["vocab_size"] == OPEN_CLIP_VOCABULARY
    return OPEN_CLIP_VOCABULARY - 1 if is_own else LEGACY_END_TOKEN


def spelled(name: str) -> str:
    """A model's name, in the one spelling that all of it become."""
    return name.lower().replace("/", "-").replace("_", "-").replace("@", "-")


def with_sizes_of(weights: Mapping[str, torch.Tensor], cfg: dict[str, Any]) -> dict[str, Any]:
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


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """open_clip's `model_cfg` of a configuration. Raises ConfigError for an activation that open_clip does not have."""
    vision, text = config.vision_config, config.text_config
    activations = {vision.hidden_act, text.hidden_act}
    if not activations <= {"gelu", "gelu_pytorch_tanh"} and activations != {"quick_gelu"}:
        found = f"hidden_act {vision.hidden_act!r}, {text.hidden_act!r}"
        raise ConfigError(f"{found}: open_clip has gelu, gelu_pytorch_tanh, or quick_gelu, for both towers")
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": mlp_ratio(vision),
            "patch_size": vision.patch_size,
            **_norms_and_activation(vision),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": mlp_ratio(text),
            # open_clip's default pools at the highest id, its own tokenizer's end token; this names the folder's.
            **(
                {"pool_type": "argmax"}
                if text.eos_token_id == LEGACY_END_TOKEN
                else {"pool_type": "eos", "eos_id": text.eos_token_id}
            ),
            "hf_tokenizer_name": "local",
            **_norms_and_activation(text),
        },
    }


def mlp_ratio(tower: Any) -> float:
    """The ratio of which open_clip, which cuts the product off, makes the size."""
    ratio = tower.intermediate_size / tower.hidden_size
    return ratio if int(ratio * tower.hidden_size) == tower.intermediate_size else math.nextafter(ratio, math.inf)


def _norms_and_activation(tower: CLIPTextConfig | Any) -> dict[str, Any]:
    """What open_clip has otherwise by default, and therefore has to be said."""
    norms = {} if tower.layer_norm_eps == 1e-5 else {"norm_kwargs": {"eps": tower.layer_norm_eps}}
    return norms | ({"act_kwargs": TANH_GELU} if tower.hidden_act == "gelu_pytorch_tanh" else {})
