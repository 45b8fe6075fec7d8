"""FLIP's mask: patches dropped uniformly at random (Li et al. 2023, arXiv 2212.00794)."""

import torch

from .patch_masking import Citation, PatchMask, PatchSelection, check_ratio, keep_count, keep_first, patch_grid


class RandomPatchMask(PatchMask):
    """`keep_count(L, mask_ratio)` patches stay, drawn uniformly without replacement.

    Args:
        mask_ratio: the fraction removed, in [0, 1); the paper uses 0.5 and 0.75.
    """

    citation = Citation(
        key="li2022flip",
        title="Scaling Language-Image Pre-training via Masking",
        authors="Li, Yanghao and others",
        year=2022,
        arxiv="2212.00794",
    )

    def __init__(self, mask_ratio: float = 0.5, *, patch_size: int = 16):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        rows, columns = patch_grid(pixel_values, self.patch_size)
        num_patches = rows * columns
        noise = torch.rand(len(pixel_values), num_patches, generator=generator, device=pixel_values.device)
        return keep_first(noise.argsort(dim=1), keep_count(num_patches, self.mask_ratio))
