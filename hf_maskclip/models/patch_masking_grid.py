"""Grid-wise masking, as in the ablations of MAE: a regular pattern (He et al. 2022, arXiv 2111.06377)."""

from fractions import Fraction

import torch

from .patch_masking import (
    Citation,
    PatchMask,
    PatchSelection,
    check_ratio,
    keep_count,
    keep_first,
    patch_grid,
    sort_with_random_ties,
)


class GridPatchMask(PatchMask):
    """Every n-th patch of each row stays, n = 1 / (1 - mask_ratio); each row is shifted by half of n against the one above.

    The patch in column x and row y has the phase frac((x + round(n / 2) y) / n + offset), with an offset that is drawn for each
    image; the `keep_count(L, mask_ratio)` patches of lowest phase stay, ties at random. At 0.5 that is a checkerboard.

    Args:
        mask_ratio: the fraction removed, in [0, 1).
    """

    citation = Citation(
        key="he2021mae",
        title="Masked Autoencoders Are Scalable Vision Learners",
        authors="He, Kaiming and others",
        year=2021,
        arxiv="2111.06377",
    )

    def __init__(self, mask_ratio: float = 0.5, *, patch_size: int = 16):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        rows, columns = patch_grid(pixel_values, self.patch_size)
        batch, device = len(pixel_values), pixel_values.device
        offset = torch.rand(batch, 1, generator=generator, device=device)
        noise = torch.rand(batch, rows * columns, generator=generator, device=device)

        spacing = float(1 / (1 - Fraction(str(self.mask_ratio))))  # n, exact in the ratio's decimal form
        y, x = torch.arange(rows, device=device), torch.arange(columns, device=device)
        position = (x + round(spacing / 2) * y[:, None]).flatten()  # (L,)
        # Rounded, so that what is equal but for the last bits is a tie.
        phase = (position / spacing + offset).frac().mul(1e4).round()  # (B, L)
        return keep_first(sort_with_random_ties(phase, noise), keep_count(rows * columns, self.mask_ratio))
