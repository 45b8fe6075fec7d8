"""Masks that were tried beside CLIP-PGS, and the controls that decide about them: `import: training.study.ideas` in a study.

docs/study.md says what came out. These masks are no part of the package.

Shapes: B batch, L patches of an image, K kept patches.
"""

import torch

from hf_maskclip import PatchMask, PatchSelection, register_patch_mask
from hf_maskclip.mask_schedule import seed_of
from hf_maskclip.models.patch_edges import patch_edges
from hf_maskclip.models.patch_masking import (
    check_choice,
    check_ratio,
    draw_by_weights,
    keep_count,
    keep_first,
    keep_first_of_each,
)
from hf_maskclip.models.patch_masking_pgs import PGSPatchMask
from hf_maskclip.models.patch_masking_random import RandomPatchMask


class EdgeDrawMask(PatchMask):
    """Patches are drawn in proportion to their edge strength: chance where CLIP-PGS goes by order."""

    def __init__(self, mask_ratio: float = 0.5, *, patch_size: int = 16):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)

    @torch.no_grad()
    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        strength = patch_edges(pixel_values, self.patch_size)  # (B, L)
        log_strength = strength.clamp(min=1e-6).log()
        return draw_by_weights(log_strength, keep_count(strength.shape[1], self.mask_ratio), generator)


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


class RepeatedRandomMask(RandomPatchMask):
    """FLIP's mask with an error: 16 choices for the pictures of a batch, by their place in it, come again and again."""

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        one_of_16 = seed_of((generator or torch.default_generator).initial_seed() % 16)
        return super().forward(pixel_values, generator=torch.Generator(pixel_values.device).manual_seed(one_of_16))


MASKS = {
    "edge_draw": EdgeDrawMask,
    "edge_share": EdgeShareMask,
    "batch_budget": BatchBudgetMask,
    "random_repeated": RepeatedRandomMask,
}
for name, mask in MASKS.items():
    register_patch_mask(name, mask)
