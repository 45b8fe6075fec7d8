"""Encoding sequences of different lengths without padding: linear layers, norms and MLPs see the T real tokens only.

Packed tokens are (1, T, D): the sequences one after another. Attention alone is per image: by a variable-length kernel where
[`takes_packed_tokens`] says so, else padded inside the attention call.

Shapes: B batch, S padded length of a sequence, T packed tokens of the batch, D width, H heads, E = D / H.
"""

from typing import Any, NamedTuple

import torch
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from .attention import takes_packed_tokens
from .masked_parts import Joined


class Packing(NamedTuple):
    """Where the packed tokens of a batch lie.

    Attributes:
        positions: LongTensor (T,), the position of each packed token in the padded (B * S) layout, ascending.
        lengths: LongTensor (B,), the tokens of each sequence.
        padded_length: S.
        attention_mask: what an attention of padded tokens takes to leave out padding, (B, 1, S, S) or None.
        ends: IntTensor (B + 1,), for an attention of packed tokens: 0, and where each sequence ends.
    """

    positions: torch.LongTensor
    lengths: torch.LongTensor
    padded_length: int
    attention_mask: torch.Tensor | None = None
    ends: torch.IntTensor | None = None

    @classmethod
    @torch.compiler.disable
    def of(cls, is_token: torch.BoolTensor) -> "Packing":
        """The packing of sequences whose real tokens are marked in a BoolTensor (B, S); a row's come first.

        T is a size, so this waits for the device, and ends a graph that is compiled. The graph that follows takes any T, from
        its first batch on.
        """
        positions = is_token.flatten().nonzero()[:, 0]
        torch._dynamo.maybe_mark_dynamic(positions, 0)
        return cls(positions, is_token.sum(dim=1), is_token.shape[1])

    def for_attention(self, config: Any, states: torch.Tensor) -> "Packing":
        """With what the attention of a tower's configuration takes, for states (B, S, D): `ends`, or a mask."""
        if takes_packed_tokens(config, states):
            return self._replace(ends=torch.nn.functional.pad(self.lengths.cumsum(dim=0), (1, 0)).int())
        is_token = torch.arange(self.padded_length, device=self.lengths.device) < self.lengths[:, None]  # (B, S)
        # Without padding there is no need of a mask, but to see that would be to wait for a GPU.
        looks = states.device.type == "cpu"
        mask = create_bidirectional_mask(config, states, is_token, allow_is_bidirectional_skip=looks)
        return self._replace(attention_mask=mask)

    @property
    def starts(self) -> torch.LongTensor:
        """The position (B,) of each sequence's first token among the packed ones."""
        return self.lengths.cumsum(dim=0) - self.lengths

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, S, D) to (T, D)."""
        return _Pack.apply(padded.flatten(0, 1), self.positions)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """(T, D) to (B, S, D), zeros in the padding."""
        padded = _Unpack.apply(packed, self.positions, len(self.lengths) * self.padded_length)
        return padded.view(len(self.lengths), self.padded_length, -1)


class _Pack(torch.autograd.Function):
    """Rows `positions` of (N, D). Each is taken once, so the gradient is a copy, which autograd would sum up instead."""

    @staticmethod
    def forward(ctx, padded: torch.Tensor, positions: torch.LongTensor) -> torch.Tensor:
        ctx.save_for_backward(positions)
        ctx.num_rows = len(padded)
        return padded.index_select(0, positions)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return _scatter_rows(gradient, *ctx.saved_tensors, ctx.num_rows), None


class _Unpack(torch.autograd.Function):
    """The transpose of [`_Pack`]: rows go to `positions` of (N, D)."""

    @staticmethod
    def forward(ctx, packed: torch.Tensor, positions: torch.LongTensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(positions)
        return _scatter_rows(packed, positions, num_rows)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient.index_select(0, *ctx.saved_tensors), None, None


def _scatter_rows(rows: torch.Tensor, positions: torch.LongTensor, num_rows: int) -> torch.Tensor:
    return rows.new_zeros(num_rows, rows.shape[1]).index_copy_(0, positions, rows)


class PackedAttention(Joined):
    """The attention of CLIP's and SigLIP's layers, which also takes packed tokens, by `packing`."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packing: Packing | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the class's own `forward`; with a packing, `hidden_states` are (1, T, D)."""
        if packing is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        states = (projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj))  # (1, T, D)
        is_packed = packing.ends is not None
        if is_packed:
            kwargs |= {"cu_seq_lens_q": packing.ends, "cu_seq_lens_k": packing.ends}
            kwargs |= {"max_length_q": packing.padded_length, "max_length_k": packing.padded_length}
        else:
            states = (packing.unpack(state[0]) for state in states)  # (B, S, D)
        heads = [state.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for state in states]  # (B, H, S, E)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        output, weights = attention(self, *heads, packing.attention_mask, scaling=self.scale, dropout=dropout, **kwargs)
        output = output.flatten(2)  # (B, S, H, E) to (B, S, D)
        return self.out_proj(output if is_packed else packing.pack(output)[None]), weights
