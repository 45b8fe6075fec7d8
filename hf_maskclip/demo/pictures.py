"""From a file that a visitor drops in to a picture, by the one function that the whole package decodes with."""

from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder
from PIL import Image

from ..data.pictures import MAX_IMAGE_PIXELS, SkippedSample, decode_image

FORMS = "PNG, JPEG, WebP, GIF, BMP or TIFF"
# What is wrong with a file, by the cause that `decode_image` names.
REASONS = {
    "image_missing": "There is no picture: drop one in, or take an example.",
    "image_too_large": f"The picture is too large: at most {MAX_IMAGE_PIXELS // 1_000_000} million pixels can be read.",
    "image_undecodable": f"This file cannot be read as a picture: it must be a whole {FORMS}. SVG is not among them.",
}


def open_picture(picture: dict[str, Any] | str | None) -> Image.Image:
    """A picture in RGB. Raises ValueError with a sentence where there is none.

    Args:
        picture: what the page says of a file that a visitor has sent, or the path of an example.
    """
    if isinstance(picture, dict):
        picture = _sent_file(picture)
    try:
        return decode_image(picture)
    except SkippedSample as cause:
        reason = REASONS.get(str(cause), REASONS["image_undecodable"])
        raise ValueError(reason) from None


def _sent_file(sent: dict[str, Any]) -> str | None:
    """The path of a file in Gradio's folder of what was sent; visitors may see no other file of the server."""
    if not sent["path"]:
        return None
    path = Path(sent["path"]).resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()):
        raise ValueError("This file was not sent to this page.")
    return str(path)
