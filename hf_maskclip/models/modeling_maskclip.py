"""CLIP models that encode only the visible patches of each image.

Shapes: B batch, K kept patches, D width, E projection size, S caption tokens.
The masks have no parameters, so state-dict keys are CLIP's, and a trained model is a plain CLIP.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.clip.modeling_clip import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPPreTrainedModel,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
)
from transformers.utils.generic import can_return_tuple

from .attention import DEFAULT_ATTENTION
from .configuration_maskclip import MaskCLIPConfig, MaskCLIPVisionConfig
from .masked_models import PatchMaskedClassifier, PatchMaskedDualEncoder, PatchMaskedProjection
from .masked_tower import MaskedVisionOutput
from .modeling_maskclip_base import OTHER_TEXTS, TEXT_KEYS, WHOLE_CLIP, MaskCLIPPreTrainedMixin
from .modeling_maskclip_vision import MaskCLIPVisionModel
from .patch_mask_registry import PatchMaskSpec
from .patch_masking import PatchSelection


class MaskCLIPModel(PatchMaskedDualEncoder, MaskCLIPPreTrainedMixin, CLIPModel):
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
                f"{source}: is a 'metaclip_2' whose eos_token_id is 2, with which CLIP's text tower reads another token; "
                f"use add_patch_mask(AutoModel.from_pretrained({str(source)!r}), ...)"
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
    ) -> MaskedVisionOutput:
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

    def _prepare_texts(self, texts: dict[str, Any]) -> dict[str, Any]:
        """In training on a CPU, captions are cut after the end token of the longest, and the text states with them."""
        if not self.training or "position_ids" in texts:
            return texts
        input_ids, attention_mask = self._trim_captions(texts["input_ids"], texts.get("attention_mask"))
        return texts | {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})

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


class MaskCLIPVisionModelWithProjection(PatchMaskedProjection, MaskCLIPPreTrainedMixin, CLIPVisionModelWithProjection):
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


class MaskCLIPForImageClassification(PatchMaskedClassifier, MaskCLIPPreTrainedMixin, CLIPForImageClassification):
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


__all__ = [
    "MaskCLIPForImageClassification",
    "MaskCLIPModel",
    "MaskCLIPVisionModel",
    "MaskCLIPVisionModelWithProjection",
]
