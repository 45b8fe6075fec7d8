"""CLIP's vision tower, encoding only the visible patches of each image.

Shapes: B batch, C channels, L patches of an image, K kept patches, T packed tokens, D width.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import (
    CLIPVisionEmbeddings,
    CLIPVisionModel,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import DEFAULT_ATTENTION
from .configuration_maskclip import MaskCLIPVisionConfig
from .packed_attention import PackedCLIPAttention, Packing
from .patch_mask_registry import build_patch_mask
from .patch_masking import PatchMask, PatchSelection, patch_grid, patchify

# Transformers strips the `vision_model.` prefix of CLIP checkpoints by the name of the class: without this line a subclass
# under another name would start from random weights.
register_checkpoint_conversion_mapping(
    "MaskCLIPVisionModel", get_checkpoint_conversion_mapping("CLIPVisionModel"), overwrite=True
)

# What a checkpoint of a whole CLIP holds beyond its vision tower; the vision classes leave it aside without a report.
TEXT_KEYS = [r"^text_model", r"^text_projection", r"^logit_scale"]


@dataclass
class MaskCLIPVisionOutput(BaseModelOutputWithPooling):
    """Output of [`MaskCLIPVisionModel`]: `last_hidden_state` (B, 1 + K, D), `pooler_output` (B, D), and `patch_selection`, the
    [`PatchSelection`] that was used, or None where every patch was encoded. Where the images keep different numbers of patches,
    `last_hidden_state` has zeros in the padding, and `hidden_states` are packed, (1, T, D)."""

    patch_selection: PatchSelection | None = None


class MaskCLIPPreTrainedMixin:
    """What all MaskCLIP classes share: CLIP's initial weights, and loading that is complete or fails."""

    # Weights that a checkpoint may lack: heads that fine-tuning adds.
    _new_weights_allowed: tuple[str, ...] = ()

    @classmethod
    def is_custom_code(cls) -> bool:
        # For classes from outside, Transformers skips `_init_weights` on modules without parameters of their own. CLIP sets the
        # weights of its attention and MLP layers from just there, so they would start with another variance than CLIP's.
        return False

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        return super().get_correct_attn_implementation(requested_attention or DEFAULT_ATTENTION, is_init_check)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As `PreTrainedModel.from_pretrained`, for MaskCLIP and CLIP checkpoints.

        Raises:
            ValueError: the checkpoint lacks weights of this class; the message names the first of them.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(cls._new_weights_allowed or "\0"))
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path}: has no weights for {len(missing)} tensors of {cls.__name__}, "
                f"such as {missing[0]!r}"
            )
        return (model, info) if output_loading_info else model


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
        batch = len(pixel_values)
        weight = self.patch_embedding.weight.flatten(1)  # (D, C * P * P)
        patches = patchify(pixel_values, self.patch_size).flatten(2)  # (B, L, C * P * P)
        rows = patch_selection.indices + num_patches * torch.arange(batch, device=patches.device)[:, None]  # (B, K) of (B * L)
        visible = patches.flatten(0, 1).index_select(0, rows.flatten()).to(weight.dtype)  # (B * K, C * P * P)
        patch_embeds = nn.functional.linear(visible, weight).view(batch, -1, self.embed_dim)  # (B, K, D)

        positions = self.position_embedding.weight  # (1 + L, D)
        if interpolate_pos_encoding:
            positions = self.interpolate_pos_encoding(positions.new_empty(1, 1 + num_patches, self.embed_dim), height, width)[0]
        patch_embeds = patch_embeds + positions.index_select(0, 1 + patch_selection.indices.flatten()).view_as(patch_embeds)
        class_embeds = (self.class_embedding + positions[0]).expand(batch, 1, -1)  # (B, 1, D)
        return torch.cat([class_embeds, patch_embeds], dim=1)


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

    def __init__(self, config: MaskCLIPVisionConfig):
        super().__init__(config)
        # Only the classes change: the weights, their keys, and the order in which a seed draws them stay CLIP's.
        self.embeddings.__class__ = MaskCLIPVisionEmbeddings
        for layer in self.encoder.layers:
            layer.self_attn.__class__ = PackedCLIPAttention
        self.patch_mask = build_patch_mask(config.patch_mask, patch_size=config.patch_size)

    def select_patches(
        self,
        pixel_values: torch.Tensor,
        *,
        progress: float = 0.0,
        generator: torch.Generator | None = None,
        patch_mask: PatchMask | None = None,
        patch_scores: torch.Tensor | None = None,
    ) -> PatchSelection:
        """Let the patch mask choose the visible patches of images (B, C, H, W), whatever mode the model is in.

        Args:
            pixel_values: (B, C, H, W).
            progress: the share of training that is done, in [0, 1].
            generator: the mask's own source of randomness, on the device of `pixel_values`.
            patch_mask: used in place of the configured one, for example at another ratio.
            patch_scores: (B, L), for masks that need a teacher's attention.
        """
        patch_mask = self.patch_mask if patch_mask is None else patch_mask
        patch_embeds = None
        if patch_mask.needs_patch_embeds:
            with torch.no_grad():
                weight = self.embeddings.patch_embedding.weight
                patch_embeds = self.embeddings.patch_embedding(pixel_values.to(weight.dtype))  # (B, D, rows, columns)
                patch_embeds = patch_embeds.flatten(2).transpose(1, 2)  # (B, L, D)
        scores = {"patch_scores": patch_scores} if patch_mask.needs_patch_scores else {}
        # Without autocast, so that a mask is the same inside and outside of it: similarities need float32's resolution.
        with torch.autocast(pixel_values.device.type, enabled=False):
            return patch_mask(pixel_values, patch_embeds, progress=progress, generator=generator, **scores)

    def _resolve_selection(self, pixel_values, patch_selection, apply_patch_mask) -> PatchSelection | None:
        if patch_selection is not None:
            if apply_patch_mask is False:
                raise ValueError("apply_patch_mask=False contradicts the given patch_selection: pass one of the two")
            return patch_selection
        if apply_patch_mask is None:
            apply_patch_mask = self.training
            if self.training and not torch.is_grad_enabled() and not self.patch_mask.keeps_all:
                warnings.warn(
                    "a model in training mode masks patches at random, here without gradients: call model.eval() for whole"
                    " images, or pass apply_patch_mask=True if masked features are wanted",
                    stacklevel=2,
                )
        if not apply_patch_mask or self.patch_mask.keeps_all:
            return None
        return self.select_patches(pixel_values)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
        patch_selection: PatchSelection | None = None,
        apply_patch_mask: bool | None = None,
        **kwargs,
    ) -> MaskCLIPVisionOutput:
        """Encode the visible patches.

        Args:
            pixel_values: (B, C, H, W).
            interpolate_pos_encoding: stretch the position embeddings to images of another size.
            patch_selection: the visible patches; used as it is.
            apply_patch_mask: True masks and False does not, in either mode; by default the model masks in training mode only.
        """
        patch_selection = self._resolve_selection(pixel_values, patch_selection, apply_patch_mask)
        packing = None
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding, patch_selection)  # (B, 1 + K, D)
        if self.training:
            hidden_states = _in_autocast_dtype(hidden_states)
        if patch_selection is not None and patch_selection.lengths is not None:
            is_token = nn.functional.pad(patch_selection.valid(), (1, 0), value=True)  # (B, 1 + K)
            packing = Packing.of(is_token, create_bidirectional_mask(self.config, hidden_states, is_token))
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
