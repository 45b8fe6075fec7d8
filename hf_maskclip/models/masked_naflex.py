"""SigLIP 2 NaFlex with a patch mask: images in their own aspect ratios, each with its own grid of patches.

Shapes: B images, C channels, P patch side in pixels, L patches with padding, K kept patches, D width; b images of one grid.
Images come as their patches, (B, L, P * P * C), with their grids, `spatial_shapes` (B, 2) as rows and columns.
"""

from typing import Any

import torch
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .masked_parts import Joined, join_in_place
from .masked_tower import MaskedVisionOutput, PatchMaskedTower, PoolingHeadTower
from .packed_attention import Packing
from .patch_mask_registry import PatchMaskSpec
from .patch_masking import PatchSelection
from .selection_by_picture import in_order
from .selection_checks import check_selection_of


class VisibleNaFlexEmbeddings(Joined):
    """The embeddings of NaFlex's tower, which can leave out patches."""

    def forward(
        self,
        pixel_values: torch.Tensor,
        spatial_shapes: torch.LongTensor,
        patch_selection: PatchSelection | None = None,
    ) -> torch.Tensor:
        """The embeddings (B, K, D) of the visible patches, positions added; (B, L, D) without a selection."""
        if patch_selection is None:
            return super().forward(pixel_values, spatial_shapes)
        indices = patch_selection.indices[..., None]  # (B, K, 1)
        visible = pixel_values.take_along_dim(indices, dim=1)  # (B, K, P * P * C)
        patch_embeds = self.patch_embedding(visible.to(self.patch_embedding.weight.dtype))
        grid = self.position_embedding.weight.unflatten(0, (self.position_embedding_size, -1))  # (rows, columns, D)
        positions = self.resize_positional_embeddings(grid, spatial_shapes, max_length=pixel_values.shape[1])  # (B, L, D)
        return patch_embeds + positions.take_along_dim(indices, dim=1)


class NaFlexTower(PoolingHeadTower):
    """NaFlex's vision tower: masks choose from each image's own grid."""

    image_arguments = ("pixel_attention_mask", "spatial_shapes")

    def _mask_parts(self) -> None:
        join_in_place(self.embeddings, VisibleNaFlexEmbeddings)  # its head leaves out padding by itself

    def select_patches(
        self,
        pixel_values: torch.Tensor,
        *,
        spatial_shapes: torch.LongTensor,
        pixel_attention_mask: torch.Tensor | None = None,
        patch_scores: torch.Tensor | None = None,
        **options,
    ) -> PatchSelection:
        """Let the patch mask choose the visible patches of each image, as a picture of its own size.

        Images of one grid are chosen from together. What tells the grids apart is read on the host, as packing reads lengths.

        Args:
            pixel_values: (B, L, P * P * C).
            spatial_shapes: (B, 2), which say what is padding.
            pixel_attention_mask: (B, L), not needed.
            patch_scores: (B, L), for masks that need a teacher's attention.
            options: as in [`PatchMaskedTower.select_patches`].
        """
        grids = [(rows, columns) for rows, columns in spatial_shapes.tolist()]
        chosen = []
        for rows, columns in sorted(set(grids)):
            members = torch.tensor([row for row, grid in enumerate(grids) if grid == (rows, columns)])  # (b,)
            members = members.to(pixel_values.device, non_blocking=True)
            images = self._pictures(pixel_values.index_select(0, members), rows, columns)
            scores = None if patch_scores is None else patch_scores.index_select(0, members)[:, : rows * columns]
            chosen.append((members, PatchMaskedTower.select_patches(self, images, patch_scores=scores, **options)))
        return in_order(chosen, len(pixel_values))

    def _pictures(self, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Images (b, C, rows * P, columns * P) of patches (b, L, P * P * C)."""
        side = self.config.patch_size
        patches = patches[:, : rows * columns].unflatten(2, (side, side, -1)).unflatten(1, (rows, columns))
        pictures = patches.permute(0, 5, 1, 3, 2, 4)  # (b, rows, columns, P, P, C) to (b, C, rows, P, columns, P)
        return pictures.reshape(len(patches), -1, rows * side, columns * side)

    def _patch_embeds(self, pictures: torch.Tensor) -> torch.Tensor:
        """(b, rows * columns, D) of pictures (b, C, rows * P, columns * P)."""
        side = self.config.patch_size
        patches = pictures.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (b, C, rows, P, columns, P)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (b, rows * columns, P * P * C)
        return self.embeddings.patch_embedding(patches.to(self.embeddings.patch_embedding.weight.dtype))

    def _whole_patches(self, pixel_values, interpolate_pos_encoding):
        return pixel_values  # which are patches, or pictures made of them

    def _to_choose_from(self, pixel_values, pixel_attention_mask=None, spatial_shapes=None):
        if spatial_shapes is None:
            raise ValueError("spatial_shapes is None: a NaFlex tower takes the rows and columns (B, 2) of each image")
        return pixel_values, {"spatial_shapes": spatial_shapes}

    def _check_selection(self, patch_selection, pixel_values, spatial_shapes):
        check_selection_of(patch_selection, spatial_shapes.prod(dim=1))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        patch_selection: PatchSelection | None = None,
        apply_patch_mask: bool | None = None,
        patch_mask: PatchMaskSpec | None = None,
        progress: float | None = None,
        generator: torch.Generator | None = None,
        patch_scores: torch.Tensor | None = None,
        packing: Packing | None = None,
        **kwargs,
    ) -> MaskedVisionOutput:
        """As [`PatchMaskedTower.forward`], of images in their own aspect ratios.

        Args:
            pixel_values: (B, L, P * P * C).
            pixel_attention_mask: (B, L), 1 for patches and 0 for padding.
            spatial_shapes: (B, 2), the rows and columns of each image.
        """
        images: dict[str, Any] = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        choice = (patch_selection, apply_patch_mask)
        options = {"patch_mask": patch_mask, "progress": progress, "generator": generator, "patch_scores": patch_scores}
        return self._choose_and_encode(pixel_values, images, choice, options, packing, kwargs)

    def _embed(self, pixel_values, patch_selection, pixel_attention_mask, spatial_shapes):
        return self.embeddings(pixel_values, spatial_shapes, patch_selection)
