"""From the value of a field to a picture in RGB, or to the cause why it gives none.

A value is the bytes of a file, their base64 text, a path, a 🤗 Datasets image, a list of one of these, or a Pillow image.
"""

import base64
import binascii
import io
import math
import os
import warnings
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps

# Above this many pixels a picture is not decoded: a small file can unfold to gigabytes.
MAX_IMAGE_PIXELS = 89_478_485
# The full scales of pixels that are no bytes: floats of either kind, and integers of 16 and 32 bits.
FLOAT_SCALES = (1, 255, 65_535, 2**32 - 1)
INTEGER_SCALES = FLOAT_SCALES[2:]


class SkippedSample(Exception):
    """A sample gives no image-text pair; the argument is the cause under which it is counted."""


def decode_image(value: Any, image_size: int = 0, crop_scale: float = 0.0, folder: str = "") -> Image.Image:
    """Decode a picture to RGB: upright by its EXIF tag, on white where it is transparent, deep channels scaled to 8 bits.

    Args:
        value: of a field, of any type.
        image_size, crop_scale: a JPEG is decoded at a half, a quarter or an eighth of its size where no random resized crop of
            `crop_scale` of its area needs more. A `crop_scale` of 0 decodes it whole.
        folder: what a relative path starts from.

    Raises:
        SkippedSample: `image_missing`, `image_is_url`, `image_type_unknown`, `file_unreadable`, `image_too_large`, or
            `image_undecodable`. Nothing else, whatever a decoder raises.
    """
    content = value if isinstance(value, Image.Image) else content_of(value, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is either handled here or harmless
            picture = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise SkippedSample("image_too_large")
            if crop_scale:
                picture.draft(None, draft_size(*picture.size, image_size, crop_scale))  # formats other than JPEG ignore it
            picture.load()
            return to_rgb(upright(picture))
    except SkippedSample:
        raise
    except (Image.DecompressionBombError, MemoryError):
        raise SkippedSample("image_too_large") from None
    except Exception:  # Pillow's decoders raise what comes up on damaged files
        raise SkippedSample("image_undecodable") from None


def content_of(value: Any, folder: str = "") -> bytes | Image.Image:
    """The bytes of a picture's file, or the picture where the field holds one. Raises as [`decode_image`]."""
    while isinstance(value, (list, tuple, dict)):
        if isinstance(value, dict):  # an undecoded 🤗 Datasets image
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        elif len(value) > 1:
            raise SkippedSample("image_type_unknown")
        else:
            value = value[0] if value else None
    if value is None:
        raise SkippedSample("image_missing")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (str, os.PathLike)):
        return _read(os.fspath(value), folder)
    raise SkippedSample("image_type_unknown")


def _read(text: str, folder: str) -> bytes:
    """The file that a path names, or what base64 text stands for."""
    if text.startswith(("http://", "https://")):
        raise SkippedSample("image_is_url")  # to fetch one at a time would take longer than to train
    if text.startswith("data:") or len(text) > 1024:  # longer than a path may be
        try:
            return base64.b64decode(text.rpartition(",")[2], validate=not text.startswith("data:"))
        except (binascii.Error, ValueError):
            raise SkippedSample("image_undecodable") from None
    is_relative = "://" not in text and not os.path.isabs(text)
    for name in dict.fromkeys((text, text.replace("\\", "/"))):  # a table may have been written on Windows
        try:
            path = f"{folder}/{name}" if folder and is_relative else name
            with datasets.download.streaming_download_manager.xopen(path, "rb") as file:
                return file.read()
        except Exception:  # fsspec passes on what the clients of its file systems raise
            continue
    raise SkippedSample("file_unreadable")


def upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF tag says. A damaged tag leaves it as it is: the pixels are there."""
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # of writing the other tags back, too
        pass
    return picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB of 8 bits, what is transparent on white."""
    if picture.mode.startswith("I;16"):
        return _from_numbers(np.asarray(picture, np.float64), INTEGER_SCALES)
    if picture.mode in ("I", "F"):
        return _from_numbers(np.asarray(picture, np.float64), INTEGER_SCALES if picture.mode == "I" else FLOAT_SCALES)
    if picture.has_transparency_data:
        on_white = Image.new("RGBA", picture.size, "white")
        on_white.alpha_composite(picture.convert("RGBA"))
        return on_white.convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_numbers(values: np.ndarray, scales: tuple[int, ...]) -> Image.Image:
    """Numbers (H, W) in grey: the least of the full scales that holds them all becomes 255."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    full = next((scale for scale in scales if values.max(initial=0) <= scale), values.max(initial=1))
    return Image.fromarray((values * (255 / full)).round().astype(np.uint8)).convert("RGB")


def draft_size(width: int, height: int, image_size: int, crop_scale: float) -> tuple[int, int]:
    """The smallest size at which a JPEG can be decoded such that no random resized crop has to be enlarged.

    A crop has at least `crop_scale` of the area, at an aspect of at most 4 / 3, so its shorter side is at least
    sqrt(crop_scale * area * 3 / 4); of a long picture it can be the picture's shorter side.
    """
    for scale in (8, 4, 2):
        small = width // scale, height // scale
        if min(small) >= image_size and crop_scale * math.prod(small) * 3 / 4 >= image_size**2:
            return small
    return width, height
