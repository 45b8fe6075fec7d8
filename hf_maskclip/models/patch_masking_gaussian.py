"""GLIP's mask: the centre of the image stays more often (Liang and Larson 2024, arXiv 2403.15837)."""

import torch

from .patch_masking import (
    Citation,
    PatchMask,
    PatchSelection,
    check_range,
    check_ratio,
    draw_by_weights,
    keep_count,
    patch_grid,
)


class GaussianPatchMask(PatchMask):
    """`keep_count(L, mask_ratio)` patches stay, drawn without replacement by weights from a Gaussian at the image's centre.

    The weight of a patch whose centre lies at (x, y), in shares of the sides from the image's centre, is
    exp(-(x^2 + y^2) / (2 sigma^2)).

    Args:
        mask_ratio: the fraction removed, in [0, 1).
        sigma: the Gaussian's width as a share of the side.
    """

    citation = Citation(
        key="liang2024glip",
        title="Centered Masking for Language-Image Pre-Training",
        authors="Liang, Mingliang and Larson, Martha",
        year=2024,
        arxiv="2403.15837",
    )

    def __init__(self, mask_ratio: float = 0.5, sigma: float = 0.2, *, patch_size: int = 16):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        self.sigma = check_range("sigma", sigma, 0.01, 100)

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        rows, columns = patch_grid(pixel_values, self.patch_size)
        y, x = (((torch.arange(n, device=pixel_values.device) + 0.5) / n - 0.5).square() for n in (rows, columns))
        log_weights = -(y[:, None] + x).flatten() / (2 * self.sigma**2)  # (L,)
        num_kept = keep_count(rows * columns, self.mask_ratio)
        return draw_by_weights(log_weights.expand(len(pixel_values), -1), num_kept, generator)
