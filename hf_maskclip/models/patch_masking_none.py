"""No masking: CLIP as it is (Radford et al. 2021, arXiv 2103.00020)."""

import torch

from .patch_masking import Citation, PatchMask, PatchSelection, patch_grid


class NoPatchMask(PatchMask):
    """Every patch is encoded."""

    citation = Citation(
        key="radford2021clip",
        title="Learning Transferable Visual Models From Natural Language Supervision",
        authors="Radford, Alec and others",
        year=2021,
        arxiv="2103.00020",
    )

    keeps_all = True

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        rows, columns = patch_grid(pixel_values, self.patch_size)
        indices = torch.arange(rows * columns, device=pixel_values.device)
        return PatchSelection(indices.expand(len(pixel_values), -1))  # (B, L)
