"""Masks that were tried beside CLIP-PGS, and the controls that decide about them: `import: training.study.ideas` in a study.

docs/study.md says what came out. These masks are no part of the package.

Shapes: B batch, L patches of an image, K kept patches, C channels, P patch side in pixels, D features.
"""

import torch
from torch.nn import functional as F

from hf_maskclip import PatchMask, PatchSelection, register_patch_mask
from hf_maskclip.models.patch_edges import patch_edges
from hf_maskclip.models.patch_masking import (
    check_choice,
    check_integer,
    check_range,
    check_ratio,
    keep_count,
    keep_first,
    keep_first_of_each,
    patchify,
)
from hf_maskclip.models.patch_masking_pgs import PGSPatchMask


def draw_in_proportion(weights: torch.Tensor, num_drawn: int, generator: torch.Generator | None) -> PatchSelection:
    """Draw patches one after another without replacement, each with a chance in proportion to its weight (B, L), at least 1e-6.

    The largest log-weights with Gumbel noise are such a draw (Kool et al. 2019, arXiv 1903.06059).
    """
    uniform = torch.rand(weights.shape, generator=generator, device=weights.device)
    keys = weights.clamp(min=1e-6).log() - torch.log(-torch.log(uniform))  # (B, L)
    return keep_first(keys.argsort(dim=1, descending=True), num_drawn)


class EdgeDrawMask(PatchMask):
    """Patches are drawn in proportion to their edge strength: chance where CLIP-PGS goes by order."""

    def __init__(self, mask_ratio: float = 0.5, *, patch_size: int = 16):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)

    @torch.no_grad()
    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        strength = patch_edges(pixel_values, self.patch_size)  # (B, L)
        return draw_in_proportion(strength, keep_count(strength.shape[1], self.mask_ratio), generator)


class EdgeShareMask(PGSPatchMask):
    """The control of all that orders edges: as many edge patches as CLIP-PGS keeps, and as many others, both by chance."""

    def __init__(self, mask_ratio: float = 0.5, *, patch_size: int = 16):
        super().__init__(mask_ratio, mask_ratio, patch_size=patch_size)
        self.mask_ratio = mask_ratio

    @torch.no_grad()
    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        strength = patch_edges(pixel_values, self.patch_size)
        is_edge = strength > strength.mean(dim=1, keepdim=True)
        num_kept = keep_count(strength.shape[1], self.mask_ratio)
        noise = torch.rand(strength.shape, generator=generator, device=strength.device)
        # CLIP-PGS lets edges go last, so they fill the budget first; those that have no room come after all others.
        rank_among_edges = torch.where(is_edge, noise, 2).argsort(dim=1).argsort(dim=1)  # (B, L)
        has_room = is_edge & (rank_among_edges < num_kept)
        return keep_first((noise - has_room.float() + (is_edge & ~has_room).float()).argsort(dim=1), num_kept)


class BatchBudgetMask(PGSPatchMask):
    """CLIP-PGS with a budget for the batch: pictures that have less to drop keep more, and all together keep B * K patches.

    Patches of the whole batch go in the order of their similarity to candidates, edges last. Each picture keeps between half
    and one and a half times K.

    Args:
        mask_ratio: the fraction of the batch's patches that is removed.
        shuffled: the control, which gives the same numbers to the pictures by chance.
    """

    def __init__(self, mask_ratio: float = 0.5, shuffled: bool = False, *, patch_size: int = 16):
        super().__init__(mask_ratio, mask_ratio, patch_size=patch_size)
        self.mask_ratio = mask_ratio
        self.shuffled = check_choice("shuffled", shuffled, (True, False))

    @torch.no_grad()
    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        stages = self.stages(pixel_values, generator=generator)
        batch, num_patches = stages.order.shape
        num_kept = keep_count(num_patches, self.mask_ratio)
        least, most = num_kept // 2, min(num_patches, num_kept + num_kept // 2)
        priority = torch.where(stages.is_edge, -2 - stages.edge_strength, stages.balanced)
        ranked = priority.gather(1, stages.order)  # (B, L), ascending
        ranked[:, :least], ranked[:, most:] = -torch.inf, torch.inf
        kept = ranked.flatten().topk(batch * num_kept, largest=False).indices  # (B * K,) of (B * L)
        lengths = torch.bincount(kept // num_patches, minlength=batch)  # (B,)
        if self.shuffled:
            lengths = lengths[torch.randperm(batch, generator=generator, device=lengths.device)]
        return keep_first_of_each(stages.order, lengths, most)


class LeverageMask(PatchMask):
    """Patches are drawn in proportion to how distinct they are in their picture: their ridge leverage scores.

    f_i: the pixels of patch i, averaged in `cells` x `cells` cells, minus the picture's mean f. C: their covariance (D, D).
    Score: l_i = f_i^T (C + ridge * mean(diag C) * I)^-1 f_i (Alaoui and Mahoney 2015, arXiv 1411.0306). Patches that have many
    like them span few directions, which they share; a patch that has none like it stands out in a direction of its own.

    Args:
        mask_ratio: the fraction removed.
        cells: of a patch, along each side; D = C * cells^2.
        ridge: in units of the mean variance of a feature.
        power: of the scores. 0 is random, and the larger, the less chance.
    """

    def __init__(
        self, mask_ratio: float = 0.5, cells: int = 2, ridge: float = 0.1, power: float = 1.0, *, patch_size: int = 16
    ):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        self.cells = check_integer("cells", cells, 1, patch_size)
        self.ridge = check_range("ridge", ridge, 1e-4, 100)
        self.power = check_range("power", power, 0, 100)

    @torch.no_grad()
    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        scores = self.scores(pixel_values)
        return draw_in_proportion(scores**self.power, keep_count(scores.shape[1], self.mask_ratio), generator)

    def scores(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """l (B, L)."""
        cells = F.avg_pool2d(pixel_values.float(), self.patch_size // self.cells)
        features = patchify(cells, self.cells).flatten(2)  # f (B, L, D)
        features = features - features.mean(dim=1, keepdim=True)
        covariance = features.transpose(1, 2) @ features / features.shape[1]  # C (B, D, D)
        variance = covariance.diagonal(dim1=1, dim2=2)
        ridge = self.ridge * variance.mean(dim=1, keepdim=True) + 1e-6  # (B, 1)
        # `cholesky_ex` does not wait for the device, and the ridge keeps the matrix positive.
        factor = torch.linalg.cholesky_ex(covariance + torch.diag_embed(ridge.expand_as(variance))).L
        whitened = torch.linalg.solve_triangular(factor, features.transpose(1, 2), upper=False)  # (B, D, L)
        return whitened.square().sum(dim=1)


MASKS = {"edge_draw": EdgeDrawMask, "edge_share": EdgeShareMask, "batch_budget": BatchBudgetMask, "leverage": LeverageMask}
for name, mask in MASKS.items():
    register_patch_mask(name, mask)
