"""CLIP's vision tower, encoding only the visible patches of each image.

Shapes: B batch, C channels, L patches of an image, K kept patches, T packed tokens, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import (
    CLIPVisionEmbeddings,
    CLIPVisionModel,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_maskclip import MaskCLIPVisionConfig
from .modeling_maskclip_base import TEXT_KEYS, MaskCLIPPreTrainedMixin, PatchMaskSpec
from .packed_attention import PackedCLIPAttention, Packing
from .patch_mask_registry import build_patch_mask
from .patch_masking import PatchMask, PatchSelection, patch_grid, patchify
from .selection_checks import check_no_typo, check_selection, warn_of_masks_without_gradients


@dataclass
class MaskCLIPVisionOutput(BaseModelOutputWithPooling):
    """Output of [`MaskCLIPVisionModel`]: `last_hidden_state` (B, 1 + K, D), `pooler_output` (B, D), and `patch_selection`, the
    [`PatchSelection`] that was used, or None where every patch was encoded. Where the images keep different numbers of patches,
    `last_hidden_state` has zeros in the padding, and `hidden_states` are packed, (1, T, D)."""

    patch_selection: PatchSelection | None = None


class PatchConv2d(nn.Conv2d):
    """The convolution that embeds patches, which also takes patches one by one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.shape[-2:] != self.kernel_size:
            return super().forward(input)
        # A matrix product, several times as fast on a CPU as the convolution of (N, C, P, P).
        return nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]  # (N, D, 1, 1)


class MaskCLIPVisionEmbeddings(CLIPVisionEmbeddings):
    """`CLIPVisionEmbeddings` that can leave out patches. It has no weights of its own."""

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        patch_selection: PatchSelection | None = None,
    ) -> torch.Tensor:
        """The class token and the embeddings of the visible patches alone, (B, 1 + K, D), positions added."""
        if patch_selection is None:
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        num_patches = math.prod(patch_grid(pixel_values, self.patch_size))
        if patch_selection.lengths is None and patch_selection.indices.shape[1] == num_patches:
            # Every patch, in order: CLIP's own computation, to the last bit.
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != (self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"Input image size ({height}*{width}) doesn't match model ({size}*{size}).")
        batch, channels = pixel_values.shape[:2]
        patches = patchify(pixel_values, self.patch_size)  # (B, L, C, P * P)
        rows = patch_selection.indices + num_patches * torch.arange(batch, device=patches.device)[:, None]  # (B, K) of (B * L)
        visible = patches.flatten(0, 1).index_select(0, rows.flatten())  # (B * K, C, P * P)
        visible = visible.view(-1, channels, self.patch_size, self.patch_size).to(self.patch_embedding.weight.dtype)
        # The modules themselves are called, so that hooks, adapters and offloading take part.
        patch_embeds = self.patch_embedding(visible).view(batch, -1, self.embed_dim)  # (B * K, D, 1, 1) -> (B, K, D)

        first = torch.zeros_like(patch_selection.indices[:, :1])  # (B, 1), of the class token
        tokens = torch.cat([first, 1 + patch_selection.indices], dim=1)  # (B, 1 + K)
        if interpolate_pos_encoding:
            like = patch_embeds.new_empty(1, 1 + num_patches, self.embed_dim)
            positions = self.interpolate_pos_encoding(like, height, width)[0].index_select(0, tokens.flatten())
            positions = positions.view(batch, -1, self.embed_dim)  # (B, 1 + K, D)
        else:
            positions = self.position_embedding(tokens)  # (B, 1 + K, D)
        return torch.cat([self.class_embedding.expand(batch, 1, -1), patch_embeds], dim=1) + positions


# Arguments of `forward` by which patches are chosen.
CHOICE_OPTIONS = ("patch_selection", "apply_patch_mask", "patch_mask", "progress", "generator", "patch_scores")


class MaskCLIPVisionModel(MaskCLIPPreTrainedMixin, CLIPVisionModel):
    """CLIP's vision tower with a patch mask.

    In training mode the mask of `config.patch_mask` chooses the visible patches; in evaluation mode all are encoded, and the
    output is exactly CLIP's.

    Example:

        config = MaskCLIPVisionConfig(patch_mask={"name": "random", "mask_ratio": 0.75})
        tower = MaskCLIPVisionModel(config).train()
        output = tower(torch.randn(2, 3, 224, 224))
        output.last_hidden_state.shape  # (2, 1 + 13, 768): the class token and a quarter of 49 patches
        output.patch_selection.indices  # (2, 13)
    """

    config: MaskCLIPVisionConfig
    _keys_to_ignore_on_load_unexpected = [*TEXT_KEYS, r"^visual_projection"]

    def __init__(self, config: MaskCLIPVisionConfig, patch_mask: PatchMaskSpec | None = None):
        super().__init__(MaskCLIPVisionConfig.of(config))
        # Only the classes change: the weights, their keys, and the order in which a seed draws them stay CLIP's.
        self.embeddings.__class__ = MaskCLIPVisionEmbeddings
        self.embeddings.patch_embedding.__class__ = PatchConv2d
        for layer in self.encoder.layers:
            layer.self_attn.__class__ = PackedCLIPAttention
        # What chooses the patches in training mode in place of `select_patches`, such as a callback that goes by the step.
        self.training_selector: Callable[[torch.Tensor], PatchSelection | None] | None = None
        self.set_patch_mask(self.config.patch_mask if patch_mask is None else patch_mask)

    @property
    def patch_mask(self) -> PatchMask:
        """The patch mask; built anew where the configuration has got another one."""
        if self._patch_mask_options != self.config.patch_mask:
            self.set_patch_mask(self.config.patch_mask)
        return self._modules["patch_mask"]

    def set_patch_mask(self, patch_mask: PatchMaskSpec) -> None:
        mask = build_patch_mask(patch_mask, patch_size=self.config.patch_size)
        self.config.patch_mask = patch_mask
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

        Args:
            pixel_values: (B, C, H, W).
            progress: the share of training that is done, in [0, 1].
            generator: the mask's own source of randomness, on the device of `pixel_values`.
            patch_mask: used in place of the model's, for example at another ratio: a name, a dict or a mask.
            patch_scores: (B, L), for masks that need a teacher's attention.
        """
        mask = self.patch_mask
        if patch_mask is not None:
            mask = build_patch_mask(patch_mask, patch_size=self.config.patch_size)
        patch_embeds = None
        if mask.needs_patch_embeds:
            with torch.no_grad():
                weight = self.embeddings.patch_embedding.weight
                patch_embeds = self.embeddings.patch_embedding(pixel_values.to(weight.dtype))  # (B, D, rows, columns)
                patch_embeds = patch_embeds.flatten(2).transpose(1, 2)  # (B, L, D)
        if patch_scores is not None and not mask.needs_patch_scores:
            raise ValueError(f"patch_scores: the patch mask {type(mask).__name__} takes none")
        scores = {"patch_scores": patch_scores} if mask.needs_patch_scores else {}
        # Without autocast, so that a mask is the same inside and outside of it: similarities need float32's resolution.
        with torch.autocast(pixel_values.device.type, enabled=False):
            return mask(pixel_values, patch_embeds, progress=progress, generator=generator, **scores)

    def with_chosen_patches(self, pixel_values: torch.Tensor, **kwargs) -> dict[str, Any]:
        """The arguments of `forward` with its choice of patches made: which are visible, and how they are packed.

        A choice of varying sizes ends a compiled graph. A model that makes it first has two graphs: the choice, and all else.
        """
        options = {key: kwargs.pop(key, None) for key in CHOICE_OPTIONS}
        selection, packing = self._choose_patches(pixel_values, kwargs.get("interpolate_pos_encoding"), **options)
        return kwargs | {"patch_selection": selection, "packing": packing, "apply_patch_mask": selection is not None}

    def _choose_patches(
        self, pixel_values, interpolate_pos_encoding, patch_selection, apply_patch_mask, **options
    ) -> tuple[PatchSelection | None, Packing | None]:
        """The visible patches, None where all are, and their packing where images keep different numbers of them."""
        pixel_values = self._whole_patches(pixel_values, interpolate_pos_encoding)
        options = {key: value for key, value in options.items() if value is not None}
        selection = self._resolve_selection(pixel_values, patch_selection, apply_patch_mask, options)
        if selection is None or selection.lengths is None:
            return selection, None
        is_token = nn.functional.pad(selection.valid(), (1, 0), value=True)  # (B, 1 + K)
        return selection, Packing.of(is_token, torch.compiler.is_dynamo_compiling())

    def _resolve_selection(self, pixel_values, patch_selection, apply_patch_mask, options) -> PatchSelection | None:
        """The selection that a forward pass goes by; None where every patch is encoded."""
        given = {"patch_selection": patch_selection is not None, "patch_mask": "patch_mask" in options}
        given |= {"apply_patch_mask=False": apply_patch_mask is False}
        if sum(given.values()) > 1:
            contradicting = " and ".join(name for name, is_given in given.items() if is_given)
            raise ValueError(f"{contradicting}: contradict each other, pass one of them")
        if patch_selection is not None:
            check_selection(patch_selection, pixel_values, self.config.patch_size)
            return patch_selection
        if self.training and self.training_selector is not None and apply_patch_mask is None and not options:
            return self.training_selector(pixel_values)
        has_mask = "patch_mask" in options or not self.patch_mask.keeps_all
        if apply_patch_mask and not has_mask:
            raise ValueError(
                "apply_patch_mask=True: the model has no patch mask, give it one by set_patch_mask or patch_mask=..."
            )
        if apply_patch_mask is None:
            apply_patch_mask = self.training or "patch_mask" in options
            if self.training and not torch.is_grad_enabled() and has_mask:
                warn_of_masks_without_gradients()
        return self.select_patches(pixel_values, **options) if apply_patch_mask and has_mask else None

    def _whole_patches(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None) -> torch.Tensor:
        """Images of any size without what the convolution leaves out: less than a patch, at the right and at the bottom."""
        if not interpolate_pos_encoding:
            return pixel_values
        rows, columns = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        return pixel_values[..., : rows * self.config.patch_size, : columns * self.config.patch_size]

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
        patch_selection: PatchSelection | None = None,
        apply_patch_mask: bool | None = None,
        patch_mask: PatchMaskSpec | None = None,
        progress: float | None = None,
        generator: torch.Generator | None = None,
        patch_scores: torch.Tensor | None = None,
        packing: Packing | None = None,
        **kwargs,
    ) -> MaskCLIPVisionOutput:
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
        check_no_typo(kwargs)
        if packing is None:
            patch_selection, packing = self._choose_patches(
                pixel_values,
                interpolate_pos_encoding,
                patch_selection,
                apply_patch_mask,
                patch_mask=patch_mask,
                progress=progress,
                generator=generator,
                patch_scores=patch_scores,
            )
        return self._encode(pixel_values, interpolate_pos_encoding, patch_selection, packing, **kwargs)

    def _encode(self, pixel_values, interpolate_pos_encoding, patch_selection, packing, **kwargs) -> MaskCLIPVisionOutput:
        """The states of the visible patches, packed where images keep different numbers of them."""
        pixel_values = self._whole_patches(pixel_values, interpolate_pos_encoding)
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding, patch_selection)  # (B, 1 + K, D)
        if self.training:
            hidden_states = _in_autocast_dtype(hidden_states)
        if packing is not None:
            positions = torch.arange(packing.padded_length, device=packing.lengths.device)
            is_token = positions < packing.lengths[:, None]  # (B, 1 + K)
            packing = packing._replace(attention_mask=create_bidirectional_mask(self.config, hidden_states, is_token))
            hidden_states = packing.pack(hidden_states)[None]  # (1, T, D)
            kwargs["packing"] = packing
        hidden_states = self.pre_layrnorm(hidden_states)
        hidden_states = self.encoder(inputs_embeds=hidden_states, attention_mask=None, **kwargs).last_hidden_state
        if packing is None:
            class_states = hidden_states[:, 0, :]  # (B, D)
        else:
            class_states = hidden_states[0].index_select(0, packing.starts)
            hidden_states = packing.unpack(hidden_states[0])  # (B, 1 + K, D)
        return MaskCLIPVisionOutput(
            last_hidden_state=hidden_states,
            pooler_output=self.post_layernorm(class_states),
            patch_selection=patch_selection,
        )


def _in_autocast_dtype(states: torch.Tensor) -> torch.Tensor:
    """Cast states to autocast's dtype, as open_clip does: norms and residuals then move half the bytes."""
    device_type = states.device.type
    return states.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else states
