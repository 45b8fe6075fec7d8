"""The mask of leverage scores: patches that have none like them in their picture stay more often."""

import torch
from torch.nn import functional as F

from .patch_masking import (
    PatchMask,
    PatchSelection,
    check_integer,
    check_range,
    check_ratio,
    draw_by_weights,
    keep_count,
    patch_grid,
    patchify,
)

# Of patches that do not differ from their picture's mean, so that these are drawn by chance.
LEAST_SCORE = 1e-6


class LeveragePatchMask(PatchMask):
    """`keep_count(L, mask_ratio)` patches stay, drawn without replacement in proportion to their ridge leverage scores.

    1. Features f_i: the patch averaged in `cells` x `cells` cells, of all C colours, minus the mean over the picture's patches.
    2. Covariance S = mean over i of f_i f_i^T, and the ridge r = `ridge` * mean(diag S) + 1e-6.
    3. Score: l_i = f_i^T (S + r I)^-1 f_i, at least 1e-6.
    4. The patches of the largest log l_i + g_i stay, with Gumbel noise g_i.

    Patches that have many like them, such as a plain background, share the few directions that they span: each has a low score.
    A patch that stands out has a direction for itself. The scores are those of Alaoui and Mahoney (2015, arXiv 1411.0306). To
    choose the patches of a picture by them is this project's idea.

    Args:
        mask_ratio: the fraction removed, in [0, 1).
        cells: of a patch along each side, from 1 to 16.
        ridge: what counts as noise, as a share of the mean variance of a feature, from 0.0001 to 100.
    """

    def __init__(self, mask_ratio: float = 0.5, cells: int = 2, ridge: float = 0.1, *, patch_size: int = 16):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        self.cells = check_integer("cells", cells, 1, 16)
        self.ridge = check_range("ridge", ridge, 1e-4, 100)

    @torch.no_grad()
    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        log_scores = self.scores(pixel_values).clamp(min=LEAST_SCORE).log()
        return draw_by_weights(log_scores, keep_count(log_scores.shape[1], self.mask_ratio), generator)

    def scores(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """l (B, L) of images (B, C, H, W)."""
        rows, columns = patch_grid(pixel_values, self.patch_size)
        cells = F.adaptive_avg_pool2d(pixel_values.float(), (rows * self.cells, columns * self.cells))
        features = patchify(cells, self.cells).flatten(2)  # (B, L, D), D = C * cells^2
        features -= features.mean(dim=1, keepdim=True)  # f
        covariance = features.transpose(1, 2) @ features / features.shape[1]  # S (B, D, D)
        variance = covariance.diagonal(dim1=1, dim2=2)  # (B, D), a view
        variance += self.ridge * variance.mean(dim=1, keepdim=True) + 1e-6  # S + r I
        # `cholesky_ex` does not wait for the device. The ridge keeps the matrix positive.
        factor = torch.linalg.cholesky_ex(covariance).L
        whitened = torch.linalg.solve_triangular(factor, features.transpose(1, 2), upper=False)  # (B, D, L)
        return whitened.square().sum(dim=1)
