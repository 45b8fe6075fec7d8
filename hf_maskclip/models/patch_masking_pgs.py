"""CLIP-PGS's mask, Patch Generation-to-Selection (Pei et al. 2025, arXiv 2503.17080)."""

from typing import NamedTuple

import torch

from .patch_edges import EDGE_DETECTORS, patch_edges
from .patch_masking import (
    Citation,
    PatchMask,
    PatchSelection,
    check_choice,
    check_integer,
    check_range,
    check_ratio,
    keep_count,
    keep_first,
    keep_first_of_each,
    sort_with_random_ties,
)
from .patch_similarity import PatchFeatures, check_embedding_weight, resolve_embedding_weight, take_rows


class PGSStages(NamedTuple):
    """What PGS computes on its way to a selection, for L patches of each of B images.

    Attributes:
        edge_strength: e (B, L) in [0, 1].
        is_edge: BoolTensor (B, L), the protected patches.
        candidates: LongTensor (B, A), the indices of the candidates.
        closeness: max over the candidates c of s_ci (B, L).
        balanced: w (B, L), the same of the transport plan W; equal to `closeness` without transport.
        order: LongTensor (B, L), all patches, those that go first at the end.
    """

    edge_strength: torch.Tensor
    is_edge: torch.Tensor
    candidates: torch.Tensor
    closeness: torch.Tensor
    balanced: torch.Tensor
    order: torch.Tensor


class PGSPatchMask(PatchMask):
    """Patches that resemble a few random candidates are masked first, the edges of objects last.

    1. Candidates: `candidate_ratio` of the patches, at random among those that are not edge patches.
    2. Edge patches: edge strength e_i above the image's mean of e.
    3. S = s_ij; optimal transport balances it: K = exp((S - 1) / regularization), scaled to a doubly stochastic W by Sinkhorn.
    4. Order: patches that are not edges by w_i = max over the candidates c of W_ci, descending; then edge patches by
       e_i + `edge_temperature` * g_i, ascending, with Gumbel noise g_i. The first n are masked: n = the number of patches that
       are not edges and have max over c of s_ci > `similarity_threshold`, clamped to [`min_mask_ratio`, `max_mask_ratio`] * L.
       Ties go at random.

    CLIP-PGS 0.3 is the default; CLIP-PGS 0.5 has both bounds at 0.5, so that all images keep the same number.

    Args:
        min_mask_ratio: the least fraction removed, in [0, 1).
        max_mask_ratio: the largest fraction removed, in [min_mask_ratio, 1).
        candidate_ratio: the fraction of patches that are candidates, in [0, 1]; at least one is.
        edges: `"sobel"`, `"canny"` or `"none"`.
        transport: balance the similarities by optimal transport.
        similarity_threshold: a cosine in [0, 1].
        sinkhorn_regularization: entropic regularisation, in units of the similarity.
        sinkhorn_iterations: alternations of the row and the column scaling.
        embedding_weight: the share of the patch embeddings in the similarity, in [0, 1], or `"progress"` for the paper's linear
            schedule.
        edge_temperature: chance among edge patches, in [0, 100], which tells where they outnumber what may stay. 0 is the
            paper's order, by strength alone: such an image has the same mask at each epoch.
    """

    citation = Citation(
        key="pei2025clippgs",
        title="Seeing What Matters: Empowering CLIP with Patch Generation-to-Selection",
        authors="Pei, Gensheng and others",
        year=2025,
        arxiv="2503.17080",
    )

    def __init__(
        self,
        min_mask_ratio: float = 0.3,
        max_mask_ratio: float = 0.5,
        candidate_ratio: float = 0.05,
        edges: str = "sobel",
        transport: bool = True,
        similarity_threshold: float = 0.5,
        sinkhorn_regularization: float = 0.1,
        sinkhorn_iterations: int = 5,
        embedding_weight: float | str = 0.0,
        edge_temperature: float = 0.0,
        *,
        patch_size: int = 16,
    ):
        super().__init__(patch_size=patch_size)
        self.min_mask_ratio = check_ratio("min_mask_ratio", min_mask_ratio)
        self.max_mask_ratio = check_ratio("max_mask_ratio", max_mask_ratio)
        if min_mask_ratio > max_mask_ratio:
            raise ValueError(f"min_mask_ratio={min_mask_ratio}: must be at most max_mask_ratio={max_mask_ratio}")
        self.candidate_ratio = check_range("candidate_ratio", candidate_ratio, 0, 1)
        self.edges = check_choice("edges", edges, EDGE_DETECTORS)
        self.transport = check_choice("transport", transport, (True, False))
        self.similarity_threshold = check_range("similarity_threshold", similarity_threshold, 0, 1)
        self.sinkhorn_regularization = check_range("sinkhorn_regularization", sinkhorn_regularization, 0.01, 100)
        self.sinkhorn_iterations = check_integer("sinkhorn_iterations", sinkhorn_iterations, 1, 1000)
        self.embedding_weight = check_embedding_weight(embedding_weight)
        self.edge_temperature = check_range("edge_temperature", edge_temperature, 0, 100)

    @property
    def needs_patch_embeds(self) -> bool:
        return self.embedding_weight != 0

    @torch.no_grad()
    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        return self.select(self.stages(pixel_values, patch_embeds, progress=progress, generator=generator))

    def select(self, stages: PGSStages) -> PatchSelection:
        """The selection that the stages lead to: the first n of the order are masked."""
        num_patches = stages.order.shape[1]
        most_kept, least_kept = (keep_count(num_patches, r) for r in (self.min_mask_ratio, self.max_mask_ratio))
        if most_kept == least_kept:
            return keep_first(stages.order, most_kept)
        num_similar = ((stages.closeness > self.similarity_threshold) & ~stages.is_edge).sum(dim=1)
        return keep_first_of_each(stages.order, (num_patches - num_similar).clamp(least_kept, most_kept), most_kept)

    def stages(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PGSStages:
        """The steps that lead to the order in which patches go; arguments as in `forward`."""
        edge_strength = patch_edges(pixel_values, self.patch_size, self.edges)  # e (B, L)
        is_edge = edge_strength > edge_strength.mean(dim=1, keepdim=True)
        noise = torch.rand(edge_strength.shape, generator=generator, device=edge_strength.device)
        candidates = self._candidates(edge_strength, is_edge, noise)  # (B, A)

        weight = resolve_embedding_weight(self.embedding_weight, progress)
        features = PatchFeatures(pixel_values, self.patch_size, patch_embeds, weight)
        if self.transport:
            similarity = features.similarity()  # (B, L, L)
            closeness = take_rows(similarity, candidates).amax(dim=1)  # max over c of s_ci (B, L)
            balanced = self.transport_plan(similarity, candidates).amax(dim=1)  # w (B, L)
        else:
            closeness = balanced = features.similarity(candidates).amax(dim=1)

        # Edge patches go after all others: w lies above -1, and their values in [0, 1] are moved below it.
        priority = torch.where(is_edge, -2 - self._protection(edge_strength, generator), balanced)
        order = sort_with_random_ties(priority, noise)  # last to go first
        return PGSStages(edge_strength, is_edge, candidates, closeness, balanced, order)

    def _candidates(self, edge_strength, is_edge, noise) -> torch.Tensor:
        """Indices (B, A) of the candidates; where too few patches are no edges, those with the least edge follow."""
        num_candidates = max(1, round(edge_strength.shape[1] * self.candidate_ratio))
        return torch.where(is_edge, -edge_strength, noise).topk(num_candidates, dim=1).indices

    def _protection(self, edge_strength, generator) -> torch.Tensor:
        """Values (B, L) in [0, 1] in whose order edge patches go: e, or the rank of e with noise."""
        if self.edge_temperature == 0:
            return edge_strength
        uniform = torch.rand(edge_strength.shape, generator=generator, device=edge_strength.device)
        noisy = edge_strength - self.edge_temperature * torch.log(-torch.log(uniform))  # e + temperature * Gumbel noise
        # The noise has no bounds, so ranks stand for it.
        return noisy.argsort(dim=1).argsort(dim=1) / noisy.shape[1]

    def transport_plan(self, similarity: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, A) of the doubly stochastic matrix W (B, L, L) of the similarities, as (B, A, L)."""
        kernel = similarity.sub(1).div_(self.sinkhorn_regularization).exp_()
        row_scale, column_scale = sinkhorn_scaling(kernel, self.sinkhorn_iterations)
        return take_rows(kernel, rows) * row_scale.gather(1, rows)[..., None] * column_scale[:, None, :]


def sinkhorn_scaling(kernel: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors u, v (B, L) such that diag(u) K diag(v) is doubly stochastic: u = 1 / (K v), v = 1 / (K^T u).

    Args:
        kernel: K (B, L, L), positive and symmetric. It is only read: the scaling vectors alone are iterated.
        iterations: alternations of the two.
    """
    # K is symmetric, so both products can be a row vector times K, for which the matrix is read once, in memory's order.
    column_scale = kernel.new_ones(kernel.shape[0], 1, kernel.shape[2])  # v (B, 1, L)
    for _ in range(iterations):
        row_scale = 1 / (column_scale @ kernel)
        column_scale = 1 / (row_scale @ kernel)
    return row_scale.squeeze(1), column_scale.squeeze(1)
