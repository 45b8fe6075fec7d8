"""open_clip's names for SigLIP's weights: timm's in the picture tower, its own in the text tower, without their `text.`.

Shapes: D width, E projection size, P patch size, L patches, S context length.
"""

from collections.abc import Mapping

import torch

from .open_clip_weights import LAYER, QUERY_KEY_VALUE

_OUTSIDE_TEXT = ("visual.", "logit_")
_TRUNK = "visual.trunk"
_TOP = {
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
    "vision_model.embeddings.position_embedding.weight": f"{_TRUNK}.pos_embed",  # (L, D), there (1, L, D)
    "vision_model.head.probe": f"{_TRUNK}.attn_pool.latent",  # (1, 1, D)
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",  # (S, D)
}
_MODULES = {
    "vision_model.embeddings.patch_embedding": f"{_TRUNK}.patch_embed.proj",  # (D, 3, P, P)
    "vision_model.post_layernorm": f"{_TRUNK}.norm",
    "vision_model.head.attention.out_proj": f"{_TRUNK}.attn_pool.proj",
    "vision_model.head.layernorm": f"{_TRUNK}.attn_pool.norm",
    "vision_model.head.mlp.fc1": f"{_TRUNK}.attn_pool.mlp.fc1",
    "vision_model.head.mlp.fc2": f"{_TRUNK}.attn_pool.mlp.fc2",
    "text_model.final_layer_norm": "ln_final",
    "text_model.head": "text_projection",  # (E, D)
}
_POOL = "vision_model.head.attention.in_proj"  # (3 D, D); there a query (D, D), and a key and value (2 D, D)
# Layers here: layers there, the names of their parts, and that of the one matrix of queries, keys and values (3 D, D).
_TIMM_LAYER = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_TIMM_LAYER |= {"self_attn.out_proj": "attn.proj"}
_TOWERS = {
    "vision_model.encoder.layers": (f"{_TRUNK}.blocks", _TIMM_LAYER, "attn.qkv."),
    "text_model.encoder.layers": ("transformer.resblocks", LAYER, "attn.in_proj_"),
}


def to_open_clip_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a `SiglipModel` under open_clip's names."""
    converted = {}
    for name, weight in weights.items():
        theirs, part = _open_clip_name(name)
        if name.startswith(_POOL):
            width = len(weight) // 3
            converted[theirs.format("q")], converted[theirs.format("kv")] = weight[:width].clone(), weight[width:].clone()
        elif part == QUERY_KEY_VALUE[0]:
            converted[theirs] = torch.cat([weights[name.replace(part, other)] for other in QUERY_KEY_VALUE])
        elif not part:
            converted[theirs] = weight.reshape(_shape_there(theirs, weight.shape))
    return converted


def siglip_file_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as a file of open_clip has it, where the text tower is a part; reading a file leaves its prefix out."""
    converted = to_open_clip_weights(weights).items()
    return {name if name.startswith(_OUTSIDE_TEXT) else f"text.{name}": weight for name, weight in converted}


def from_open_clip_weights(weights: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """open_clip's weights under the names of a `SiglipModel`.

    Args:
        names: those of its weights.
    """
    converted = {}
    for name in names:
        theirs, part = _open_clip_name(name)
        if name.startswith(_POOL):
            converted[name] = torch.cat([weights[theirs.format("q")], weights[theirs.format("kv")]])
        elif part:
            converted[name] = weights[theirs].chunk(3)[QUERY_KEY_VALUE.index(part)].clone()
        elif theirs == f"{_TRUNK}.pos_embed":
            converted[name] = weights[theirs][0]
        else:
            converted[name] = weights[theirs].reshape(1) if theirs.startswith("logit_") else weights[theirs]
    return converted


def _shape_there(theirs: str, shape: torch.Size) -> tuple[int, ...]:
    if theirs.startswith("logit_"):
        return ()
    return (1, *shape) if theirs == f"{_TRUNK}.pos_embed" else tuple(shape)


def _open_clip_name(name: str) -> tuple[str, str]:
    """open_clip's name of a weight, and which part it is there, such as `q_proj`; the part is empty where it is whole."""
    if name in _TOP:
        return _TOP[name], ""
    if name.startswith(_POOL):
        return f"{_TRUNK}.attn_pool.{{}}.{name.removeprefix(f'{_POOL}_')}", ""
    module, _, kind = name.rpartition(".")  # kind: weight or bias
    if module in _MODULES:
        return f"{_MODULES[module]}.{kind}", ""
    tower = next(tower for tower in _TOWERS if name.startswith(tower))
    layers, parts, query_key_value = _TOWERS[tower]
    number, _, part = module.removeprefix(f"{tower}.").partition(".")
    if part in parts:
        return f"{layers}.{number}.{parts[part]}.{kind}", ""
    return f"{layers}.{number}.{query_key_value}{kind}", part.removeprefix("self_attn.")
