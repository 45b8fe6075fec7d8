"""Tokens for what is dropped, which were tried beside CLIP-PGS: `import: training.study.idea_tokens` in a study.

A token stands for a group of patches. Its pixels are a mixture of theirs, its position embedding is the mean of theirs. A patch
embedding is linear, so that the mean of patches is embedded as the mean of their embeddings. docs/study.md says what came out.
Importing this file lets the embeddings of all vision towers take such tokens. They are no part of the package, and training is
in one process.

Shapes: B batch, L patches of an image, K kept patches, G groups, C channels, P patch side in pixels, D width.
"""

import torch
from torch.nn import functional as F

from hf_maskclip import PatchMask, PatchSelection, register_patch_mask
from hf_maskclip.models.masked_parts import VisibleEmbeddings
from hf_maskclip.models.patch_edges import patch_edges
from hf_maskclip.models.patch_masking import (
    check_choice,
    check_ratio,
    draw_by_weights,
    keep_count,
    keep_first,
    patch_grid,
    patchify,
)
from hf_maskclip.models.patch_masking_pgs import PGSPatchMask
from hf_maskclip.models.patch_similarity import PatchFeatures


class GroupedSelection(PatchSelection):
    """Visible patches, and groups of others that have a token each.

    Attributes:
        group_pixels: (B, G, C, P, P).
        members: the share of each patch in the position of a group, (B, G, L).
    """

    group_pixels: torch.Tensor
    members: torch.Tensor

    @classmethod
    def of(cls, visible: PatchSelection, group_pixels: torch.Tensor, members: torch.Tensor) -> "GroupedSelection":
        selection = cls(visible.indices)
        selection.group_pixels, selection.members = group_pixels, members
        return selection

    def kept_share(self, num_patches: int) -> torch.Tensor:
        """Tokens over patches: what a step encodes."""
        return torch.tensor((self.indices.shape[1] + self.members.shape[1]) / num_patches)


def embed_groups_too(embeddings: VisibleEmbeddings, tokens: torch.Tensor, selection: GroupedSelection) -> torch.Tensor:
    """The tokens of visible patches (B, N, D), and behind them those of groups: (B, N + G, D)."""
    pixels = selection.group_pixels.flatten(0, 1).to(tokens.dtype)  # (B * G, C, P, P)
    batch, num_groups, num_patches = selection.members.shape
    embeds = embeddings.patch_embedding(pixels).view(batch, num_groups, -1)  # (B * G, D, 1, 1) -> (B, G, D)
    positions = selection.members.to(tokens.dtype) @ embeddings.position_embedding.weight[-num_patches:]
    return torch.cat([tokens, embeds + positions], dim=1)


_of_visible_patches = VisibleEmbeddings.forward


def forward(self, pixel_values, interpolate_pos_encoding=False, patch_selection=None):
    tokens = _of_visible_patches(self, pixel_values, interpolate_pos_encoding, patch_selection)
    is_grouped = isinstance(patch_selection, GroupedSelection)
    return embed_groups_too(self, tokens, patch_selection) if is_grouped else tokens


VisibleEmbeddings.forward = forward


class CoarseMask(PatchMask):
    """Each 2 x 2 block of patches is there once: as its four patches, or as one patch of the picture at half its size.

    With a budget of K tokens (K - L / 4) / 3 blocks are fine, so that nothing is unseen. Fine blocks are drawn in proportion to
    their edge strength, or all with the same chance.

    Args:
        mask_ratio: the fraction of L that the tokens are fewer, at most 0.75.
        choose: `edges`, or `random`, which is the control.
    """

    def __init__(self, mask_ratio: float = 0.5, choose: str = "edges", *, patch_size: int = 16):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        self.choose = check_choice("choose", choose, ("edges", "random"))

    @torch.no_grad()
    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        rows, columns = patch_grid(pixel_values, 2 * self.patch_size)  # of blocks
        num_blocks = rows * columns
        num_fine = max(1, round((keep_count(4 * num_blocks, self.mask_ratio) - num_blocks) / 3))
        log_weights = pixel_values.new_zeros(len(pixel_values), num_blocks)
        if self.choose == "edges":
            log_weights = patch_edges(pixel_values, 2 * self.patch_size).clamp(min=1e-6).log()
        is_fine = draw_by_weights(log_weights, num_fine, generator).visible(num_blocks)  # (B, L / 4)
        is_visible = self._patches_of(is_fine.view(-1, rows, columns))  # (B, L)
        visible = keep_first((~is_visible).float().argsort(dim=1, stable=True), 4 * num_fine)
        coarse = keep_first(is_fine.float().argsort(dim=1, stable=True), num_blocks - num_fine).indices  # (B, G)

        halved = patchify(F.avg_pool2d(pixel_values.float(), 2), self.patch_size)  # (B, L / 4, C, P * P)
        pixels = halved.gather(1, coarse[..., None, None].expand(-1, -1, *halved.shape[2:]))
        blocks = torch.eye(num_blocks, device=pixel_values.device).view(num_blocks, rows, columns)
        members = self._patches_of(blocks)[coarse] / 4  # (B, G, L)
        return GroupedSelection.of(visible, pixels.unflatten(3, (self.patch_size, self.patch_size)), members)

    def _patches_of(self, blocks: torch.Tensor) -> torch.Tensor:
        """Values (N, rows, columns) of blocks, given to each of their patches: (N, L)."""
        return blocks.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)


class SummaryMask(PGSPatchMask):
    """CLIP-PGS with a token for each cluster of dropped patches: their mean. All tokens together are K.

    A dropped patch belongs to the candidate that it resembles most.

    Args:
        mask_ratio: the fraction of L that the tokens are fewer.
        groups: `candidates`, or `random`, which is the control: as many groups, in which patches are by chance.
    """

    def __init__(self, mask_ratio: float = 0.5, groups: str = "candidates", *, patch_size: int = 16):
        super().__init__(mask_ratio, mask_ratio, patch_size=patch_size)
        self.mask_ratio = mask_ratio
        self.groups = check_choice("groups", groups, ("candidates", "random"))

    @torch.no_grad()
    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None) -> PatchSelection:
        stages = self.stages(pixel_values, generator=generator)
        (batch, num_patches), num_groups = stages.order.shape, stages.candidates.shape[1]
        visible = keep_first(stages.order, keep_count(num_patches, self.mask_ratio) - num_groups)
        nearness = torch.rand(batch, num_groups, num_patches, generator=generator, device=pixel_values.device)
        if self.groups == "candidates":
            nearness = PatchFeatures(pixel_values, self.patch_size).similarity(stages.candidates)  # (B, G, L)
        members = F.one_hot(nearness.argmax(dim=1), num_groups).transpose(1, 2).float()  # (B, G, L)
        members *= ~visible.visible(num_patches)[:, None]
        members /= members.sum(dim=2, keepdim=True).clamp(min=1)
        patches = patchify(pixel_values, self.patch_size)  # (B, L, C, P * P)
        pixels = (members @ patches.flatten(2)).view(batch, num_groups, *patches.shape[2:])
        return GroupedSelection.of(visible, pixels.unflatten(3, (self.patch_size, self.patch_size)), members)


MASKS = {"coarse": CoarseMask, "summary": SummaryMask}
for name, mask in MASKS.items():
    register_patch_mask(name, mask)
