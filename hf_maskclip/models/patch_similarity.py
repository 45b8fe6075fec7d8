"""How alike two patches of an image are: what the cluster and PGS masks compare.

Shapes: B batch, C channels, L patches, P patch side in pixels, D features.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from .patch_masking import check_range, patchify

# Patches that vary less than this about their mean colour, in normalised pixel units (one and a half grey levels), are flat.
FLAT_STANDARD_DEVIATION = 0.02
# Flat patches are alike when their mean colours differ by less than this in every channel.
FLAT_COLOUR_DIFFERENCE = 0.05


class PatchFeatures:
    """What the similarity of patches is computed from, prepared once for a batch of images.

    s_ij is the cosine of the standardised patch pixels (each patch: minus its mean, over its standard deviation + 1e-6).
    A flat patch has no direction once its colour is taken away, so the cosine would compare noise or colour casts: its
    similarity is 1 with the flat patches of its colour and 0 with all others. So a plain background is one cluster.

    Args:
        pixel_values: (B, C, H, W), normalised as for the model.
        patch_size: P.
        patch_embeds: (B, L, D) or None.
        embedding_weight: in [0, 1]; s = (1 - weight) * s_pixels + weight * s_embeddings.
    """

    def __init__(self, pixel_values, patch_size, patch_embeds=None, embedding_weight: float = 0.0):
        patches = patchify(pixel_values, patch_size)  # (B, L, C, P * P)
        self.colour = patches.mean(dim=-1)  # (B, L, C)
        centred = patches.flatten(2).sub_(self.colour.mean(dim=-1, keepdim=True))  # (B, L, C * P * P), in place of a copy
        norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
        # The variance about the patch's colour is the whole variance less that of the colour's channels about their mean.
        variance = norm.square() / centred.shape[-1] - self.colour.var(dim=-1, keepdim=True, correction=0)  # (B, L, 1)
        self.flat = variance < FLAT_STANDARD_DEVIATION**2
        # The division by the standard deviation cancels in a cosine: unit vectors are all that is needed, and zeros for flat
        # patches, whose cosine with textured ones is then 0.
        self.pixels = centred.mul_(torch.where(self.flat, 0, 1 / norm))
        self.embedding_weight = embedding_weight
        if embedding_weight > 0:
            if patch_embeds is None:
                raise ValueError(
                    f"embedding_weight={embedding_weight:g} compares patch embeddings: pass patch_embeds (B, L, D)"
                )
            self.embeds = F.normalize(patch_embeds.detach().float(), dim=-1)

    def similarity(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Similarities (B, A, L) of the patches `rows` (B, A) with all patches, or of all with all (B, L, L)."""
        similarity = take_rows(self.pixels, rows) @ self.pixels.transpose(1, 2)
        colour_difference = torch.cdist(take_rows(self.colour, rows), self.colour, p=float("inf"))
        same_flat = colour_difference < FLAT_COLOUR_DIFFERENCE
        same_flat &= take_rows(self.flat, rows)  # (B, A, 1)
        same_flat &= self.flat.transpose(1, 2)  # (B, 1, L)
        similarity.masked_fill_(same_flat, 1)
        if self.embedding_weight > 0:
            cosine_embeds = take_rows(self.embeds, rows) @ self.embeds.transpose(1, 2)
            similarity = (1 - self.embedding_weight) * similarity + self.embedding_weight * cosine_embeds
        return similarity


def check_embedding_weight(value: float | str) -> float | Literal["progress"]:
    """Return an embedding weight: a number in [0, 1] or `"progress"`; raise a ValueError that names it otherwise."""
    if value == "progress":
        return "progress"
    if isinstance(value, str):
        raise ValueError(f"embedding_weight={value!r}: must be a number from 0 to 1 or 'progress'")
    return check_range("embedding_weight", value, 0, 1)


def resolve_embedding_weight(embedding_weight: float | Literal["progress"], progress: float) -> float:
    """The weight of the embeddings at this point of training: a number as it is, `"progress"` grows linearly from 0 to 1."""
    return progress if embedding_weight == "progress" else embedding_weight


def take_rows(matrix: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows (B, A) of a matrix (B, L, M), as (B, A, M); all of them where `rows` is None."""
    if rows is None:
        return matrix
    return matrix.gather(1, rows[..., None].expand(-1, -1, matrix.shape[-1]))
