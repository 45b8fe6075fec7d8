"""E-CLIP's mask: clusters of similar patches are dropped together (Wei et al. 2024, arXiv 2405.08815)."""

from typing import Literal

import torch

from .patch_masking import (
    Citation,
    PatchMask,
    PatchSelection,
    check_range,
    check_ratio,
    keep_count,
    keep_first,
    keep_first_of_each,
    sort_with_random_ties,
)
from .patch_similarity import PatchFeatures, check_embedding_weight, resolve_embedding_weight

# Equal patches have a cosine of 1 up to rounding. A threshold just below 1 masks them with their anchor in every case.
HIGHEST_THRESHOLD = 1 - 1e-5


class ClusterPatchMask(PatchMask):
    """Patches that resemble one of a few random anchors are masked, so lengths differ from image to image.

    1. Anchors: `anchor_ratio` of the patches, at random, at least one.
    2. c_i = max over the anchors a of s_ai. Patch i is masked when c_i > threshold; an anchor masks itself.
    3. Images with fewer than `min_mask_ratio` masked lose further patches uniformly at random; at least one patch stays.
    4. Images with more than `max_mask_ratio` masked get back those of lowest c_i, ties at random, until they have as many.

    Args:
        mask_ratio: the mean fraction removed by step 2, in [0, 1), where the threshold is `"auto"`. A ceiling lowers the mean,
            for the threshold stays.
        anchor_ratio: the fraction of patches that are anchors, in [0, 1].
        similarity_threshold: a cosine in [0, 1]; or `"auto"`, the (1 - mask_ratio) quantile of all c_i in the batch, which is
            the threshold that the paper looks for by bisection. A model in evaluation mode gives one picture at a time.
        min_mask_ratio: the least fraction removed from each image, in [0, 1).
        embedding_weight: the share of the patch embeddings in the similarity, in [0, 1], or `"progress"` for the paper's linear
            schedule.
        max_mask_ratio: the largest fraction removed from an image, in [0, 1), or None for no ceiling. It is at least
            `mask_ratio` with an automatic threshold, and at least `min_mask_ratio`. Equal to that, all images keep the same
            number.
    """

    citation = Citation(
        key="wei2024cluster",
        title="Efficient Vision-Language Pre-training by Cluster Masking",
        authors="Wei, Zihao and Pan, Zixuan and Owens, Andrew",
        year=2024,
        arxiv="2405.08815",
    )

    def __init__(
        self,
        mask_ratio: float = 0.5,
        anchor_ratio: float = 0.03,
        similarity_threshold: float | str = "auto",
        min_mask_ratio: float = 0.3,
        embedding_weight: float | str = 0.0,
        max_mask_ratio: float | None = None,
        *,
        patch_size: int = 16,
    ):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        self.anchor_ratio = check_range("anchor_ratio", anchor_ratio, 0, 1)
        self.min_mask_ratio = check_ratio("min_mask_ratio", min_mask_ratio)
        self.similarity_threshold: float | Literal["auto"] = "auto"
        if similarity_threshold == "auto" and min_mask_ratio > mask_ratio:
            raise ValueError(f"min_mask_ratio={min_mask_ratio}: must be at most mask_ratio={mask_ratio}")
        if similarity_threshold != "auto":
            self.similarity_threshold = check_range("similarity_threshold", similarity_threshold, 0, 1)
        self.embedding_weight = check_embedding_weight(embedding_weight)
        self.max_mask_ratio = self._check_ceiling(max_mask_ratio)

    def _check_ceiling(self, max_mask_ratio: float | None) -> float | None:
        if max_mask_ratio is None:
            return None
        floor = "mask_ratio" if self.similarity_threshold == "auto" else "min_mask_ratio"
        least = self.mask_ratio if self.similarity_threshold == "auto" else self.min_mask_ratio
        if check_ratio("max_mask_ratio", max_mask_ratio) < least:
            raise ValueError(f"max_mask_ratio={max_mask_ratio}: must be at least {floor}={least}, or None for no ceiling")
        return max_mask_ratio

    @property
    def needs_patch_embeds(self) -> bool:
        return self.embedding_weight != 0

    @torch.no_grad()
    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        weight = resolve_embedding_weight(self.embedding_weight, progress)
        features = PatchFeatures(pixel_values, self.patch_size, patch_embeds, weight)
        batch, num_patches = features.flat.shape[:2]

        def noise():  # (B, L) in [0, 1)
            return torch.rand(batch, num_patches, generator=generator, device=pixel_values.device)

        num_anchors = max(1, round(num_patches * self.anchor_ratio))
        anchors = noise().topk(num_anchors, dim=1).indices  # (B, A)
        closeness = features.similarity(anchors).amax(dim=1)  # c (B, L)
        masked = closeness > self._threshold(closeness)
        masked = masked.scatter(1, anchors, True)

        # Masked patches come last; the surplus that an image owes is taken at random from the others.
        num_kept, most_kept = (~masked).sum(dim=1), keep_count(num_patches, self.min_mask_ratio)
        if self.max_mask_ratio is None:
            return keep_first_of_each((masked + noise()).argsort(dim=1), num_kept.clamp(1, most_kept), most_kept)
        # Masked ones by their similarity. All others tie below every cosine, so that they come first and at random.
        order = sort_with_random_ties(torch.where(masked, closeness, -2), noise())
        least_kept = keep_count(num_patches, self.max_mask_ratio)
        if least_kept == most_kept:
            return keep_first(order, most_kept)
        return keep_first_of_each(order, num_kept.clamp(least_kept, most_kept), most_kept)

    def _threshold(self, closeness: torch.Tensor) -> torch.Tensor | float:
        if self.similarity_threshold != "auto":
            return min(self.similarity_threshold, HIGHEST_THRESHOLD)
        rank = keep_count(closeness.numel(), self.mask_ratio)
        return closeness.flatten().kthvalue(rank).values.clamp(max=HIGHEST_THRESHOLD)
