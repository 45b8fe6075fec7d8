"""The attention that MaskCLIP models use by default: SDPA; on a CPU what was measured to be faster than that in training; on
CUDA PyTorch's kernel for sequences of different lengths.

It is registered with Transformers under the name `"fastest"`; `attn_implementation="sdpa"` (or `"eager"`,
`"flash_attention_2"`, ...) chooses another one as for any model.

Shapes: B batch, H heads, S tokens, T packed tokens of the batch, D width, E = D / H.
"""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None

DEFAULT_ATTENTION = "fastest"
HALF_PRECISIONS = (torch.bfloat16, torch.float16)


def takes_packed_tokens(config: Any, states: torch.Tensor) -> bool:
    """Whether the attention of a tower takes sequences one after another, and so without padding.

    A flash attention does, which is asked for by name. The default one does where PyTorch's own kernel runs.

    Args:
        config: of the tower.
        states: that its layers are given, which tell device and precision.
    """
    if is_flash_attention_requested(config):
        return True
    return config._attn_implementation == DEFAULT_ATTENTION and _varlen_kernel_takes(config, states)


def _varlen_kernel_takes(config: Any, states: torch.Tensor) -> bool:
    """Whether PyTorch's kernel for different lengths takes what the layers of a tower make of states."""
    if varlen_attn is None or states.device.type != "cuda" or config.attention_dropout:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else states.dtype
    head_dim = config.hidden_size // config.num_attention_heads
    return dtype in HALF_PRECISIONS and head_dim % 8 == 0 and head_dim <= 256 and _has_flash_kernels(states.device.index)


@torch.compiler.assume_constant_result
def _has_flash_kernels(device: int | None) -> bool:
    """Whether PyTorch has its flash kernels for a CUDA device; they need an Ampere GPU or a later one."""
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def fastest_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    is_causal=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    **kwargs,
):
    """Attention of query, key and value (B, H, S, E); returns (B, S, H, E) and no weights.

    On a CPU, training in half precision takes plain matrix products, whose backward pass is the cheaper one at CLIP's lengths;
    everything else takes SDPA, so that evaluation and float32 are CLIP's to the last bit.

    Args:
        cu_seq_lens_q: IntTensor (B + 1,), where each sequence of packed tokens (1, H, T, E) begins, and the last one ends.
        max_length_q: no sequence is longer.
    """
    if cu_seq_lens_q is not None:
        packed = (heads[0].transpose(0, 1) for heads in (query, key, value))  # (T, H, E)
        # Scaled by 1 / sqrt(E), which is the scaling of all families. The first PyTorch that has it takes no other.
        return varlen_attn(*packed, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)[None], None
    if query.device.type == "cpu" and module.training and query.dtype in HALF_PRECISIONS:
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


AttentionInterface.register(DEFAULT_ATTENTION, fastest_attention)
AttentionMaskInterface.register(DEFAULT_ATTENTION, sdpa_mask)
