"""From a file that a visitor drops in to a picture, by the one function that the whole package decodes with."""

from typing import Any

from PIL import Image

from ..data.pictures import MAX_IMAGE_PIXELS, SkippedSample, decode_image

FORMS = "PNG, JPEG, WebP, GIF, BMP or TIFF"
# What is wrong with a file, by the cause that `decode_image` names.
REASONS = {
    "image_missing": "There is no picture: drop one in, or take an example.",
    "image_too_large": f"The picture is too large: at most {MAX_IMAGE_PIXELS // 1_000_000} million pixels can be read.",
    "image_undecodable": f"This file cannot be read as a picture: it must be a whole {FORMS}. SVG is not among them.",
}


def open_picture(sent: dict[str, Any] | str | None) -> Image.Image:
    """The picture of a file, or of what the page says of a file, in RGB. Raises ValueError with a sentence where none is."""
    try:
        return decode_image(sent)
    except SkippedSample as cause:
        reason = REASONS.get(str(cause), REASONS["image_undecodable"])
        raise ValueError(reason) from None
