"""Block-wise masking, as in the ablations of MAE and FLIP: random rectangles (He et al. 2022, arXiv 2111.06377)."""

import math

import torch

from .patch_masking import (
    Citation,
    PatchMask,
    PatchSelection,
    check_range,
    check_ratio,
    keep_count,
    keep_first,
    patch_grid,
    sort_with_random_ties,
)

# Rectangles drawn for each image. What these leave uncovered when more is to go, goes at random.
NUM_BLOCKS = 32
MAX_ASPECT = 1 / 0.3  # height over width lies between 0.3 and this, as in BEiT


class BlockPatchMask(PatchMask):
    """Random rectangles are masked one after another until exactly `keep_count(L, mask_ratio)` patches are left.

    Each rectangle's area is drawn between the two block ratios, its aspect log-uniformly, its position uniformly in the image.
    The rectangle that would mask too many loses the surplus at random.

    Args:
        mask_ratio: the fraction removed, in [0, 1).
        min_block_ratio, max_block_ratio: bounds of a rectangle's share of the image, in [0.01, 1].
    """

    citation = Citation(
        key="he2021mae",
        title="Masked Autoencoders Are Scalable Vision Learners",
        authors="He, Kaiming and others",
        year=2021,
        arxiv="2111.06377",
    )

    def __init__(
        self,
        mask_ratio: float = 0.5,
        min_block_ratio: float = 0.08,
        max_block_ratio: float = 0.3,
        *,
        patch_size: int = 16,
    ):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        self.min_block_ratio = check_range("min_block_ratio", min_block_ratio, 0.01, 1)
        self.max_block_ratio = check_range("max_block_ratio", max_block_ratio, 0.01, 1)
        if min_block_ratio > max_block_ratio:
            raise ValueError(f"min_block_ratio={min_block_ratio}: must be at most max_block_ratio={max_block_ratio}")

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        rows, columns = patch_grid(pixel_values, self.patch_size)
        batch, device = len(pixel_values), pixel_values.device
        draws = torch.rand(4, batch, NUM_BLOCKS, generator=generator, device=device)
        noise = torch.rand(batch, rows * columns, generator=generator, device=device)

        first = self._first_cover(draws, rows, columns)  # (B, L)
        order = sort_with_random_ties(first, noise)  # first to be masked first
        return keep_first(order.flip(1), keep_count(rows * columns, self.mask_ratio))

    def _first_cover(self, draws: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """The number (B, L) of the first rectangle that covers each patch; `NUM_BLOCKS` for none."""
        area = self.min_block_ratio + draws[0] * (self.max_block_ratio - self.min_block_ratio)  # (B, N) shares of the image
        root_aspect = torch.exp((draws[1] - 0.5) * math.log(MAX_ASPECT))
        height = (area.sqrt() * root_aspect * rows).round().clamp(1, rows)
        width = (area.sqrt() / root_aspect * columns).round().clamp(1, columns)
        top = (draws[2] * (rows - height + 1)).floor()
        left = (draws[3] * (columns - width + 1)).floor()

        y = torch.arange(rows, device=draws.device)
        x = torch.arange(columns, device=draws.device)
        in_rows = (y >= top[..., None]) & (y < (top + height)[..., None])  # (B, N, rows)
        in_columns = (x >= left[..., None]) & (x < (left + width)[..., None])  # (B, N, columns)
        covers = (in_rows[..., :, None] & in_columns[..., None, :]).flatten(2)  # (B, N, L)
        return torch.where(covers.any(dim=1), covers.byte().argmax(dim=1), NUM_BLOCKS)
