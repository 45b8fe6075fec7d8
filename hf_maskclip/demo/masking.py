"""What every patch mask leaves of a picture, as panels."""

import copy
from itertools import chain

from PIL import Image

from ..models.modeling_maskclip import MaskCLIPModel
from ..models.modeling_maskclip_vision import MaskCLIPVisionModel
from ..models.patch_mask_registry import patch_masks, resolve_patch_mask
from ..visualization import Panel, mask_panels, pgs_panels

MIN_PATCHES_PER_SIDE = 14  # those of ViT-B/16 at 224 pixels: on fewer, one mask looks like another
LEAST, LARGEST = "PGS: least mask ratio", "PGS: largest mask ratio"  # the sliders' labels, which messages name


def mask_names() -> list[str]:
    return [name for name, mask in patch_masks().items() if not mask.keeps_all]


def mask_at_ratio(name: str, mask_ratio: float) -> dict:
    """The dict of a patch mask that removes this fraction: each option that ends in `mask_ratio` is set to it."""
    options = resolve_patch_mask(name)
    return options | {key: mask_ratio for key in options if key.endswith("mask_ratio")}


def attention_teacher(vision_model: MaskCLIPVisionModel) -> MaskCLIPVisionModel:
    """A copy of a vision tower that shares its weights and keeps attention weights.

    What looks into the copy as it runs sees no pass of another visitor.
    """
    shared = {id(tensor): tensor for tensor in chain(vision_model.parameters(), vision_model.buffers())}
    teacher = copy.deepcopy(vision_model, shared)
    teacher.set_attn_implementation("eager")
    return teacher


def show_masks(
    model: MaskCLIPModel,
    image: Image.Image,
    mask_ratio: float,
    min_mask_ratio: float,
    max_mask_ratio: float,
    similarity_threshold: float,
    seed: int,
) -> tuple[list[Panel], list[Panel]]:
    """What every mask leaves visible of a picture, and the stages of PGS.

    Patches have the model's size. There are at least 14 of them a side, so that a tiny model's masks can be told apart too.

    Args:
        model: whose attention the attentive mask goes by.
        image: of any size.
        mask_ratio: of all masks but PGS.
        min_mask_ratio, max_mask_ratio, similarity_threshold: of PGS.
        seed: of the masks' randomness.
    """
    if min_mask_ratio > max_mask_ratio:
        raise ValueError(f"{LEAST} is {min_mask_ratio:g}, above {LARGEST}, which is {max_mask_ratio:g}: move one of the two.")
    pgs = {"min_mask_ratio": min_mask_ratio, "max_mask_ratio": max_mask_ratio, "similarity_threshold": similarity_threshold}
    masks = {name: mask_at_ratio(name, mask_ratio) for name in mask_names()} | {"pgs": {"name": "pgs"} | pgs}
    vision = model.config.vision_config
    image_size = max(vision.image_size, MIN_PATCHES_PER_SIDE * vision.patch_size)
    sizes = {"image_size": image_size, "patch_size": vision.patch_size, "seed": int(seed)}
    (every,) = mask_panels([image], masks, **sizes, teacher=attention_teacher(model.vision_model))
    (stages,) = pgs_panels([image], masks["pgs"], **sizes)
    return every, stages
