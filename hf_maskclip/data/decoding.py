"""From an undecoded row to a picture and its caption, or to the cause why it gives none."""

import io
import json
import math
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import numpy as np
from PIL import Image, ImageOps

IMAGE_KEYS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("txt", "text", "caption", "json.caption")
# Above this many pixels a picture is not decoded: a small file can unfold to gigabytes.
MAX_IMAGE_PIXELS = 89_478_485


class SkippedSample(Exception):
    """A sample gives no image-text pair; the argument is the cause under which it is counted."""


class Decoder(Protocol):
    """What turns the rows of a source into pairs. Each method raises SkippedSample where the row has none.

    Attributes:
        image_size: the side in pixels that pictures are needed at; larger ones may come.
        crop_scale: the least share of a picture's area that a crop in training has; 0: pictures are needed whole.
    """

    image_size: int
    crop_scale: float

    def __call__(self, row: dict[str, Any], rng: np.random.Generator) -> tuple[Image.Image, str]:
        """The picture in RGB and one caption, drawn by `rng` where there are several."""

    def picture(self, row: dict[str, Any]) -> Image.Image:
        """The picture in RGB."""

    def captions(self, row: dict[str, Any], rng: np.random.Generator) -> list[str]:
        """All captions, at least one; `rng` is for sources that make them up."""


@dataclass
class PairDecoder:
    """Turns a row of files or of a Hub data set into a picture and its caption.

    Args:
        image_key, caption_key: the field to read, or several separated by commas, of which the first that a sample has is read;
            `""` tries the known ones. `a.b` reads b in the JSON of field a.
        image_size, crop_scale: a JPEG is decoded at a half, a quarter or an eighth of its size where no crop needs more.
            A `crop_scale` of 0 decodes it whole.
    """

    image_key: str = ""
    caption_key: str = ""
    image_size: int = 0
    crop_scale: float = 0.0

    def __call__(self, row: dict[str, Any], rng: np.random.Generator) -> tuple[Image.Image, str]:
        """The picture in RGB and one caption (drawn by `rng` where there are several). Raises SkippedSample with the cause."""
        if "__error__" in row:
            raise SkippedSample(row["__error__"])
        captions = self.captions(row, rng)  # before the picture, for it is cheap
        caption = captions[rng.integers(len(captions))]
        return self.picture(row), caption

    def picture(self, row: dict[str, Any]) -> Image.Image:
        value = _first_field(row, self.image_key.split(",") if self.image_key else IMAGE_KEYS)
        if isinstance(value, dict):  # an undecoded 🤗 Datasets image
            value = value["bytes"] if value.get("bytes") is not None else _read_file(value.get("path"))
        if value is None:
            raise SkippedSample("image_missing")
        return decode_image(value, self.image_size, self.crop_scale)

    def captions(self, row: dict[str, Any], rng: np.random.Generator) -> list[str]:
        value = _first_field(row, self.caption_key.split(",") if self.caption_key else CAPTION_KEYS)
        if value is None:
            raise SkippedSample("caption_missing")
        texts = value if isinstance(value, (list, tuple)) else [value]
        captions = [caption for caption in map(_decode_text, texts) if caption]
        if not captions:
            raise SkippedSample("caption_empty")
        return captions


def decode_image(content: bytes, image_size: int = 0, crop_scale: float = 0.0) -> Image.Image:
    """Decode a picture to RGB, upright by its EXIF tag. Raises SkippedSample for what is no picture or far too large.

    Args:
        image_size, crop_scale: as in [`PairDecoder`].
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is either handled here or harmless
            picture = Image.open(io.BytesIO(content))
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise SkippedSample("image_too_large")
            if crop_scale:
                picture.draft(None, draft_size(*picture.size, image_size, crop_scale))  # formats other than JPEG ignore it
            ImageOps.exif_transpose(picture, in_place=True)
            return picture if picture.mode == "RGB" else picture.convert("RGB")
    except (Image.DecompressionBombError, MemoryError):
        raise SkippedSample("image_too_large") from None
    except (OSError, ValueError, SyntaxError, EOFError):  # Pillow's decoders raise all of these on damaged files
        raise SkippedSample("image_undecodable") from None


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


def _first_field(row: dict[str, Any], keys: Iterable[str]) -> Any:
    for key in keys:
        field, _, inner = key.partition(".")
        value = row.get(key)
        if value is None and inner and row.get(field) is not None:
            value = _json_field(row[field], inner)
        if value is not None:
            return value
    return None


def _json_field(value: bytes | str | dict[str, Any], key: str) -> Any:
    try:
        content = value if isinstance(value, dict) else json.loads(value)
    except ValueError:
        raise SkippedSample("json_undecodable") from None
    return content.get(key) if isinstance(content, dict) else None


def _decode_text(value: Any) -> str:
    try:
        return (value.decode("utf-8-sig") if isinstance(value, bytes) else str(value)).strip()
    except UnicodeDecodeError:
        raise SkippedSample("caption_not_utf8") from None


def _read_file(path: str | None) -> bytes | None:
    if path is None:
        return None
    with datasets.download.streaming_download_manager.xopen(path, "rb") as file:
        return file.read()


def sample_key(row: dict[str, Any]) -> str:
    """The key of a row; for rows of Hub data sets, which may have none, a checksum of their content."""
    return str(row["__key__"]) if row.get("__key__") else f"{zlib.crc32(repr(row).encode()):08x}"
