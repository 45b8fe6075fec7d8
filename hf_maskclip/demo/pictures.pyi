"""From a file that a visitor drops in to a picture, by the one function that the whole package decodes with."""

import gradio as gr
from PIL import Image

from ..data.pictures import MAX_IMAGE_PIXELS, SkippedSample, decode_image

FORMS = "PNG, JPEG, WebP, GIF, BMP or TIFF"
# What is wrong with a file, by the cause that `decode_image` names.
REASONS = {
    "image_missing": "There is no picture: drop one in, or take an example.",
    "image_too_large": f"The picture is too large: at most {MAX_IMAGE_PIXELS // 1_000_000} million pixels can be read.",
    "image_undecodable": f"This file cannot be read as a picture: it must be a whole {FORMS}. SVG is not among them.",
}

class PictureInput(gr.Image):
    """Gradio's picture, which hands on the path of the file as it was sent.

    Gradio itself would decode it, and lose what lies in deep channels, below transparency, and the cause of a failure.
    """

    is_template = True  # so that the page shows it as what it inherits from

    def preprocess(self, payload) -> str | None:
        return payload.path if payload else None
    from collections.abc import Callable, Sequence
    from typing import TYPE_CHECKING, Any, Literal

    from gradio.blocks import Block

    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

def open_picture(path: str | None) -> Image.Image:
    """The picture of a file in RGB. Raises ValueError with a sentence where there is none."""
    try:
        return decode_image(path)
    except SkippedSample as cause:
        reason = REASONS.get(str(cause), REASONS["image_undecodable"])
        raise ValueError(reason) from None
