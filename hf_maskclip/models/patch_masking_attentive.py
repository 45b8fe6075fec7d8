"""A-CLIP's mask: what a teacher's class token attends to stays (Yang et al. 2023, arXiv 2212.08653)."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .patch_masking import (
    Citation,
    PatchMask,
    PatchSelection,
    check_integer,
    check_range,
    check_ratio,
    keep_count,
    keep_first,
    patch_grid,
    sort_with_random_ties,
    whole_patch_grid,
)


class AttentivePatchMask(PatchMask):
    """The `keep_count(L, mask_ratio)` patches that a teacher attends to most stay.

    The teacher is an exponential moving average of the vision tower, which training keeps; `forward` takes its
    [`class_attention`] as `patch_scores`.

    Args:
        mask_ratio: the fraction removed, in [0, 1).
        merge: the side, in patches, of the blocks that are kept or dropped whole, by their mean score; 1 or 2. Only the last
            block may be cut, to keep exactly `keep_count` patches: it keeps those of the highest scores.
        teacher_image_size: the side in pixels of the image that the teacher sees, a multiple of the patch size; 0 is the
            student's. Half of it costs the teacher a quarter of the patches.
        momentum: of the moving average at the start, in [0, 1]; it grows to 1 by a half cosine over training.
    """

    citation = Citation(
        key="yang2022aclip",
        title="Attentive Mask CLIP",
        authors="Yang, Yifan and others",
        year=2022,
        arxiv="2212.08653",
    )
    needs_patch_scores = True
    has_chance = False  # but for ties

    def __init__(
        self,
        mask_ratio: float = 0.5,
        merge: int = 1,
        teacher_image_size: int = 0,
        momentum: float = 0.996,
        *,
        patch_size: int = 16,
    ):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        self.merge = check_integer("merge", merge, 1, 2)
        self.teacher_image_size = check_integer("teacher_image_size", teacher_image_size, 0, 10_000)
        self.momentum = check_range("momentum", momentum, 0, 1)

    def forward(
        self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None, patch_scores: torch.Tensor | None = None
    ) -> PatchSelection:
        """As [`PatchMask`], with `patch_scores` (B, L)."""
        rows, columns = patch_grid(pixel_values, self.patch_size)
        if patch_scores is None or patch_scores.shape != (len(pixel_values), rows * columns):
            shape = None if patch_scores is None else tuple(patch_scores.shape)
            raise ValueError(
                f"patch_scores of shape {shape}: the attentive mask needs a teacher's attention to each patch, "
                f"({len(pixel_values)}, {rows * columns}): give the model the patch_selection that its vision_model's "
                "select_patches(..., patch_scores=class_attention(teacher, pixel_values)) returns"
            )
        noise = torch.rand(patch_scores.shape, generator=generator, device=pixel_values.device)
        order = sort_with_random_ties(-patch_scores, noise)  # (B, L), highest scores first
        if self.merge > 1:
            rank = self._block_rank(patch_scores.view(-1, rows, columns), noise)  # (B, L)
            order = order.gather(1, rank.gather(1, order).argsort(dim=1, stable=True))
        return keep_first(order, keep_count(rows * columns, self.mask_ratio))

    def _block_rank(self, scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The rank (B, L) of each patch's block among the blocks of `scores` (B, rows, columns), the highest mean first."""
        rows, columns = scores.shape[1:]
        # On odd grids the blocks at the right and lower border are smaller: their means are over the patches they have.
        means = F.avg_pool2d(scores[:, None].float(), self.merge, ceil_mode=True, count_include_pad=False)[:, 0]
        order = sort_with_random_ties(-means.flatten(1), noise[:, : means[0].numel()])  # (B, blocks)
        rank = order.argsort(dim=1).view_as(means)  # the inverse of a permutation
        rank = rank.repeat_interleave(self.merge, dim=1).repeat_interleave(self.merge, dim=2)
        return rank[:, :rows, :columns].flatten(1)


@torch.no_grad()
def class_attention(
    vision_model: PreTrainedModel, pixel_values: torch.Tensor, image_size: int = 0, **images: torch.Tensor
) -> torch.Tensor:
    """How much a tower attends to each patch when it makes the image's state.

    With a class token: its attention weights, averaged over heads and layers, as in A-CLIP. With a pooling head (SigLIP): those
    of the head, averaged over its heads.

    Args:
        vision_model: in evaluation mode. With a class token, its attention implementation is "eager", which has weights.
        pixel_values: (B, C, H, W), or of NaFlex (B, L, P * P * C).
        image_size: the side in pixels at which the model sees the images; the scores are interpolated back. 0: as they are.
        images: what NaFlex's tower takes besides, `pixel_attention_mask` and `spatial_shapes`.

    Returns:
        (B, L) in float32.

    Raises:
        ValueError: a tower without both, or one that keeps no weights; an `image_size` for NaFlex, which keeps aspect ratios.
    """
    if pixel_values.ndim == 3:
        if image_size:
            raise ValueError(f"teacher_image_size={image_size}: must be 0 for NaFlex, which sees images in their own sizes")
        return _mean_weights(vision_model, pixel_values, **images)
    patch_size: Any = vision_model.config.patch_size  # Transformers types it as what other towers may have
    grid = whole_patch_grid(pixel_values, patch_size)
    if image_size:
        pixel_values = F.interpolate(pixel_values, (image_size, image_size), mode="bicubic", antialias=True)
    seen_grid = whole_patch_grid(pixel_values, patch_size)
    mean = _mean_weights(vision_model, pixel_values, interpolate_pos_encoding=True).view(-1, 1, *seen_grid)
    if seen_grid != grid:
        mean = F.interpolate(mean, grid, mode="bilinear", align_corners=False)
    return mean.flatten(1)


def _mean_weights(vision_model: PreTrainedModel, pixel_values: torch.Tensor, **images: Any) -> torch.Tensor:
    """The attention weights (B, L) of [`class_attention`] at the size that the model sees."""
    # A row is taken of each layer's map as it comes, for the maps of all layers at once would fill the memory.
    scores: list[torch.Tensor] = []  # (B, L) of each layer

    def take_class_row(module, inputs, outputs):
        if outputs[1] is None:
            raise ValueError("the vision model keeps no attention weights: set_attn_implementation('eager') lets it")
        scores.append(outputs[1][:, :, 0, 1:].float().mean(dim=1))

    def take_head(module, inputs, outputs):
        scores.append(outputs[1][:, 0].float())  # of one query, averaged over heads

    parts = dict(vision_model.named_modules())
    if "head.attention" in parts:
        hooks = [parts["head.attention"].register_forward_hook(take_head)]
    elif "embeddings.class_embedding" in dict(vision_model.named_parameters()):
        layers: Any = vision_model.get_submodule("encoder.layers")
        hooks = [layer.get_submodule("self_attn").register_forward_hook(take_class_row) for layer in layers]
    else:
        raise ValueError(
            f"{type(vision_model).__name__}: has neither class token nor pooling head whose attention tells patches"
        )
    try:
        vision_model(pixel_values, **images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(scores).mean(dim=0)
