"""A vision tower that encodes only the visible patches of each image, whatever family of CLIP it is from.

Shapes: B batch, C channels, L patches of an image, K kept patches, T packed tokens, D width, N its tokens: K, and 1 more where
it has a class token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .masked_parts import Joined, PaddedPoolingHead, PatchConv, VisibleEmbeddings, join_in_place
from .packed_attention import PackedAttention, Packing
from .patch_mask_registry import PatchMaskSpec, build_patch_mask, resolve_patch_mask
from .patch_masking import PatchMask, PatchSelection, whole_patch_grid
from .selection_by_picture import select_by_picture
from .selection_checks import check_no_typo, check_selection, warn_of_masks_without_gradients


@dataclass
class MaskedVisionOutput(BaseModelOutputWithPooling):
    """Output of a vision tower with a patch mask: `last_hidden_state` (B, N, D), `pooler_output` (B, D), and
    `patch_selection`, the [`PatchSelection`] that was used, or None where every patch was encoded. Where the images keep
    different numbers of patches, `last_hidden_state` has zeros in the padding, and `hidden_states` are packed, (1, T, D)."""

    patch_selection: PatchSelection | None = None


# Arguments of `forward` by which patches are chosen.
CHOICE_OPTIONS = ("patch_selection", "apply_patch_mask", "patch_mask", "progress", "generator", "patch_scores")


class PatchMaskedTower(Joined):
    """What goes before the class of a vision tower: the choice of patches, and a forward pass over the chosen ones."""

    num_prefix_tokens: ClassVar[int]  # 1 with a class token, else 0
    interpolates: ClassVar[bool] = False  # whether images of other sizes are taken where nothing is said
    # Arguments of `forward` that tell of the images, besides their pixels.
    image_arguments: ClassVar[tuple[str, ...]] = ("interpolate_pos_encoding",)

    def add_patch_mask(self, patch_mask: PatchMaskSpec) -> None:
        """Let the parts of the tower leave out patches. Their weights, and the keys of these, stay."""
        self._mask_parts()
        for layer in self.encoder.layers:
            join_in_place(layer.self_attn, PackedAttention)
        # What chooses the patches in training mode in place of `select_patches`, such as a callback that goes by the step.
        self.training_selector: Callable[..., PatchSelection | None] | None = None
        self.set_patch_mask(patch_mask)

    def _mask_parts(self) -> None:
        join_in_place(self.embeddings, VisibleEmbeddings)
        join_in_place(self.embeddings.patch_embedding, PatchConv)

    @property
    def patch_mask(self) -> PatchMask:
        """The patch mask; built anew where the configuration has got another one."""
        if self._patch_mask_options != self.config.patch_mask:
            self.set_patch_mask(self.config.patch_mask)
        return self._modules["patch_mask"]

    def set_patch_mask(self, patch_mask: PatchMaskSpec) -> None:
        """Give the tower another patch mask, and its configuration the same: a name, a dict of options, or a mask.

        Raises:
            ValueError: unknown mask or option, a value out of range, or another patch size.
        """
        mask = build_patch_mask(patch_mask, patch_size=self.config.patch_size)
        self.config.patch_mask = resolve_patch_mask(patch_mask)
        self._patch_mask_options = dict(self.config.patch_mask)
        self._modules["patch_mask"] = mask

    def __setattr__(self, name, value):
        if name == "patch_mask":
            self.set_patch_mask(value)
        else:
            super().__setattr__(name, value)

    def select_patches(
        self,
        pixel_values: torch.Tensor,
        *,
        progress: float = 0.0,
        generator: torch.Generator | None = None,
        patch_mask: PatchMaskSpec | None = None,
        patch_scores: torch.Tensor | None = None,
    ) -> PatchSelection:
        """Let the patch mask choose the visible patches of images (B, C, H, W), whatever mode the model is in.

        In evaluation mode without a generator there is no chance: the same pixels get the same patches, whatever their batch
        ([`select_by_picture`]).

        Args:
            pixel_values: (B, C, H, W).
            progress: the share of training that is done, in [0, 1].
            generator: the mask's own source of randomness, on the device of `pixel_values`. By default PyTorch's global one in
                training mode; in evaluation mode one for each picture, seeded by a hash of its pixels.
            patch_mask: used in place of the model's, for example at another ratio: a name, a dict or a mask.
            patch_scores: (B, L), for masks that need a teacher's attention.
        """
        mask = self.patch_mask
        if patch_mask is not None:
            mask = build_patch_mask(patch_mask, patch_size=self.config.patch_size)
        if patch_scores is not None and not mask.needs_patch_scores:
            raise ValueError(f"patch_scores: the patch mask {type(mask).__name__} takes none")
        pixel_values = self._whole_patches(pixel_values, None)
        choose = partial(self._choose_by, mask, progress)
        if generator is None and not self.training:
            return select_by_picture(choose, pixel_values, patch_scores)
        return choose(pixel_values, patch_scores, generator)

    def _choose_by(self, mask, progress, pixel_values, patch_scores, generator) -> PatchSelection:
        """Let a mask choose from images (B, C, H, W) at once."""
        patch_embeds = None
        if mask.needs_patch_embeds:
            with torch.no_grad():
                patch_embeds = self._patch_embeds(pixel_values)
        scores = {"patch_scores": patch_scores} if mask.needs_patch_scores else {}
        # Without autocast, so that a mask is the same inside and outside of it: similarities need float32's resolution.
        with torch.autocast(pixel_values.device.type, enabled=False):
            return mask(pixel_values, patch_embeds, progress=progress, generator=generator, **scores)

    def _patch_embeds(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Of all patches of images (B, C, H, W), (B, L, D)."""
        weight = self.embeddings.patch_embedding.weight
        patch_embeds = self.embeddings.patch_embedding(pixel_values.to(weight.dtype))  # (B, D, rows, columns)
        return patch_embeds.flatten(2).transpose(1, 2)

    def with_chosen_patches(self, pixel_values: torch.Tensor, **kwargs) -> dict[str, Any]:
        """The arguments of `forward` with its choice of patches made: which are visible, and how they are packed.

        A choice of varying sizes ends a compiled graph. A model that makes it first has two graphs: the choice, and all else.
        """
        options = {key: kwargs.pop(key, None) for key in CHOICE_OPTIONS}
        images = {key: kwargs[key] for key in self.image_arguments if key in kwargs}
        selection, packing = self._choose_patches(pixel_values, images, **options)
        return kwargs | {"patch_selection": selection, "packing": packing, "apply_patch_mask": selection is not None}

    def _choose_patches(
        self, pixel_values, images, patch_selection, apply_patch_mask, **options
    ) -> tuple[PatchSelection | None, Packing | None]:
        """The visible patches, None where all are, and their packing where images keep different numbers of them."""
        options = {key: value for key, value in options.items() if value is not None}
        selection = self._resolve_selection(pixel_values, images, patch_selection, apply_patch_mask, options)
        if selection is None or selection.lengths is None:
            return selection, None
        is_token = nn.functional.pad(selection.valid(), (self.num_prefix_tokens, 0), value=True)  # (B, N)
        return selection, Packing.of(is_token)

    def _resolve_selection(self, pixel_values, images, patch_selection, apply_patch_mask, options) -> PatchSelection | None:
        """The selection that a forward pass goes by; None where every patch is encoded."""
        given = {"patch_selection": patch_selection is not None, "patch_mask": "patch_mask" in options}
        given |= {"apply_patch_mask=False": apply_patch_mask is False}
        if sum(given.values()) > 1:
            contradicting = " and ".join(name for name, is_given in given.items() if is_given)
            raise ValueError(f"{contradicting}: contradict each other, pass one of them")
        pixel_values, images = self._to_choose_from(pixel_values, **images)
        if patch_selection is not None:
            self._check_selection(patch_selection, pixel_values, **images)
            return patch_selection
        if self.training and self.training_selector is not None and apply_patch_mask is None and not options:
            return self.training_selector(pixel_values, **images)
        has_mask = "patch_mask" in options or not self.patch_mask.keeps_all
        if apply_patch_mask and not has_mask:
            raise ValueError(
                "apply_patch_mask=True: the model has no patch mask, give it one by set_patch_mask or patch_mask=..."
            )
        if apply_patch_mask is None:
            apply_patch_mask = self.training or "patch_mask" in options
            if self.training and not torch.is_grad_enabled() and has_mask:
                warn_of_masks_without_gradients()
        return self.select_patches(pixel_values, **images, **options) if apply_patch_mask and has_mask else None

    def _to_choose_from(self, pixel_values, interpolate_pos_encoding=None) -> tuple[torch.Tensor, dict[str, Any]]:
        """The pixels, and the arguments besides them, that `select_patches` takes."""
        return self._whole_patches(pixel_values, interpolate_pos_encoding), {}

    def _check_selection(self, patch_selection: PatchSelection, pixel_values: torch.Tensor) -> None:
        check_selection(patch_selection, pixel_values, self.config.patch_size)

    def _whole_patches(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None) -> torch.Tensor:
        """Images without what the convolution leaves out: less than a patch, at the right and at the bottom.

        Those of the tower's own size, such as SigLIP's 384 pixels in patches of 14, and of any size where positions stretch.
        """
        is_own = tuple(pixel_values.shape[-2:]) == (self.config.image_size, self.config.image_size)
        if not (is_own or self._interpolates(interpolate_pos_encoding)):
            return pixel_values
        rows, columns = whole_patch_grid(pixel_values, self.config.patch_size)
        return pixel_values[..., : rows * self.config.patch_size, : columns * self.config.patch_size]

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        patch_selection: PatchSelection | None = None,
        apply_patch_mask: bool | None = None,
        patch_mask: PatchMaskSpec | None = None,
        progress: float | None = None,
        generator: torch.Generator | None = None,
        patch_scores: torch.Tensor | None = None,
        packing: Packing | None = None,
        **kwargs,
    ) -> MaskedVisionOutput:
        """Encode the visible patches.

        Args:
            pixel_values: (B, C, H, W).
            interpolate_pos_encoding: stretch the position embeddings to images of another size.
            patch_selection: the visible patches; used as it is.
            apply_patch_mask: True masks and False does not, in either mode; by default the model masks in training mode only.
            patch_mask, progress, generator, patch_scores: as in `select_patches`. A `patch_mask` given here is applied.
            packing: of that selection, where `with_chosen_patches` has made it.

        Raises:
            ValueError: a selection that does not fit the images; `apply_patch_mask=True` without a mask.
            TypeError: another keyword that speaks of a mask or of patches.
        """
        images = {"interpolate_pos_encoding": interpolate_pos_encoding}
        choice = (patch_selection, apply_patch_mask)
        options = {"patch_mask": patch_mask, "progress": progress, "generator": generator, "patch_scores": patch_scores}
        return self._choose_and_encode(pixel_values, images, choice, options, packing, kwargs)

    def _choose_and_encode(self, pixel_values, images, choice, options, packing, kwargs) -> MaskedVisionOutput:
        """The pass of `forward`, whatever arguments tell of the images.

        Args:
            choice: `patch_selection` and `apply_patch_mask`.
            options: of `select_patches`.
        """
        check_no_typo(kwargs)
        selection = choice[0]
        if packing is None:
            selection, packing = self._choose_patches(pixel_values, images, *choice, **options)
        return self._encode(pixel_values, images, selection, packing, **kwargs)

    def _encode(self, pixel_values, images, patch_selection, packing, **kwargs) -> MaskedVisionOutput:
        """The states of the visible patches, packed where images keep different numbers of them."""
        hidden_states = self._embed(pixel_values, patch_selection, **images)  # (B, N, D)
        if self.training:
            hidden_states = _in_autocast_dtype(hidden_states)
        if packing is not None:
            packing = packing.for_attention(self.config, hidden_states)
            hidden_states = packing.pack(hidden_states)[None]  # (1, T, D)
            kwargs["packing"] = packing
        # Which tokens are there in whole images that are padded, (B, N).
        is_there = images.get("pixel_attention_mask") if patch_selection is None else None
        mask = None if is_there is None else create_bidirectional_mask(self.config, hidden_states, is_there)
        hidden_states = self._before_layers(hidden_states)
        if packing is not None and not torch.compiler.is_compiling():
            torch._dynamo.maybe_mark_dynamic(hidden_states, 1)  # for layers that are compiled by themselves
        hidden_states = self.encoder(inputs_embeds=hidden_states, attention_mask=mask, **kwargs).last_hidden_state
        if packing is not None:
            is_there = patch_selection.valid()
        hidden_states, pooled = self._pool(hidden_states, packing, is_there)
        return MaskedVisionOutput(last_hidden_state=hidden_states, pooler_output=pooled, patch_selection=patch_selection)

    def _interpolates(self, interpolate_pos_encoding: bool | None) -> bool:
        return self.interpolates if interpolate_pos_encoding is None else interpolate_pos_encoding

    def _embed(self, pixel_values, patch_selection, interpolate_pos_encoding) -> torch.Tensor:
        """The embeddings (B, N, D) of the visible patches, and of the class token where there is one."""
        pixel_values = self._whole_patches(pixel_values, interpolate_pos_encoding)
        return self.embeddings(pixel_values, self._interpolates(interpolate_pos_encoding), patch_selection)

    def _before_layers(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def _pool(self, hidden_states, packing, is_there) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The states (B, N, D), as the tower gives them, and what it makes of them for each image, (B, D).

        Args:
            hidden_states: (B, N, D), or (1, T, D) with a packing.
            is_there: (B, K), which patches are no padding, or None where none is padding.
        """
        raise NotImplementedError


class ClassTokenTower(PatchMaskedTower):
    """CLIP's tower, and those of its kin: a class token, which is the image's state, and a norm before the layers."""

    num_prefix_tokens = 1

    def _before_layers(self, hidden_states):
        return self.pre_layrnorm(hidden_states)

    def _pool(self, hidden_states, packing, is_there):
        if packing is None:
            class_states = hidden_states[:, 0, :]  # (B, D)
        else:
            class_states = hidden_states[0].index_select(0, packing.starts)
            hidden_states = packing.unpack(hidden_states[0])  # (B, N, D)
        return hidden_states, self.post_layernorm(class_states)


class InterpolatingTower(ClassTokenTower):
    """CLIPSeg's tower: CLIP's, which takes images of any size where nothing is said."""

    interpolates = True


class PoolingHeadTower(PatchMaskedTower):
    """SigLIP's tower: no class token; a head attends to all patches, if the configuration has one."""

    num_prefix_tokens = 0

    def _mask_parts(self):
        super()._mask_parts()
        if self.use_head:
            join_in_place(self.head, PaddedPoolingHead)

    def _pool(self, hidden_states, packing, is_there):
        hidden_states = self.post_layernorm(hidden_states)
        if packing is not None:
            hidden_states = packing.unpack(hidden_states[0])  # (B, K, D)
        return hidden_states, self.head(hidden_states, is_there) if self.use_head else None


def _in_autocast_dtype(states: torch.Tensor) -> torch.Tensor:
    """Cast states to autocast's dtype, as open_clip does: norms and residuals then move half the bytes."""
    device_type = states.device.type
    return states.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else states
