"""open_clip's names for CLIP's weights.

Shapes: D width, E projection size, P patch size, L patches, S context length.
"""

from collections.abc import Mapping

import torch

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
LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
LAYER |= {"self_attn.out_proj": "attn.out_proj"}
QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")


def to_open_clip_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a `CLIPModel` under open_clip's names; queries, keys and values become one matrix (3 D, D)."""
    converted = {}
    for name, weight in weights.items():
        theirs, is_transposed = _open_clip_name(name)
        if theirs.endswith(".q_proj"):
            parts = [weights[name.replace("q_proj", part)] for part in QUERY_KEY_VALUE]
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
        if part in QUERY_KEY_VALUE:
            converted[name] = weights[base].chunk(3)[QUERY_KEY_VALUE.index(part)].clone()
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
    if part in LAYER:
        return f"{block}.{LAYER[part]}.{kind}", False
    return f"{block}.attn.in_proj_{kind}.{part.removeprefix('self_attn.')}", False
