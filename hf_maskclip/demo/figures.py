"""Results as HTML, so that a browser sets their text: in its own fonts, for every script, size and colour scheme.

Shapes: M labels, R shares of hidden patches.
"""

import base64
import io
from collections.abc import Sequence
from html import escape

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image, ImageDraw

from ..visualization import Panel
from .scoring import HALF, SHARES

MAX_SHOWN = 10  # labels in the chart, one colour and one marker each
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★", "<": "◀", ">": "▶"}
TEXT_ONLY = "\ufe0e"  # after a sign: no emoji
INK = "#010203"  # drawn with in place of the page's own text colour, which Matplotlib cannot name

# What a panel shows in words, for those who cannot see it, by its title.
ALTERNATIVES = {
    "image": "the picture, its centre cut to a square",
    "edges": "the strength of edges in each patch",
    "edge strength": "the strength of edges in each patch",
    "candidates": "the picture with red frames round the candidate patches",
    "similarity": "each patch's largest similarity to a candidate",
    "after transport (log)": "the same similarities after optimal transport",
}


def message_html(message: str) -> str:
    return f'<p class="hfm-message" role="alert">{escape(message)}</p>'


def panels_html(panels: Sequence[Panel], title: str, caption: str, wide: int, widest: int) -> str:
    """Panels side by side: three on a phone, `wide` on a screen, `widest` on a large one.

    Args:
        title: of all, as text.
        caption: a sentence below, as HTML.
    """
    shown = "".join(_panel_html(panel) for panel in panels)
    return _figure_html(
        title, f'<div class="hfm-panels" style="--wide:{wide};--widest:{widest}">{shown}{_caption_html(caption)}</div>'
    )


def _panel_html(panel: Panel) -> str:
    kept = ""
    if panel.visible is not None:
        kept = f"{int(panel.visible.sum())} of {panel.visible.numel()} patches"
    alternative = ALTERNATIVES.get(panel.title) or f"what is left of the picture by {panel.title}: {kept}"
    image = f'<img src="{_data_address(panel)}" alt="{escape(alternative)}">'
    note = f"<span>{kept}</span>" if kept else ""
    return f'<div class="hfm-panel">{image}<b>{escape(panel.title)}</b>{note}</div>'


def _data_address(panel: Panel) -> str:
    """A panel's picture as an address that holds all of it."""
    picture = Image.fromarray((panel.pixels * 255).round().byte().permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(picture)
    for x, y in panel.boxes:
        pen.rectangle((x, y, x + panel.patch_size - 1, y + panel.patch_size - 1), outline="red", width=2)
    content = io.BytesIO()
    picture.save(content, format="WebP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def leading_labels(scores: torch.Tensor) -> list[int]:
    """The labels of scores (R, M) that are shown: those with the highest score at any share, by that of the whole picture."""
    leading = scores.amax(dim=0).topk(min(MAX_SHOWN, scores.shape[1])).indices  # (10,)
    return leading[scores[0, leading].argsort(descending=True)].tolist()


def scores_html(scores: torch.Tensor, labels: Sequence[str], title: str, caption: str) -> str:
    """A table of the leading labels' scores (R, M), which is the legend of a chart beside it.

    Args:
        title: of both, as text.
        caption: below both, as HTML.
    """
    shown = leading_labels(scores)
    rows = "".join(
        f'<tr style="--colour:{colour}"><td class="hfm-marker" aria-hidden="true">{marker}{TEXT_ONLY}</td>'
        f'<th scope="row" dir="auto" title="{escape(labels[column])}"><span>{escape(labels[column])}</span></th>'
        f"{_bar_html(scores[0, column].item())}{_bar_html(scores[HALF, column].item())}</tr>"
        for column, colour, marker in zip(shown, COLOURS, MARKERS.values(), strict=False)
    )
    if others := len(labels) - len(shown):
        rest = scores[:, [column for column in range(len(labels)) if column not in shown]].sum(dim=1)  # (R,)
        rows += f'<tr class="hfm-others"><td></td><th scope="row">{others} others, added up</th>'
        rows += f"{_bar_html(rest[0].item())}{_bar_html(rest[HALF].item())}</tr>"
    head = '<tr><td></td><th scope="col">label</th><th scope="col">whole picture</th><th scope="col">half hidden</th></tr>'
    table = f'<table class="hfm-table"><thead>{head}</thead><tbody>{rows}</tbody></table>'
    chart = f'<div class="hfm-chart">{_chart_svg(scores, shown, labels)}</div>'
    return _figure_html(title, f'<div class="hfm-scores">{table}{chart}</div>{_caption_html(caption)}')


def _figure_html(title: str, content: str) -> str:
    return f'<figure class="hfm"><h2 class="hfm-title">{escape(title)}</h2>{content}</figure>'


def _caption_html(caption: str) -> str:
    return f'<figcaption class="hfm-caption">{caption}</figcaption>'


def _bar_html(score: float) -> str:
    return f'<td class="hfm-bar" style="--share:{score:.1%}">{score:.0%}</td>'


def draw_scores(scores: torch.Tensor, shown: Sequence[int]) -> Figure:
    """Some columns of the scores (R, M) as curves over `SHARES`; the legend is the page's."""
    figure = Figure(figsize=(4.8, 2.8), layout="constrained")
    figure.patch.set_visible(False)
    axis = figure.subplots()
    axis.patch.set_visible(False)
    for column, colour, marker in zip(shown, COLOURS, MARKERS, strict=False):
        axis.plot(SHARES, scores[:, column].tolist(), color=colour, marker=marker, markersize=4.5, clip_on=False)
    axis.axhline(1 / scores.shape[1], color=INK, linewidth=1, linestyle=":")
    axis.set(xlim=(-0.02, SHARES[-1] + 0.02), ylim=(0, 1))
    axis.set_xlabel("patches hidden", color=INK)
    axis.set_ylabel("score", color=INK)
    axis.tick_params(colors=INK)
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.spines[:].set_color(INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=INK, alpha=0.15)
    return figure


def _chart_svg(scores: torch.Tensor, shown: Sequence[int], labels: Sequence[str]) -> str:
    content = io.StringIO()
    draw_scores(scores, shown).savefig(content, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawing = content.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    best = shown[0]
    whole, half, last = (f"{scores[row, best]:.0%}" for row in (0, HALF, -1))
    name = f"Curves of the scores over the share of hidden patches. {labels[best]}: {whole} of the whole picture, "
    name += f"{half} with half hidden, {last} with {SHARES[-1]:.0%} hidden."
    return drawing.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)
