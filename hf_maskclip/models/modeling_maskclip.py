"""CLIP models that encode only the visible patches of each image.

Shapes: B batch, K kept patches, D width, E projection size, S caption tokens.
The masks have no parameters, so state-dict keys are CLIP's, and a trained model is a plain CLIP.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.clip.modeling_clip import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPOutput,
    CLIPPreTrainedModel,
    CLIPTextModel,
    CLIPVisionModelOutput,
    CLIPVisionModelWithProjection,
    image_text_contrastive_loss,
)
from transformers.utils.generic import can_return_tuple

from .attention import DEFAULT_ATTENTION
from .configuration_maskclip import MaskCLIPConfig, MaskCLIPVisionConfig
from .modeling_maskclip_base import OTHER_TEXTS, TEXT_KEYS, WHOLE_CLIP, MaskCLIPPreTrainedMixin, PatchMaskSpec
from .modeling_maskclip_vision import MaskCLIPVisionModel, MaskCLIPVisionOutput
from .patch_masking import PatchSelection


@dataclass
class MaskCLIPVisionModelOutput(CLIPVisionModelOutput):
    """Output of [`MaskCLIPVisionModelWithProjection`]: CLIP's, and the `patch_selection` that was used."""

    patch_selection: PatchSelection | None = None


@dataclass
class MaskCLIPOutput(CLIPOutput):
    """Output of [`MaskCLIPModel`]: CLIP's, and the `patch_selection` that was used. Of `vision_model_output`, a
    [`MaskCLIPVisionOutput`], the `hidden_states` are packed where images keep different numbers of patches."""

    patch_selection: PatchSelection | None = None


@dataclass
class MaskCLIPImageClassifierOutput(ImageClassifierOutput):
    """Output of [`MaskCLIPForImageClassification`]: the usual one, and the `patch_selection` that was used."""

    patch_selection: PatchSelection | None = None


class MaskCLIPModel(MaskCLIPPreTrainedMixin, CLIPModel):
    """CLIP whose vision tower is a [`MaskCLIPVisionModel`]. One seed gives it the same weights as `CLIPModel`.

    Example:

        model = MaskCLIPModel.from_pretrained("runs/quickstart/export")
        features = model.train().get_image_features(pixel_values)  # of visible patches
        features.patch_selection.lengths  # (B,), how many patches of each image were visible
        whole = model.eval().get_image_features(pixel_values)  # exactly CLIP's
    """

    config: MaskCLIPConfig
    _checkpoint_types = WHOLE_CLIP

    def __init__(self, config: MaskCLIPConfig, patch_mask: PatchMaskSpec | None = None):
        # CLIPModel.__init__ names the class of its vision tower, so the parts are built here, in its order.
        config = MaskCLIPConfig.of(config)
        CLIPPreTrainedModel.__init__(self, config)
        self.projection_dim = config.projection_dim
        self.text_embed_dim = config.text_config.hidden_size
        self.vision_embed_dim = config.vision_config.hidden_size
        attention = config.text_config._attn_implementation or DEFAULT_ATTENTION
        self.text_model = CLIPTextModel._from_config(config.text_config, attn_implementation=attention)
        self.vision_model = MaskCLIPVisionModel._from_config(config.vision_config, patch_mask=patch_mask)
        self.visual_projection = nn.Linear(self.vision_embed_dim, self.projection_dim, bias=False)
        self.text_projection = nn.Linear(self.text_embed_dim, self.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(self.config.logit_scale_init_value))
        self.post_init()

    @classmethod
    def _check_checkpoint(cls, source, **kwargs):
        """Also refuses a text tower that finds the end of a caption in another way than CLIP's."""
        saved = super()._check_checkpoint(source, **kwargs)
        if saved.get("model_type") == "metaclip_2" and saved.get("text_config", {}).get("eos_token_id") == 2:
            raise ValueError(
                f"{source}: is a 'metaclip_2' whose eos_token_id is 2: CLIP's text tower reads the largest token then, not the "
                "end token; its image encoder loads into MaskCLIPVisionModelWithProjection"
            )
        return saved

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        patch_selection: PatchSelection | None = None,
        apply_patch_mask: bool | None = None,
        **kwargs,
    ) -> MaskCLIPVisionOutput:
        """The features (B, E) of images, not normalised, as `pooler_output`; of visible patches where the model masks.

        Args:
            pixel_values: (B, C, H, W).
            patch_selection, apply_patch_mask, and in `kwargs` patch_mask, progress, generator, patch_scores: as in
                [`MaskCLIPVisionModel`].
        """
        outputs = self.vision_model(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            patch_selection=patch_selection,
            apply_patch_mask=apply_patch_mask,
            **kwargs,
        )
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        patch_selection: PatchSelection | None = None,
        apply_patch_mask: bool | None = None,
        patch_mask: PatchMaskSpec | None = None,
        progress: float | None = None,
        generator: torch.Generator | None = None,
        patch_scores: torch.Tensor | None = None,
        **kwargs,
    ) -> MaskCLIPOutput:
        """As `CLIPModel.forward`, with the patch mask's arguments. In training on a CPU, captions are cut after the end token
        of the longest, and the text states with them.

        Args:
            input_ids, attention_mask: (B, S).
            pixel_values: (B, C, H, W).
            return_loss: also return the contrastive loss of this batch; several processes need `ContrastiveLoss`.
            patch_selection, apply_patch_mask, patch_mask, progress, generator, patch_scores: as in [`MaskCLIPVisionModel`].
        """
        if input_ids is None or pixel_values is None:
            raise ValueError(f"{'input_ids' if input_ids is None else 'pixel_values'} is None: a CLIP takes texts and images")
        vision_options = self.vision_model.with_chosen_patches(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            patch_selection=patch_selection,
            apply_patch_mask=apply_patch_mask,
            patch_mask=patch_mask,
            progress=progress,
            generator=generator,
            patch_scores=patch_scores,
        )
        vision_outputs = self.get_image_features(pixel_values, **vision_options, **kwargs)
        if self.training and position_ids is None:
            input_ids, attention_mask = self._trim_captions(input_ids, attention_mask)
        text_outputs = self.get_text_features(input_ids, attention_mask, position_ids, **kwargs)
        return self._compare(vision_outputs, text_outputs, return_loss)

    def _compare(self, vision_outputs, text_outputs, return_loss: bool | None) -> MaskCLIPOutput:
        """The logits of images and texts, and the loss if asked for, in CLIP's order of operations."""
        image_embeds = _unit_length(vision_outputs.pooler_output)  # (B, E)
        text_embeds = _unit_length(text_outputs.pooler_output)  # (B, E)
        logits_per_text = torch.matmul(text_embeds, image_embeds.t()) * self.logit_scale.exp()
        return MaskCLIPOutput(
            loss=image_text_contrastive_loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
            patch_selection=vision_outputs.patch_selection,
        )

    def _trim_captions(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """On a CPU, cut what follows the end token of the longest caption, up to a multiple of 8.

        That is exact: the text tower is causal and pools at the end token, so it never reads what follows.
        """
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            # This would wait for the device, or break a graph; there the data loader trims.
            return input_ids, attention_mask
        end_token = self.config.text_config.eos_token_id
        # Where CLIP pools: configurations of before Transformers 4.31 have 2 for the end token, whose id is the largest.
        ends = (input_ids if end_token == 2 else (input_ids == end_token).int()).argmax(dim=1)  # (B,)
        length = -(-(int(ends.max()) + 1) // 8) * 8
        return input_ids[:, :length], None if attention_mask is None else attention_mask[:, :length]


def _unit_length(embeds: torch.Tensor) -> torch.Tensor:
    # In CLIPModel's order of operations, so that the result is equal to the last bit.
    return embeds / embeds.pow(2).sum(dim=-1, keepdim=True).pow(0.5)


class MaskCLIPVisionModelWithProjection(MaskCLIPPreTrainedMixin, CLIPVisionModelWithProjection):
    """CLIP's vision tower and its projection, with a patch mask.

    Example:

        tower = MaskCLIPVisionModelWithProjection.from_pretrained("runs/quickstart/export")
        tower.eval()(pixel_values).image_embeds  # (B, E), not normalised
    """

    config: MaskCLIPVisionConfig
    _keys_to_ignore_on_load_unexpected = TEXT_KEYS

    def __init__(self, config: MaskCLIPVisionConfig, patch_mask: PatchMaskSpec | None = None):
        config = MaskCLIPVisionConfig.of(config)
        CLIPPreTrainedModel.__init__(self, config)
        self.vision_model = MaskCLIPVisionModel._from_config(config, patch_mask=patch_mask)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> MaskCLIPVisionModelOutput:
        """Arguments as in [`MaskCLIPVisionModel`]; `image_embeds` (B, E) are not normalised."""
        outputs = self.vision_model(pixel_values, **self.vision_model.with_chosen_patches(pixel_values, **kwargs))
        return MaskCLIPVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            patch_selection=outputs.patch_selection,
        )


class MaskCLIPForImageClassification(MaskCLIPPreTrainedMixin, CLIPForImageClassification):
    """A classifier on the mean of the visible patches' states, fine-tuned with a patch mask.

    Example:

        model = MaskCLIPForImageClassification.from_pretrained("runs/quickstart/export", num_labels=2)
        loss = model.train()(pixel_values, labels=torch.tensor([0, 1])).loss
    """

    config: MaskCLIPConfig
    _keys_to_ignore_on_load_unexpected = [*TEXT_KEYS, r"^visual_projection"]
    _checkpoint_types = (*WHOLE_CLIP, *OTHER_TEXTS)
    _new_weights_allowed = ("classifier.",)
    _frozen_modules = ("vision_model.post_layernorm",)  # of the class token, which has no part in the loss

    def __init__(self, config: MaskCLIPConfig, patch_mask: PatchMaskSpec | None = None):
        config = MaskCLIPConfig.of(config)
        CLIPPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vision_model = MaskCLIPVisionModel._from_config(config.vision_config, patch_mask=patch_mask)
        width = config.vision_config.hidden_size
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs
    ) -> MaskCLIPImageClassifierOutput:
        """Arguments as in [`MaskCLIPVisionModel`], and `labels` (B,)."""
        outputs = self.vision_model(pixel_values, **self.vision_model.with_chosen_patches(pixel_values, **kwargs))
        patches = outputs.last_hidden_state[:, 1:, :]  # (B, K, D)
        selection = outputs.patch_selection
        if selection is None or selection.lengths is None:
            pooled = torch.mean(patches, dim=1)
        else:
            pooled = (patches * selection.valid()[..., None]).sum(dim=1) / selection.lengths[:, None]
        logits = self.classifier(pooled)
        return MaskCLIPImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            patch_selection=selection,
        )


__all__ = [
    "MaskCLIPForImageClassification",
    "MaskCLIPModel",
    "MaskCLIPVisionModel",
    "MaskCLIPVisionModelWithProjection",
]
