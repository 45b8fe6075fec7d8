"""Position embeddings of pictures that are smaller than the model's (CLIPA, arXiv 2305.07017; RECLIP, arXiv 2304.06028).

Shapes: D width, N its tokens, with the class token where there is one.
"""

import math

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_maskclip.models.masked_parts import Joined, join_in_place


class AntialiasedPositions(Joined):
    """Embeddings whose positions are resized with antialiasing.

    Transformers resizes without. On a smaller grid many positions would then have no part, and get no gradient.
    """

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The positions (1, N, D) of pictures of `height` and `width` pixels."""
        table = self.position_embedding.weight  # of the model's own grid, (N, D)
        num_prefix = int("class_embedding" in self._parameters)
        side, grid = math.isqrt(len(table) - num_prefix), (height // self.patch_size, width // self.patch_size)
        if grid == (side, side):
            return super().interpolate_pos_encoding(embeddings, height, width)
        own = table[num_prefix:].unflatten(0, (side, side)).permute(2, 0, 1)[None]  # (1, D, side, side)
        resized = F.interpolate(own, grid, mode="bicubic", align_corners=False, antialias=True)  # (1, D, rows, columns)
        return torch.cat([table[None, :num_prefix], resized.flatten(2).transpose(1, 2)], dim=1)


def resize_positions_smoothly(model: PreTrainedModel) -> None:
    """Let a model resize its positions with antialiasing. Its weights, and what is exported, stay."""
    join_in_place(model.vision_model.embeddings, AntialiasedPositions)
