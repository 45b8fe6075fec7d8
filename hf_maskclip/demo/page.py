"""The page: two tabs of inputs and results, and what happens when an input changes."""

import logging
import os
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path

import gradio as gr
from transformers import PreTrainedModel, ProcessorMixin

from .. import __version__
from ..models.patch_mask_registry import patch_masks
from .examples import Outcome, example_path, in_words, try_examples
from .figures import message_html, panels_html, scores_html
from .labels import parse_labels
from .masking import SETTINGS, default_settings, mask_names, show_masks
from .pictures import FORMS, REASONS, open_picture
from .scoring import TEMPLATE, load_model, num_cut, num_draws, score_labels, show_hidden

logger = logging.getLogger(__name__)

PROGRESS = gr.Progress()  # as a default it asks Gradio for the one of each call

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
CRASHED = "Something went wrong on the server. Its log has the cause."
MASKS_CAPTION = (
    "Grey patches are hidden from the model. All masks but PGS hide the share that the slider names, in whole patches; "
    "PGS chooses its own between two bounds. Edges: black is none, light yellow is most. {papers}"
)
STAGES_CAPTION = (
    "PGS keeps patches with strong edges. A few candidates (red) are drawn from the others. What resembles a candidate is "
    "hidden first: light yellow is alike, black is not. Optimal transport evens the similarities out; they are shown on a "
    "log scale."
)
SCORES_CAPTION = (
    "Scores add up to 100 % over these labels: they say which label fits best, not that it is right. The dotted line is "
    "chance. Hidden patches: the mean of {draws} of the mask. {cut}"
)
HIDDEN_CAPTION = (
    "One draw of the mask at each share. A share is rounded to whole patches. Zero-shot CLIP compares what is left with "
    "each label in the template."
)


def build_demo(model_dir: str | Path) -> gr.Blocks:
    """The page, ready to `launch`. It asks nothing of the network beyond a Hub id's model.

    The results of the first example are made here, so that a visitor sees them at once.

    Args:
        model_dir: folder or Hub id of a CLIP.
    """
    model, processor = load_model(model_dir)
    vision_model = model.vision_model
    own_mask = "pgs" if vision_model.patch_mask.keeps_all else vision_model.config.patch_mask["name"]
    outcomes = try_examples(model, processor, own_mask)
    with gr.Blocks(title="hf_maskclip", analytics_enabled=False, fill_width=True) as demo:
        gr.HTML(f"<style>{STYLE}</style>", elem_classes="hfm-style")
        gr.Markdown(_introduction(model_dir))
        with gr.Tab("Masks"):
            _masks_tab(with_message(partial(masks_results, model)), outcomes)
        with gr.Tab("Zero-shot"):
            _zero_shot_tab(with_message(partial(score_results, model, processor)), outcomes, own_mask)
    return demo


def _introduction(model_dir: str | Path) -> str:
    """What the page is of, and where the package and the model are. The Hub names a Space in its environment."""
    package, model = f"hf_maskclip {__version__}", f"`{model_dir}`"
    if space := os.environ.get("SPACE_ID"):
        package = f"[{package}](https://huggingface.co/spaces/{space}/tree/main/hf_maskclip)"
    if not Path(model_dir).exists():
        model = f"[{model}](https://huggingface.co/{model_dir})"
    return (
        "# hf_maskclip\nCLIP can be trained on a well-chosen part of each picture's patches, at less cost. *Masks* shows which "
        f"stay, *Zero-shot* what that does to a model's answers. Package: {package}. Model: {model}."
    )


def masks_results(model: PreTrainedModel, picture: dict | str | None, *settings: float) -> tuple[str, str]:
    """The results of the first tab as HTML; settings as in [`show_masks`]."""
    every, stages = show_masks(model, open_picture(picture), *settings)
    caption = MASKS_CAPTION.format(papers=_papers())
    masks = panels_html(every, "What each mask leaves visible", caption, wide=5, widest=5)
    return masks, panels_html(stages, "PGS, stage by stage", STAGES_CAPTION, wide=4, widest=7)


def _papers() -> str:
    """Links to the papers of the masks."""
    papers: dict[str, list[str]] = {}
    for name, mask in patch_masks().items():
        if mask.citation and not mask.keeps_all:
            papers.setdefault(mask.citation.url, []).append(name)
    links = (f'<a href="{url}" target="_blank">{" and ".join(names)}</a>' for url, names in papers.items())
    return f"Papers: {', '.join(links)}."


def score_results(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    picture: dict | str | None,
    labels: str,
    template: str,
    mask: str,
    progress: Callable = lambda done, desc: None,
) -> tuple[str, str]:
    """The results of the second tab as HTML."""
    image, names = open_picture(picture), parse_labels(labels)
    report = partial(progress, desc="hiding patches")
    scores = score_labels(model, processor, image, names, template, mask, report=report)  # (R, M)
    draws = f"{num_draws(model)} draws" if num_draws(model) > 1 else "one draw"
    too_long = num_cut(model, processor, names, template)
    cut = f"Too long, so that the model reads their beginning alone: {too_long} of the labels." if too_long else ""
    caption = SCORES_CAPTION.format(draws=draws, cut=cut)
    title = f"Scores of {len(names)} labels as {mask} hides patches"
    panels = panels_html(show_hidden(model, image, mask), "What the model sees", HIDDEN_CAPTION, wide=6, widest=6)
    return scores_html(scores, names, title, caption), panels


def _masks_tab(results: Callable, outcomes: list[Outcome]) -> None:
    defaults = default_settings()
    first, second = results(example_path(outcomes[0].example), *defaults)
    with gr.Row(elem_classes="hfm-tab"):
        with gr.Column(elem_classes="hfm-inputs"):
            image, buttons = _picture_input(outcomes)
            sliders = [
                gr.Slider(0, setting.most, default, step=setting.step, label=setting.label, info=setting.info)
                for setting, default in zip(SETTINGS, defaults, strict=True)
            ]
        masks = gr.HTML(first, elem_id="masks", elem_classes="hfm-first", apply_default_css=False)
        stages = gr.HTML(second, elem_id="stages", elem_classes="hfm-second", apply_default_css=False)
    inputs, outputs = [image, *sliders], [masks, stages]
    _update([image.upload, *(slider.change for slider in sliders)], results, inputs, outputs, "masks")
    _clear(image, outputs)
    for button, outcome in zip(buttons, outcomes, strict=True):
        _fill_in(button, [example_path(outcome.example)], results, inputs, outputs, "masks")


def _zero_shot_tab(results: Callable, outcomes: list[Outcome], own_mask: str) -> None:
    best = outcomes[0].example
    first, second = results(example_path(best), best.labels, TEMPLATE, own_mask)
    with gr.Row(elem_classes="hfm-tab"):
        with gr.Column(elem_classes="hfm-inputs"):
            image, buttons = _picture_input(outcomes)
            gr.Markdown(in_words(outcomes), elem_id="model_in_words")
            info = 'one a line, or separated by commas; "quotes" keep a comma inside a label'
            labels = gr.Textbox(best.labels, label="Labels", info=info, elem_id="labels", lines=3, max_lines=8)
            template = gr.Textbox(TEMPLATE, label="Template", info="{} stands for the label", elem_id="template")
            score = gr.Button("Score these labels", variant="primary", elem_id="score")
            mask = gr.Dropdown(mask_names(), value=own_mask, label="Mask that hides patches")
        scores = gr.HTML(first, elem_id="scores", elem_classes="hfm-first", apply_default_css=False)
        hidden = gr.HTML(second, elem_id="hidden", elem_classes="hfm-second", apply_default_css=False)

    def shown(picture, labels, template, mask, progress=PROGRESS):
        return results(picture, labels, template, mask, progress)

    inputs, outputs = [image, labels, template, mask], [scores, hidden]
    triggers = [image.upload, mask.change, score.click, labels.submit, template.submit]
    _update(triggers, shown, inputs, outputs, "zero-shot")
    _clear(image, outputs)
    for button, outcome in zip(buttons, outcomes, strict=True):
        filled = [example_path(outcome.example), outcome.example.labels]
        _fill_in(button, filled, shown, inputs, outputs, "zero-shot")


def _picture_input(outcomes: list[Outcome]) -> tuple[gr.Image, list[gr.Button]]:
    """The picture of a tab, and below it a button for each example."""
    paths = [example_path(outcome.example) for outcome in outcomes]
    label = f"Picture ({FORMS})"
    image = gr.Image(paths[0], label=label, height=230, sources=["upload", "clipboard"], buttons=[])
    with gr.Row(elem_classes="hfm-examples"):
        names = [outcome.example.name for outcome in outcomes]
        return image, [gr.Button(name, icon=path, size="sm") for name, path in zip(names, paths, strict=True)]


def _update(triggers: list, results: Callable, inputs: list, outputs: list, tab: str) -> None:
    """Make results anew where something triggers it. The tabs wait in queues of their own, two visitors at a time each."""
    # Without preprocessing: Gradio would decode pictures, and lose deep channels, transparency and the causes of failures.
    options = {"preprocess": False, "trigger_mode": "always_last", "concurrency_id": tab, "concurrency_limit": 2}
    gr.on(triggers, results, inputs, outputs, **options, show_progress="minimal", show_progress_on=outputs[-2:])


def _fill_in(button: gr.Button, filled: list, results: Callable, inputs: list, outputs: list, tab: str) -> None:
    """Let a button fill in the first inputs, and make the results of them and of the others as they are."""

    @wraps(results)
    def chosen(*values):
        return *filled, *results(*filled, *values[len(filled) :])

    _update([button.click], chosen, inputs, [*inputs[: len(filled)], *outputs], tab)


def _clear(image: gr.Image, outputs: list) -> None:
    """Take the results away with their picture. Of other events that come then, the picture is still the old one."""

    def cleared(sent):
        return (message_html(REASONS["image_missing"]), "") if sent is None else (gr.skip(), gr.skip())

    image.change(cleared, image, outputs, preprocess=False, show_progress="hidden", concurrency_limit=None)


def with_message(results: Callable) -> Callable:
    """Put a sentence in the place of two results that cannot be had, so that no old ones look like an answer."""

    @wraps(results)
    def shown(*values):
        try:
            return results(*values)
        except ValueError as error:
            message = str(error)
        except Exception:
            logger.exception("the demo cannot show its results")
            message = CRASHED
        return message_html(message), ""

    return shown
