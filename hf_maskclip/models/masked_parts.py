"""The parts of a vision tower that take some of an image's patches: embeddings and the pooling head.

Each is a mixin. `join` puts it before the class of a part that is there: weights, keys and the class's name stay.

Shapes: B batch, C channels, L patches of an image, K kept patches, P patch side in pixels, D width.
"""

import math
from functools import cache, reduce
from typing import Any

import torch
from torch import nn

from .patch_masking import PatchSelection, patch_grid, patchify


class Joined:
    """Base of the mixins. What is joined has no name of its own, so copies and pickles make it again from its classes."""

    _mixin: type
    _plain: type

    def __reduce_ex__(self, protocol):
        plain, mixins = type(self), []
        while "_mixin" in vars(plain):
            mixins.append(plain._mixin)
            plain = plain._plain
        return (_new, (plain, *reversed(mixins)), self.__getstate__()) if mixins else super().__reduce_ex__(protocol)


def _new(plain: type, *mixins: type) -> Any:
    joined = reduce(lambda joined, mixin: join(mixin, joined), mixins, plain)
    return joined.__new__(joined)


@cache
def join(mixin: type[Joined], plain: type) -> type:
    """A subclass of both under the name of the plain one: by it Transformers saves models, and Accelerate finds layers."""
    if issubclass(plain, mixin):
        return plain
    about = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (mixin, plain), about | {"_mixin": mixin, "_plain": plain})


def join_in_place(module: nn.Module, mixin: type[Joined]) -> None:
    """Put a mixin before the class of a module."""
    module.__class__ = join(mixin, type(module))


class PatchConv(Joined):
    """A convolution that embeds patches, which also takes patches one by one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.shape[-2:] != self.kernel_size:
            return super().forward(input)
        # A matrix product, several times as fast on a CPU as the convolution of (N, C, P, P).
        return nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]  # (N, D, 1, 1)


class VisibleEmbeddings(Joined):
    """The embeddings of CLIP's and SigLIP's vision towers, which can leave out patches."""

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        patch_selection: PatchSelection | None = None,
    ) -> torch.Tensor:
        """The class token, where the tower has one, and the embeddings of the visible patches, positions added.

        Args:
            pixel_values: (B, C, H, W).

        Returns:
            (B, 1 + K, D) with a class token, else (B, K, D).
        """
        if patch_selection is None:
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        grid = patch_grid(pixel_values, self.patch_size)
        if patch_selection.lengths is None and patch_selection.indices.shape[1] == math.prod(grid):
            # Every patch, in order: the plain computation, to the last bit.
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        if not interpolate_pos_encoding and grid != (self.image_size // self.patch_size,) * 2:
            (height, width), size = pixel_values.shape[-2:], self.image_size
            raise ValueError(f"Input image size ({height}*{width}) doesn't match model ({size}*{size}).")
        patch_embeds = self._patch_embeds(pixel_values, patch_selection.indices)
        class_token = self._parameters.get("class_embedding")  # (D,); SigLIP has none
        tokens, embeds = patch_selection.indices, patch_embeds
        if class_token is not None:
            tokens = torch.cat([torch.zeros_like(tokens[:, :1]), 1 + tokens], dim=1)  # (B, 1 + K)
            embeds = torch.cat([class_token.expand(len(embeds), 1, -1), embeds], dim=1)  # (B, 1 + K, D)
        return embeds + self._positions(tokens, patch_embeds, pixel_values.shape[-2:], interpolate_pos_encoding)

    def _patch_embeds(self, pixel_values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Of the patches `indices` (B, K) alone, (B, K, D)."""
        patches = patchify(pixel_values, self.patch_size)  # (B, L, C, P * P)
        batch, num_patches, channels = patches.shape[:3]
        rows = indices + num_patches * torch.arange(batch, device=patches.device)[:, None]  # (B, K) of (B * L)
        visible = patches.flatten(0, 1).index_select(0, rows.flatten())  # (B * K, C, P * P)
        visible = visible.view(-1, channels, self.patch_size, self.patch_size).to(self.patch_embedding.weight.dtype)
        # The modules themselves are called, so that hooks, adapters and offloading take part.
        return self.patch_embedding(visible).view(batch, -1, self.embed_dim)  # (B * K, D, 1, 1) -> (B, K, D)

    def _positions(self, tokens, patch_embeds, image_size, interpolate_pos_encoding) -> torch.Tensor:
        """Of `tokens`, which count the class token where there is one: their shape and D."""
        if not interpolate_pos_encoding:
            return self.position_embedding(tokens)
        height, width = image_size
        num_tokens = (height // self.patch_size) * (width // self.patch_size) + ("class_embedding" in self._parameters)
        like = patch_embeds.new_empty(1, num_tokens, self.embed_dim)
        positions = self.interpolate_pos_encoding(like, height, width)[0].index_select(0, tokens.flatten())
        return positions.view(*tokens.shape, self.embed_dim)


class PaddedPoolingHead(Joined):
    """SigLIP's attention-pooling head, which can leave out padding."""

    def forward(self, hidden_state: torch.Tensor, valid: torch.BoolTensor | None = None) -> torch.Tensor:
        """(B, D) of `hidden_state` (B, K, D); of the states where `valid` (B, K) is True."""
        if valid is None:
            return super().forward(hidden_state)
        probe = self.probe.repeat(len(hidden_state), 1, 1)  # (B, 1, D)
        pooled = self.attention(probe, hidden_state, hidden_state, key_padding_mask=~valid, need_weights=False)[0]
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]
