"""Models around a vision tower with a patch mask: dual encoders, towers with a projection, and classifiers.

Each is a mixin that goes before the class of a model, whose parts and methods it uses.

Shapes: B batch, K kept patches, D width, E projection size, S caption tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPOutput, CLIPVisionModelOutput, image_text_contrastive_loss
from transformers.utils.generic import can_return_tuple

from .masked_parts import Joined
from .patch_mask_registry import PatchMaskSpec
from .patch_masking import PatchMask, PatchSelection


@dataclass
class MaskedVisionModelOutput(CLIPVisionModelOutput):
    """Output of a tower with a projection: CLIP's, and the `patch_selection` that was used."""

    patch_selection: PatchSelection | None = None


@dataclass
class MaskedDualEncoderOutput(CLIPOutput):
    """Output of a dual encoder: CLIP's, and the `patch_selection` that was used. Of `vision_model_output`, a
    [`MaskedVisionOutput`], the `hidden_states` are packed where images keep different numbers of patches."""

    patch_selection: PatchSelection | None = None


@dataclass
class MaskedImageClassifierOutput(ImageClassifierOutput):
    """Output of a classifier: the usual one, and the `patch_selection` that was used."""

    patch_selection: PatchSelection | None = None


class PatchMaskedModel(Joined):
    """A model whose `vision_model` has a patch mask."""

    # The losses are means over the batch, so the Trainer has to divide them by the steps that it accumulates over.
    accepts_loss_kwargs = False

    @property
    def patch_mask(self) -> PatchMask:
        """The patch mask of the vision tower."""
        return self.vision_model.patch_mask

    def set_patch_mask(self, patch_mask: PatchMaskSpec) -> None:
        """Give the model another patch mask, and its configuration the same.

        Args:
            patch_mask: a name, a dict such as `{"name": "pgs", "min_mask_ratio": 0.3}`, or a mask for the model's patch size.

        Raises:
            ValueError: unknown mask or option, a value out of range, or another patch size.
        """
        self.vision_model.set_patch_mask(patch_mask)

    def select_patches(self, pixel_values: torch.Tensor, **kwargs) -> PatchSelection:
        """Let the patch mask choose the visible patches of images: [`PatchMaskedTower.select_patches`]."""
        return self.vision_model.select_patches(pixel_values, **kwargs)


class PatchMaskedDualEncoder(PatchMaskedModel):
    """An image and a text encoder that are compared by the cosine of their features, times a factor, as in CLIP."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        patch_selection: PatchSelection | None = None,
        apply_patch_mask: bool | None = None,
        patch_mask: PatchMaskSpec | None = None,
        progress: float | None = None,
        generator: torch.Generator | None = None,
        patch_scores: torch.Tensor | None = None,
        **kwargs,
    ) -> MaskedDualEncoderOutput:
        """As the model's own `forward`, with the patch mask's arguments.

        Args:
            input_ids, attention_mask, token_type_ids: (B, S), those that the family takes.
            pixel_values: (B, C, H, W); of SigLIP 2 NaFlex (B, L, P * P * C), with `pixel_attention_mask` (B, L) and
                `spatial_shapes` (B, 2).
            return_loss: also return the loss of this batch; several processes need `ContrastiveLoss` or `SigmoidLoss`.
            patch_selection, apply_patch_mask, patch_mask, progress, generator, patch_scores: as in [`PatchMaskedTower`].
        """
        if input_ids is None or pixel_values is None:
            raise ValueError(f"{'input_ids' if input_ids is None else 'pixel_values'} is None: a CLIP takes texts and images")
        images = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        images |= {"interpolate_pos_encoding": interpolate_pos_encoding}
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        vision_options = self.vision_model.with_chosen_patches(
            pixel_values,
            **_given(images),
            patch_selection=patch_selection,
            apply_patch_mask=apply_patch_mask,
            patch_mask=patch_mask,
            progress=progress,
            generator=generator,
            patch_scores=patch_scores,
        )
        vision_outputs = self.get_image_features(pixel_values, **vision_options, **kwargs)
        texts = self._prepare_texts(_given(texts | {"position_ids": position_ids}))
        text_outputs = self.get_text_features(**texts, **kwargs)
        return self._compare(vision_outputs, text_outputs, return_loss)

    def _prepare_texts(self, texts: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `get_text_features`, changed where that saves work."""
        return texts

    def _compare(self, vision_outputs, text_outputs, return_loss: bool | None) -> MaskedDualEncoderOutput:
        """The logits of images and texts, and the loss if asked for, in the model's own order of operations."""
        image_embeds = self._unit_length(vision_outputs.pooler_output)  # (B, E)
        text_embeds = self._unit_length(text_outputs.pooler_output)  # (B, E)
        logits_per_text = self._scaled(torch.matmul(text_embeds, image_embeds.t()))
        return MaskedDualEncoderOutput(
            loss=self._loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
            patch_selection=vision_outputs.patch_selection,
        )

    def _unit_length(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds / embeds.pow(2).sum(dim=-1, keepdim=True).pow(0.5)

    def _scaled(self, cosines: torch.Tensor) -> torch.Tensor:
        return cosines * self.logit_scale.exp()

    def _loss(self, logits_per_text: torch.Tensor) -> torch.Tensor:
        return image_text_contrastive_loss(logits_per_text)


class PatchMaskedSigmoidDualEncoder(PatchMaskedDualEncoder):
    """SigLIP: the logits have a bias, and each pair is a match or not, by itself (arXiv 2303.15343)."""

    def _unit_length(self, embeds):
        return embeds / embeds.norm(p=2, dim=-1, keepdim=True)

    def _scaled(self, cosines):
        return cosines * self.logit_scale.exp() + self.logit_bias

    def _loss(self, logits_per_text):
        matches = 2 * torch.eye(len(logits_per_text), device=logits_per_text.device) - 1  # (B, B)
        return -F.logsigmoid(matches * logits_per_text).sum(dim=-1).mean()


class PatchMaskedProjection(PatchMaskedModel):
    """A vision tower and its projection."""

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> MaskedVisionModelOutput:
        """Arguments as in [`PatchMaskedTower`]; `image_embeds` (B, E) are not normalised."""
        outputs = self.vision_model(pixel_values, **self.vision_model.with_chosen_patches(pixel_values, **kwargs))
        return MaskedVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            patch_selection=outputs.patch_selection,
        )


class PatchMaskedClassifier(PatchMaskedModel):
    """A classifier on the mean of the visible patches' states."""

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs
    ) -> MaskedImageClassifierOutput:
        """Arguments as in [`PatchMaskedTower`], and `labels` (B,)."""
        outputs = self.vision_model(pixel_values, **self.vision_model.with_chosen_patches(pixel_values, **kwargs))
        patches = outputs.last_hidden_state[:, self.vision_model.num_prefix_tokens :, :]  # (B, K, D)
        selection = outputs.patch_selection
        is_there = kwargs.get("pixel_attention_mask")  # (B, K)
        if selection is not None:
            is_there = None if selection.lengths is None else selection.valid()
        if is_there is None:
            pooled = torch.mean(patches, dim=1)
        else:
            is_there = is_there[..., None]
            pooled = torch.sum(patches * is_there, dim=1) / torch.sum(is_there, dim=1)
        logits = self.classifier(pooled)
        return MaskedImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            patch_selection=selection,
        )


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if value is not None}
