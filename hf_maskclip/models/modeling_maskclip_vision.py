"""CLIP's vision tower, encoding only the visible patches of each image."""

from transformers.models.clip.modeling_clip import CLIPVisionModel

from .configuration_maskclip import MaskCLIPVisionConfig
from .masked_tower import ClassTokenTower
from .modeling_maskclip_base import TEXT_KEYS, MaskCLIPPreTrainedMixin
from .patch_mask_registry import PatchMaskSpec


class MaskCLIPVisionModel(ClassTokenTower, MaskCLIPPreTrainedMixin, CLIPVisionModel):
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
        # Only the classes of parts change: the weights, their keys, and the order in which a seed draws them stay CLIP's.
        self.add_patch_mask(self.config.patch_mask if patch_mask is None else patch_mask)
