"""The families of dual encoders whose vision towers take a patch mask, and `add_patch_mask`, which gives them one.

A family is one record. It names what its tower is made of, and what training and evaluation have to know of its texts.
"""

from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from .masked_models import (
    PatchMaskedClassifier,
    PatchMaskedDualEncoder,
    PatchMaskedModel,
    PatchMaskedProjection,
    PatchMaskedSigmoidDualEncoder,
)
from .masked_naflex import NaFlexTower
from .masked_parts import Joined, join_in_place
from .masked_tower import ClassTokenTower, InterpolatingTower, PatchMaskedTower, PoolingHeadTower
from .patch_mask_registry import PatchMaskSpec

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Family:
    """What differs between dual encoders of Transformers.

    Attributes:
        title: what people call it.
        prefix: of its classes in Transformers.
        model_type: of the whole model's configuration.
        tower: what goes before the class of its vision tower.
        loss: that the family was trained with.
        pads_texts: captions are padded to the whole context, for the text tower reads the last position, padded or not.
        needs_attention_mask: the text tower reads all positions, so it has to be told which of them are padding.
        pools_at_end: the text tower reads a caption at its end token.
        text_encoder: the name of the text tower's layers as one module.
        skips_positions: the text tower's first position is the one behind its padding token's id, as in RoBERTa.
    """

    title: str
    prefix: str
    model_type: str
    tower: type[PatchMaskedTower] = ClassTokenTower
    loss: Literal["contrastive", "sigmoid"] = "contrastive"
    pads_texts: bool = False
    needs_attention_mask: bool = False
    pools_at_end: bool = False
    text_encoder: str = "text_model.encoder"
    skips_positions: bool = False

    def text_positions(self, max_position_embeddings: int, pad_token_id: int | None) -> int:
        """The most tokens of a text that its text tower has positions for, by two numbers of the configuration."""
        if not self.skips_positions or pad_token_id is None:
            return max_position_embeddings
        return max_position_embeddings - pad_token_id - 1

    @property
    def tower_type(self) -> str:
        """The model type of the vision tower's own configuration."""
        return f"{self.model_type}_vision_model"

    @property
    def mixins(self) -> dict[str, type[Joined]]:
        """What goes before the classes of the family, by their names."""
        is_sigmoid = self.loss == "sigmoid"
        kinds = {
            "Model": PatchMaskedSigmoidDualEncoder if is_sigmoid else PatchMaskedDualEncoder,
            "VisionModel": self.tower,
            "VisionModelWithProjection": PatchMaskedProjection,
            "ForImageClassification": PatchMaskedClassifier,
        }
        return {f"{self.prefix}{kind}": mixin for kind, mixin in kinds.items()}


FAMILIES = (
    Family("CLIP", "CLIP", "clip", pools_at_end=True),
    Family("MetaCLIP 2", "MetaClip2", "metaclip_2", pools_at_end=True),
    Family(
        "AltCLIP",
        "AltCLIP",
        "altclip",
        needs_attention_mask=True,
        text_encoder="text_model.roberta.encoder",
        skips_positions=True,
    ),
    Family("ChineseCLIP", "ChineseCLIP", "chinese_clip", needs_attention_mask=True),
    Family("CLIPSeg", "CLIPSeg", "clipseg", InterpolatingTower, pools_at_end=True),
    Family("SigLIP and SigLIP 2", "Siglip", "siglip", PoolingHeadTower, "sigmoid", pads_texts=True),
    Family("SigLIP 2 NaFlex", "Siglip2", "siglip2", NaFlexTower, "sigmoid", pads_texts=True),
)


def find_family(model_type: str | None) -> Family | None:
    """The family of a configuration's `model_type`, of a whole model or of its vision tower; None where it is in none."""
    model_type = {"maskclip": "clip", "maskclip_vision_model": "clip_vision_model"}.get(model_type or "", model_type)
    return next((family for family in FAMILIES if model_type in (family.model_type, family.tower_type)), None)


def known_families() -> str:
    """The families and their model types, for messages."""
    return ", ".join(f"{family.title} ({family.model_type})" for family in FAMILIES)


def add_patch_mask(model: Model, patch_mask: PatchMaskSpec | None = None) -> Model:
    """Give a loaded model of Transformers a patch mask, in place, and return it.

    Only the classes of its parts change. Weights, keys, configuration type and `save_pretrained` stay the model's own: what it
    saves is plain. In training mode the mask chooses the visible patches; in evaluation mode the output is exactly the plain
    model's. The configuration of the vision tower records the mask.

    Args:
        model: a dual encoder, a vision tower (with or without a projection), or a classifier, of a family in `FAMILIES`.
        patch_mask: a name, a dict of options, or a mask; by default the one that the configuration records.

    Example:

        model = add_patch_mask(AutoModel.from_pretrained("google/siglip2-base-patch16-224"), "pgs")
        features = model.train().get_image_features(pixel_values)  # of visible patches

    Raises:
        ValueError: a model of another family, or no mask.
    """
    mixin = _mixin_of(model)
    has_tower = not issubclass(mixin, PatchMaskedTower)
    tower = model.get_submodule("vision_model") if has_tower else model
    patch_mask = patch_mask if patch_mask is not None else tower.config.to_dict().get("patch_mask")
    if patch_mask is None:
        raise ValueError(f"patch_mask=None: the configuration of this {type(model).__name__} records none, name one")
    if isinstance(tower, PatchMaskedTower):
        tower.set_patch_mask(patch_mask)
        return model
    join_in_place(tower, _mixin_of(tower))
    join_in_place(model, mixin)  # which changes nothing where the model is the tower
    tower.add_patch_mask(patch_mask)
    return model


def _mixin_of(model: nn.Module) -> type[Joined]:
    """What goes before the class of a model. Raises ValueError where there is no such thing."""
    found = type(model).__name__
    if isinstance(model, (PatchMaskedModel, PatchMaskedTower)):
        return next(base for base in type(model).__mro__ if issubclass(base, Joined) and base is not type(model))
    for base in type(model).__mro__:  # a subclass of yours is what it is a subclass of
        for family in FAMILIES:
            if base.__module__.startswith("transformers.") and base.__name__ in family.mixins:
                return family.mixins[base.__name__]
    inner = next((type(part).__name__ for part in model.modules() if _is_known(type(part))), None)
    if inner is not None:
        raise ValueError(f"{found}: a patch mask goes into the {inner} in it, before it is wrapped")
    raise ValueError(f"{found}: no patch mask for a model of this class; there are masks for {known_families()}")


def _is_known(model_class: type) -> bool:
    return any(model_class.__name__ in family.mixins for family in FAMILIES)
