"""What every patch mask leaves of a picture, as panels."""

import copy
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from PIL import Image
from transformers import PreTrainedModel

from ..models.patch_mask_registry import patch_masks, resolve_patch_mask, set_mask_ratios
from ..visualization import Panel, mask_panels, pgs_panels

MIN_PATCHES_PER_SIDE = 14  # those of ViT-B/16 at 224 pixels: on fewer, one mask looks like another


class Setting(NamedTuple):
    """A slider from 0 to `most`, by whose label messages name it."""

    label: str
    most: float
    step: float
    info: str


SETTINGS = (
    Setting("Mask ratio", 0.95, 0.05, "the share that all masks but PGS hide"),
    Setting("PGS: least mask ratio", 0.95, 0.05, "PGS hides at least this share"),
    Setting("PGS: largest mask ratio", 0.95, 0.05, "and at most this one"),
    Setting("PGS: similarity threshold", 1, 0.05, "a cosine; patches above it count as alike"),
    Setting("Seed", 99, 1, "another draw of the same masks"),
)


def mask_names() -> list[str]:
    return [name for name, mask in patch_masks().items() if not mask.keeps_all]


def attention_teacher(vision_model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a vision tower that shares its weights and keeps attention weights.

    What looks into the copy as it runs sees no pass of another visitor.
    """
    shared = {id(tensor): tensor for tensor in chain(vision_model.parameters(), vision_model.buffers())}
    teacher = copy.deepcopy(vision_model, shared)
    teacher.set_attn_implementation("eager")
    return teacher


def default_settings() -> list[float]:
    pgs = resolve_patch_mask("pgs")
    return [0.5, pgs["min_mask_ratio"], pgs["max_mask_ratio"], pgs["similarity_threshold"], 0]


def check_settings(values: Sequence[float | None]) -> None:
    """Raise a ValueError that names the slider where a number is missing, outside of it, or does not go with another."""
    for setting, value in zip(SETTINGS, values, strict=True):
        if value is None or not 0 <= value <= setting.most:
            raise ValueError(f"{setting.label}: {'nothing' if value is None else value} is not from 0 to {setting.most}.")
    _, least, largest, *_ = values
    if least > largest:
        first, second = SETTINGS[1].label, SETTINGS[2].label
        raise ValueError(f"{first} is {least:g}, above {second}, which is {largest:g}: move one of the two.")


def show_masks(model: PreTrainedModel, image: Image.Image, *settings: float) -> tuple[list[Panel], list[Panel]]:
    """What every mask leaves visible of a picture, and the stages of PGS.

    Patches have the model's size. There are at least 14 of them a side, so that a tiny model's masks can be told apart too.

    Args:
        model: whose attention the attentive mask goes by.
        image: of any size.
        settings: the values of `SETTINGS`.
    """
    check_settings(settings)
    mask_ratio, min_mask_ratio, max_mask_ratio, similarity_threshold, seed = settings
    pgs = {"min_mask_ratio": min_mask_ratio, "max_mask_ratio": max_mask_ratio, "similarity_threshold": similarity_threshold}
    masks = {name: set_mask_ratios(name, mask_ratio) for name in mask_names()} | {"pgs": {"name": "pgs"} | pgs}
    vision = model.config.vision_config
    image_size = max(vision.image_size, MIN_PATCHES_PER_SIDE * vision.patch_size)
    sizes = {"image_size": image_size, "patch_size": vision.patch_size, "seed": int(seed)}
    (every,) = mask_panels([image], masks, **sizes, teacher=attention_teacher(model.vision_model))
    (stages,) = pgs_panels([image], masks["pgs"], **sizes)
    return every, stages
