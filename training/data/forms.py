"""What is made of a sample in each phase of a run: how large a picture, and which tokens of a caption."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from hf_maskclip.data.decoding import Decoder
from hf_maskclip.data.source import Source
from hf_maskclip.errors import fail
from hf_maskclip.phases import Phase, Timeline
from hf_maskclip.texts import context_length
from training.config import TrainingConfig
from training.data.frequency_masking import FrequencyTextMask, frequency_mask_for
from training.data.naflex import NaFlexTransform
from training.data.text_masking import TextMask, text_mask_for

LEAST_IMAGE_SIZE = 16  # in pixels: below it a scene cannot be drawn


@dataclass(frozen=True)
class PairForm:
    """What is made of a sample in a phase of training.

    Attributes:
        decoder: from a row to a picture and a caption.
        transform: from a picture to pixels, uint8 (3, H, W), or for NaFlex to its patches.
        text_mask: also cuts captions that are longer than the context.
        num_crops: of each picture, random ones.
    """

    decoder: Decoder
    transform: Callable[[Image.Image], torch.Tensor] | NaFlexTransform
    text_mask: TextMask | FrequencyTextMask
    num_crops: int = 1


@dataclass(frozen=True)
class FormByStep:
    """The form of the pairs of each step of a run: one for each phase."""

    timeline: Timeline
    forms: list[PairForm]

    def __call__(self, step: int) -> PairForm:
        return self.forms[self.timeline.number_at(step)]


def pair_forms(
    source: Source,
    config: TrainingConfig,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    word_counts: dict[str, float],
    timeline: Timeline,
) -> list[PairForm]:
    """The form of the pairs of each phase. Raises ConfigError for pictures or captions that the model does not take."""
    vision, tokenizer = model.config.vision_config, processor.tokenizer
    text_length = context_length(model.config, tokenizer)
    settings = processor.image_processor.to_dict()
    naflex = settings if settings.get("max_num_patches") else {}
    flip = config.flip if source.may_flip else 0.0
    forms = []
    for phase in timeline.phases:
        transform = build_transform(phase, source.decoder.image_size, vision.patch_size, naflex, config.crop_scale, flip)
        size = phase.image_size or source.decoder.image_size
        decoder = replace(source.decoder, image_size=size, crop_scale=config.crop_scale)
        text_mask = build_text_mask(config, phase, tokenizer, text_length, word_counts)
        forms.append(PairForm(decoder, transform, text_mask, num_crops=2 if config.views == "crops" else 1))
    return forms


def build_transform(
    phase: Phase, image_size: int, patch_size: int, naflex: dict[str, Any], crop_scale: float, flip: float
) -> Callable[[Image.Image], torch.Tensor] | NaFlexTransform:
    """From a picture to the pixels of a phase.

    Args:
        image_size: of the model.
        naflex: the settings of an image processor that keeps aspect ratios; empty for others.

    Raises:
        ConfigError: pictures of a size that the model does not take.
    """
    if naflex and phase.image_size:
        fail(f"image_size={phase.image_size}: must be 0 for SigLIP 2 NaFlex, which sees pictures in their own sizes")
    if naflex:
        return NaFlexTransform(naflex["patch_size"], naflex["max_num_patches"], crop_scale, flip)
    size, least = phase.image_size or image_size, max(LEAST_IMAGE_SIZE, 2 * patch_size)
    # The model's own size is what it is; in some, patches leave a rest.
    if size != image_size and (size % patch_size or not least <= size <= image_size):
        sides = f"at least {least}, and at most the model's {image_size}"
        fail(f"image_size={size}: must be a multiple of the patch size {patch_size}, {sides}")
    return CropTransform(size, crop_scale, flip)


class CropTransform:
    """Random resized crop and flip, to a uint8 tensor (3, image_size, image_size) in channels-last memory.

    PyTorch resizes uint8 pixels as Pillow does, to within 1 of 255, and in a third of its time. The crop is drawn as
    torchvision's `RandomResizedCrop` draws it.
    """

    def __init__(self, image_size: int, crop_scale: float, flip: float):
        self.size, self.flip = (image_size, image_size), flip
        self.crop = v2.RandomResizedCrop(image_size, scale=(crop_scale, 1.0), antialias=True)

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        pixels = pil_to_tensor(picture)  # (3, H, W)
        top, left, height, width = itemgetter("top", "left", "height", "width")(self.crop.make_params([pixels]))
        cropped = pixels[None, :, top : top + height, left : left + width]  # (1, 3, h, w)
        resized = interpolate(cropped, self.size, mode="bicubic", antialias=True)[0]  # (3, image_size, image_size)
        return resized.flip(2) if torch.rand(()) < self.flip else resized


def build_text_mask(
    config: TrainingConfig,
    phase: Phase,
    tokenizer: PreTrainedTokenizerBase,
    text_length: int,
    word_counts: dict[str, float],
) -> TextMask | FrequencyTextMask:
    """The text mask of a phase; without one, captions are cut to the context of `text_length` tokens.

    Raises:
        ConfigError: more tokens than the context has, or a tokenizer that the mask cannot use.
    """
    if phase.text_tokens > text_length:
        fail(f"text_tokens={phase.text_tokens}: the context of model={config.model!r} has {text_length}")
    if not phase.text_tokens:
        return text_mask_for(tokenizer, "none", text_length)
    if config.text_mask == "frequency":
        return frequency_mask_for(tokenizer, phase.text_tokens, word_counts, config.word_threshold)
    return text_mask_for(tokenizer, config.text_mask, phase.text_tokens)
