"""From an undecoded row to a picture and its captions, or to the cause why it gives none."""

import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .pictures import SkippedSample, decode_image
from .specs import IMAGE_SUFFIXES

# The fields that are read where none is named, in this order; upper case is the same.
IMAGE_KEYS = (
    *("image", *(suffix[1:] for suffix in IMAGE_SUFFIXES), "img", "picture", "photo", "images"),
    *("filepath", "file_path", "image_path", "file_name", "filename", "image_name", "path"),
)
CAPTION_KEYS = (
    *("txt", "text", "caption", "json.caption", "captions", "json.captions", "texts", "sentence", "sentences", "title"),
    *("description", "comment", "alt_text"),
)
NUMBERED_CAPTION = re.compile(r"(caption|text|sentence)s?_?\d+", re.IGNORECASE)


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
        return decode_image(value, self.image_size, self.crop_scale, str(row.get("__url__", "")).rpartition("/")[0])

    def captions(self, row: dict[str, Any], rng: np.random.Generator) -> list[str]:
        value = _first_field(row, self.caption_key.split(",") if self.caption_key else CAPTION_KEYS)
        if value is None and not self.caption_key:
            value = [row[key] for key in sorted(row, key=_by_number) if NUMBERED_CAPTION.fullmatch(key)]
        return captions_of(value)


def captions_of(value: Any) -> list[str]:
    """The captions in the value of a field: a text, or a list of texts. What is no text is left out.

    Raises:
        SkippedSample: `caption_missing` where there is no text, `caption_empty` where all are blank, `caption_not_utf8`.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = [text for text in values if isinstance(text, (str, bytes))]
    if not texts:
        raise SkippedSample("caption_missing")
    captions = [caption for caption in map(_decode_text, texts) if caption]
    if not captions:
        raise SkippedSample("caption_empty")
    return captions


def _decode_text(text: str | bytes) -> str:
    """The text on one line, as CLIP's tokenizers read it."""
    try:
        return " ".join((text if isinstance(text, bytes) else text.encode()).decode("utf-8-sig").split())
    except UnicodeError:  # a text from a table holds the bytes that are no UTF-8 as lone surrogates
        raise SkippedSample("caption_not_utf8") from None


def _by_number(key: str) -> tuple[int, str]:
    digits = re.sub(r"\D", "", key)
    return int(digits or 0), key


def _first_field(row: dict[str, Any], keys: Iterable[str]) -> Any:
    """The value of the first of `keys` that a row has. `a.b` is b in the JSON or the structs of a."""
    names = {name.lower(): name for name in reversed(row)}
    for key in keys:
        field, _, inner = key.partition(".")
        value = row.get(key, row.get(names.get(key.lower(), key)))
        outer = row.get(field, row.get(names.get(field.lower(), field)))
        if value is None and inner and outer is not None:
            value = _json_field(outer, inner)
        if value is not None:
            return value
    return None


def _json_field(value: Any, key: str) -> Any:
    try:
        content = json.loads(value) if isinstance(value, (str, bytes)) else value
    except ValueError:
        raise SkippedSample("json_undecodable") from None
    if isinstance(content, (list, tuple)):
        return [part.get(key) for part in content if isinstance(part, dict)]
    return content.get(key) if isinstance(content, dict) else None


def sample_key(row: dict[str, Any]) -> str:
    """The key of a row; for rows of Hub data sets, which may have none, a checksum of their content."""
    return str(row["__key__"]) if row.get("__key__") else f"{zlib.crc32(repr(row).encode()):08x}"
