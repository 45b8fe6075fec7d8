"""The page of `hf-maskclip demo`: what the masks leave of a picture, and what that does to a CLIP's zero-shot scores.

`masking.py` and `scoring.py` compute, `figures.py` writes the results as HTML, `page.py` puts them on the page.
"""

try:
    import gradio  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError('hf-maskclip demo: needs Gradio: pip install "hf_maskclip[demo]"') from error

from .page import build_demo

__all__ = ["build_demo"]
