"""open_clip's SigLIP architectures (`model_cfg`) as configurations of Transformers, and back.

Their picture tower is timm's, which open_clip knows by its name alone, and their text tower is open_clip's own.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from transformers import SiglipConfig, SiglipVisionConfig

from ..errors import fail
from .open_clip_architecture import TANH_GELU, mlp_ratio, spelled

GELU, TANH = "gelu", "gelu_pytorch_tanh"
NORM_EPS = 1e-6  # of timm's vision transformers
POSITIONS = "visual.trunk.pos_embed"  # (1, L, D)
SQUASHED = {"resize_mode": "squash", "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}


class Tower(NamedTuple):
    """What the name of a picture tower of timm says, apart from the size of its pictures."""

    width: int
    layers: int
    heads: int
    inner: int  # of the feed-forward layers
    patch_size: int
    activation: str


def _towers(name: str, sizes: tuple[int, ...], *tower: Any) -> dict[str, tuple[Tower, int]]:
    return {f"{name}_siglip_{size}": (Tower(*tower), size) for size in sizes}


# timm's name: tower, and the pixels of a side of its pictures. Only pooling by attention is a SigLIP of Transformers.
TOWERS = {
    **_towers("vit_base_patch32", (256,), 768, 12, 12, 3072, 32, TANH),
    **_towers("vit_base_patch16", (224, 256, 384, 512), 768, 12, 12, 3072, 16, GELU),
    **_towers("vit_large_patch16", (256, 384), 1024, 24, 16, 4096, 16, GELU),
    **_towers("vit_large_patch16", (512,), 1024, 24, 16, 4096, 16, TANH),
    **_towers("vit_so400m_patch14", (224, 378, 384), 1152, 27, 16, 4304, 14, GELU),
    **_towers("vit_so400m_patch16", (256, 384, 512), 1152, 27, 16, 4304, 16, TANH),
    **_towers("vit_giantopt_patch16", (256, 384), 1536, 40, 16, 6144, 16, TANH),
}
_BASE = {"width": 768, "heads": 12, "layers": 12}
_LARGE = {"width": 1024, "heads": 16, "layers": 24}
_SO400M = {"width": 1152, "heads": 16, "layers": 27, "mlp_ratio": 3.7362}
_FORM = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}  # the one that a SigLIP of Transformers has
_ENGLISH = {"vocab_size": 32_000, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}
_MULTILINGUAL = {"vocab_size": 250_000, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP-i18n-256"}
# Of published vocabularies: the token that fills a text, to which the text tower attends.
PAD_TOKENS = {32_000: 1, 250_000: 1, 256_000: 0}


def _model_cfg(tower: str, text: Mapping[str, Any], tokens: Mapping[str, Any], context_length: int = 64) -> dict[str, Any]:
    width, image_size = TOWERS[tower][0].width, TOWERS[tower][1]
    vision = {"image_size": image_size, "timm_model_name": tower, "timm_model_pretrained": False}
    text = {"context_length": context_length, "tokenizer_kwargs": {"clean": "canonicalize"}, **text, **tokens, **_FORM}
    return {
        "embed_dim": width,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision | {"timm_pool": "map", "timm_proj": "none"},
        "text_cfg": text | {"norm_kwargs": {"eps": 1e-6}},
    }


def _second(name: str, tower: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """A SigLIP 2, of which each model has a tokenizer under its own name."""
    tokens = {"vocab_size": 256_000, "hf_tokenizer_name": f"timm/{name}", "act_kwargs": TANH_GELU}
    return {name: _model_cfg(tower, text, tokens)}


MODELS = {
    "ViT-B-16-SigLIP": _model_cfg("vit_base_patch16_siglip_224", _BASE, _ENGLISH),
    "ViT-B-16-SigLIP-256": _model_cfg("vit_base_patch16_siglip_256", _BASE, _ENGLISH),
    "ViT-B-16-SigLIP-384": _model_cfg("vit_base_patch16_siglip_384", _BASE, _ENGLISH),
    "ViT-B-16-SigLIP-512": _model_cfg("vit_base_patch16_siglip_512", _BASE, _ENGLISH),
    "ViT-B-16-SigLIP-i18n-256": _model_cfg("vit_base_patch16_siglip_256", _BASE, _MULTILINGUAL),
    "ViT-L-16-SigLIP-256": _model_cfg("vit_large_patch16_siglip_256", _LARGE, _ENGLISH),
    "ViT-L-16-SigLIP-384": _model_cfg("vit_large_patch16_siglip_384", _LARGE, _ENGLISH),
    "ViT-SO400M-14-SigLIP": _model_cfg("vit_so400m_patch14_siglip_224", _SO400M, _ENGLISH, context_length=16),
    "ViT-SO400M-14-SigLIP-378": _model_cfg("vit_so400m_patch14_siglip_378", _SO400M, _ENGLISH),
    "ViT-SO400M-14-SigLIP-384": _model_cfg("vit_so400m_patch14_siglip_384", _SO400M, _ENGLISH),
    **_second("ViT-B-32-SigLIP2-256", "vit_base_patch32_siglip_256", _BASE),
    **_second("ViT-B-16-SigLIP2", "vit_base_patch16_siglip_224", _BASE),
    **_second("ViT-B-16-SigLIP2-256", "vit_base_patch16_siglip_256", _BASE),
    **_second("ViT-B-16-SigLIP2-384", "vit_base_patch16_siglip_384", _BASE),
    **_second("ViT-B-16-SigLIP2-512", "vit_base_patch16_siglip_512", _BASE),
    **_second("ViT-L-16-SigLIP2-256", "vit_large_patch16_siglip_256", _LARGE),
    **_second("ViT-L-16-SigLIP2-384", "vit_large_patch16_siglip_384", _LARGE),
    **_second("ViT-L-16-SigLIP2-512", "vit_large_patch16_siglip_512", _LARGE),
    **_second("ViT-SO400M-14-SigLIP2", "vit_so400m_patch14_siglip_224", _SO400M),
    **_second("ViT-SO400M-14-SigLIP2-378", "vit_so400m_patch14_siglip_378", _SO400M),
    **_second("ViT-SO400M-16-SigLIP2-256", "vit_so400m_patch16_siglip_256", _SO400M),
    **_second("ViT-SO400M-16-SigLIP2-384", "vit_so400m_patch16_siglip_384", _SO400M),
    **_second("ViT-SO400M-16-SigLIP2-512", "vit_so400m_patch16_siglip_512", _SO400M),
    **_second("ViT-gopt-16-SigLIP2-256", "vit_giantopt_patch16_siglip_256", _SO400M),
    **_second("ViT-gopt-16-SigLIP2-384", "vit_giantopt_patch16_siglip_384", _SO400M),
}

# What open_clip takes where a text_cfg is silent.
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
_TEXT |= {"no_causal_mask": False, "proj_bias": False, "pool_type": "argmax", "proj_type": "linear"}
_TEXT |= {"norm_kwargs": None, "act_kwargs": None, "tokenizer_kwargs": None}
_VISION = {"image_size": 224, "timm_pool": "avg", "timm_proj": "linear"}
_ONE_FORM: dict[str, dict[str, Any]] = {
    "vision_cfg": {"timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {**_FORM, "proj_type": "linear", "block_type": "default"},
}
# Of a tower that timm makes, of training alone, or read elsewhere.
_WITHOUT_EFFECT = {
    "vision_cfg": (
        *("timm_model_name", "timm_model_pretrained", "timm_proj_bias", "timm_drop", "timm_drop_path", "patch_dropout"),
        *("layers", "width", "head_width", "mlp_ratio", "patch_size", "pool_type", "attn_pooler_queries", "attn_pooler_heads"),
        *("pos_embed_type", "act_kwargs", "norm_kwargs", "output_tokens"),
    ),
    "text_cfg": (
        *("hf_tokenizer_name", "pad_id", "eos_id", "output_tokens", "final_ln_after_pool"),
        *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    ),
}
_TOP_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale", "init_logit_bias")
_TOP_KEYS += ("nonscalar_logit_scale",)
CLEANINGS = ("canonicalize", "lower", "whitespace")


def is_siglip(model_cfg: Mapping[str, Any]) -> bool:
    """Whether the picture tower is one of SigLIP's; what Transformers has not of it is said where it is read."""
    vision = model_cfg.get("vision_cfg")
    return isinstance(vision, Mapping) and "siglip" in str(vision.get("timm_model_name") or "")


def named_model_cfg(model_name: str) -> dict[str, Any]:
    """The `model_cfg` of a SigLIP of open_clip by its name, in any spelling. Raises ConfigError for an unknown name."""
    by_spelling = {spelled(name): name for name in MODELS}
    if spelled(model_name) not in by_spelling:
        fail(f"open_clip model {model_name!r}: of SigLIP it must be one of {', '.join(MODELS)}")
    return copy.deepcopy(MODELS[by_spelling[spelled(model_name)]])


def config_of_model_cfg(model_cfg: Mapping[str, Any], token_ids: Mapping[str, int | None]) -> SiglipConfig:
    """The configuration of Transformers for a `model_cfg`.

    Args:
        token_ids: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`; by default those of SigLIP.

    Raises:
        ConfigError: it has a part that a SigLIP of Transformers has not.
    """
    if unknown := [key for key, value in model_cfg.items() if key not in _TOP_KEYS and value]:
        _refuse(unknown[0], model_cfg[unknown[0]], "a SigLIP of Transformers has no such part")
    vision, text = _part(model_cfg, "vision_cfg", _VISION), _part(model_cfg, "text_cfg", _TEXT)
    name = vision["timm_model_name"]
    if name not in TOWERS:
        _refuse("vision_cfg.timm_model_name", name, f"must be one of {', '.join(TOWERS)}")
    tower, _ = TOWERS[name]
    cleaning_of_model_cfg(model_cfg)
    if model_cfg.get("embed_dim") != tower.width:
        _refuse("embed_dim", model_cfg.get("embed_dim"), f"must be {tower.width}, the width of {name}")
    return SiglipConfig(
        vision_config=_sizes(tower.width, tower.layers, tower.heads, tower.inner)
        | {"image_size": vision["image_size"], "patch_size": tower.patch_size}
        | {"hidden_act": tower.activation, "layer_norm_eps": NORM_EPS},
        text_config=_sizes(text["width"], text["layers"], text["heads"], int(text["mlp_ratio"] * text["width"]))
        | {"vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"]}
        | {"hidden_act": _activation(text), "layer_norm_eps": _norm_eps(text), "projection_size": tower.width}
        | {"pad_token_id": PAD_TOKENS.get(text["vocab_size"], 1), "bos_token_id": None, "eos_token_id": 1}
        | dict(token_ids),
    )


def _sizes(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }


def _part(model_cfg: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's part with open_clip's defaults. Raises ConfigError for what a SigLIP of Transformers has not."""
    given = model_cfg.get(name)
    if not isinstance(given, Mapping):
        fail(f"model_cfg.{name}: must be there, with the sizes of a tower")
    part = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    one_form = _ONE_FORM[name]
    known = (*one_form, *defaults, *_WITHOUT_EFFECT[name])
    if unknown := [key for key, value in part.items() if value and key not in known]:
        _refuse(f"{name}.{unknown[0]}", part[unknown[0]], "a SigLIP of Transformers has no such part")
    for key, value in part.items():
        if key in one_form and value != one_form[key]:
            _refuse(f"{name}.{key}", value, f"a SigLIP of Transformers has {one_form[key]!r} there")
    if isinstance(part.get("image_size"), list) and len(set(part["image_size"])) == 1:
        part["image_size"] = part["image_size"][0]
    for key in ("image_size", "layers", "width", "context_length", "vocab_size", "heads"):
        if key in defaults and not isinstance(part[key], int):
            _refuse(f"{name}.{key}", part[key], "must be one whole number")
    if not isinstance(part.get("mlp_ratio", 4.0), (int, float)):
        _refuse(f"{name}.mlp_ratio", part["mlp_ratio"], "must be a number")
    return part


def _refuse(key: str, value: Any, allowed: str) -> NoReturn:
    fail(f"model_cfg.{key}={value!r}: {allowed}")


def _activation(text: Mapping[str, Any]) -> str:
    if text["act_kwargs"] not in (None, {}, TANH_GELU):
        _refuse("text_cfg.act_kwargs", text["act_kwargs"], f"must be none, or {TANH_GELU}")
    return TANH if text["act_kwargs"] else GELU


def _norm_eps(text: Mapping[str, Any]) -> float:
    norms = {"eps": 1e-5} | (text["norm_kwargs"] or {})
    if len(norms) > 1:
        _refuse("text_cfg.norm_kwargs", text["norm_kwargs"], "must have eps alone")
    return norms["eps"]


def cleaning_of_model_cfg(model_cfg: Mapping[str, Any]) -> str:
    """How open_clip cleans a text before its tokenizer. Raises ConfigError for another treatment of texts."""
    given = model_cfg["text_cfg"].get("tokenizer_kwargs") or {}
    clean = given.get("clean", "whitespace")
    if set(given) - {"clean"} or clean not in CLEANINGS:
        _refuse("text_cfg.tokenizer_kwargs", given, f"must be none, or clean: {', '.join(CLEANINGS)}")
    return clean


def with_sizes_of(weights: Mapping[str, torch.Tensor], cfg: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the image size and the context length that weights have.

    The vocabulary stays: another one is that of another SigLIP, whose text tower has another GELU.
    """
    cfg = copy.deepcopy(cfg)
    vision, positions, places = cfg["vision_cfg"], weights.get(POSITIONS), weights.get("positional_embedding")
    if positions is not None and positions.ndim == 3:
        patch_size, side = TOWERS[vision["timm_model_name"]][0].patch_size, math.isqrt(positions.shape[1])
        # A picture may be larger than its patches: 384 pixels are 27 patches of 14, and so are 378.
        if vision["image_size"] // patch_size != side and side**2 == positions.shape[1]:
            vision["image_size"] = side * patch_size
    if places is not None and places.ndim == 2:
        cfg["text_cfg"]["context_length"] = len(places)
    return cfg


def model_cfg_of(config: SiglipConfig, clean: str) -> dict[str, Any]:
    """open_clip's `model_cfg` of a configuration.

    Args:
        clean: how open_clip has to clean a text before the tokenizer that lies beside it.

    Raises:
        ConfigError: timm has no such picture tower, or open_clip no such text tower.
    """
    vision, text = config.vision_config, config.text_config
    name = _timm_name(vision)
    if text.projection_size != vision.hidden_size:
        fail(f"text_config.projection_size={text.projection_size}: must be {vision.hidden_size}, vision_config.hidden_size")
    if text.hidden_act not in (GELU, TANH):
        fail(f"text_config.hidden_act={text.hidden_act!r}: open_clip has {GELU} and {TANH}")
    return {
        "embed_dim": vision.hidden_size,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": name,
            "timm_model_pretrained": False,
            **_ONE_FORM["vision_cfg"],
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "hf_tokenizer_name": "local",
            "tokenizer_kwargs": {"clean": clean},
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": mlp_ratio(text),
            "norm_kwargs": {"eps": text.layer_norm_eps},
            **({"act_kwargs": TANH_GELU} if text.hidden_act == TANH else {}),
            **_FORM,
        },
    }


def _timm_name(vision: SiglipVisionConfig) -> str:
    """timm's name of a picture tower, whatever its GELU. Raises ConfigError where timm has none."""
    if not vision.vision_use_head or vision.num_channels != 3 or vision.layer_norm_eps != NORM_EPS:
        found = f"vision_use_head {vision.vision_use_head}, num_channels {vision.num_channels}, layer_norm_eps "
        fail(f"vision_config: {found}{vision.layer_norm_eps}: timm's SigLIP has True, 3, {NORM_EPS}")
    sizes = (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size)
    fitting = {name: size for name, (tower, size) in TOWERS.items() if tower[:5] == (*sizes, vision.patch_size)}
    if not fitting:
        names = "hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, patch_size"
        known = ", ".join(dict.fromkeys(name.rpartition("_")[0] for name in TOWERS))
        fail(f"SigLIP's vision_config: {names} are {(*sizes, vision.patch_size)}: timm, open_clip's source, has {known}")
    if vision.image_size not in fitting.values():
        sizes_there = ", ".join(map(str, fitting.values()))
        fail(f"SigLIP's vision_config.image_size={vision.image_size}: timm has such a tower for {sizes_there}")
    return next(name for name, size in fitting.items() if size == vision.image_size)


def other_activation(config: SiglipConfig) -> str:
    """What to say where timm's picture tower has another GELU than the model, which no file can change; else empty."""
    name, ours = _timm_name(config.vision_config), config.vision_config.hidden_act
    theirs = TOWERS[name][0].activation
    if ours == theirs:
        return ""
    return f"the picture tower has {ours} here and {theirs} in timm's {name}: its features there differ slightly"
