"""The attention that MaskCLIP models use by default: SDPA, and on a CPU what was measured to be faster than that in training.

It is registered with Transformers under the name `"fastest"`; `attn_implementation="sdpa"` (or `"eager"`,
`"flash_attention_2"`, ...) chooses another one as for any model.

Shapes: B batch, H heads, S tokens, E = D / H.
"""

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def fastest_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs):
    """Attention of query, key and value (B, H, S, E); returns (B, S, H, E) and no weights.

    On a CPU, training in half precision takes plain matrix products, whose backward pass is the cheaper one at CLIP's lengths;
    everything else takes SDPA, so that evaluation and float32 are CLIP's to the last bit.
    """
    if query.device.type == "cpu" and module.training and query.dtype in (torch.bfloat16, torch.float16):
        causal = module.is_causal if is_causal is None else is_causal
        return _matrix_products(query, key, value, attention_mask, scaling, dropout, causal), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
    )


def _matrix_products(query, key, value, attention_mask, scaling, dropout, is_causal) -> torch.Tensor:
    """softmax(query key^T scaling) value, as (B, S, H, E); `attention_mask` (B, 1, S, S) is True where attention is allowed."""
    if attention_mask is None and is_causal:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    # The query is scaled, which is smaller than the scores.
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))  # (B, H, S, S)
    if attention_mask is not None:
        # In place: the backward pass does not need the scores before the mask.
        scores = scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(dim=-1), dropout)  # a softmax in half precision sums in float32
    return torch.matmul(weights, value).transpose(1, 2)


DEFAULT_ATTENTION = "fastest"
AttentionInterface.register(DEFAULT_ATTENTION, fastest_attention)
AttentionMaskInterface.register(DEFAULT_ATTENTION, sdpa_mask)
