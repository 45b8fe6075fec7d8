"""From pictures to pixels as open_clip makes them.

Transformers and torchvision, which open_clip uses, resize alike and differ in the centre crop. Where an odd number of pixels is
cut, Transformers floors its half, and torchvision rounds it to even.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from ..data.decoding import SkippedSample, decode_image
from ..errors import as_config_error, fail

Picture = Image.Image | str | Path | Callable[[], Image.Image | None]


@dataclass(frozen=True)
class NamedPicture:
    """A picture that is opened when it is called, with the name that predictions know it by."""

    name: str
    open: Callable[[], Image.Image | None]

    def __call__(self) -> Image.Image | None:
        return self.open()


def name_of(picture: Picture) -> str:
    """The name of a picture, or its path; `""` where it has none."""
    if isinstance(picture, NamedPicture):
        return picture.name
    return str(picture) if isinstance(picture, (str, Path)) else ""


def load_picture(picture: Picture) -> Image.Image | None:
    """A picture in RGB, of what [`ImageSet`] takes; None where it cannot be decoded.

    Raises:
        ConfigError: a path at which nothing can be read, or something that is no picture.
    """
    if isinstance(picture, (str, Path)):
        with as_config_error("picture", picture):
            content = Path(picture).expanduser().read_bytes()
        try:
            return decode_image(content)
        except SkippedSample:
            return None
    found = picture() if callable(picture) else picture
    if found is not None and not isinstance(found, Image.Image):
        fail(f"a picture of type {type(found).__name__}: must be a PIL image, a path, or a function that returns a PIL image")
    return found.convert("RGB") if found else None


def picture_hash(picture: Image.Image) -> str:
    """Equal for equal pixels, so that a picture that stands on several rows is known again."""
    return hashlib.blake2b(repr(picture.size).encode() + picture.tobytes(), digest_size=16).hexdigest()


def with_pillow(image_processor: Any) -> Any:
    """The image processor of the same class and settings that resizes by Pillow, which evaluations use: open_clip's pixels."""
    name = type(image_processor).__name__.removesuffix("Pil")
    return getattr(transformers, f"{name}Pil")(**image_processor.to_dict())


def inputs_of(image_processor: Any, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """What a vision tower takes of RGB pictures of any size, by a Transformers image processor.

    Returns:
        `pixel_values` (B, C, H, W), with torchvision's centre crop where the processor crops. Of SigLIP 2 NaFlex they are
        (B, L, P * P * C), with `pixel_attention_mask` (B, L) and `spatial_shapes` (B, 2).
    """
    if not image_processor.do_center_crop:
        return dict(image_processor(images=pictures, return_tensors="pt"))
    resized = image_processor(images=pictures, do_center_crop=False, do_rescale=False, do_normalize=False)["pixel_values"]
    height, width = (image_processor.crop_size[side] for side in ("height", "width"))
    cropped = [transforms.center_crop(torch.as_tensor(picture), [height, width]) for picture in resized]
    done = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
    return dict(image_processor(images=cropped, return_tensors="pt", **done))
