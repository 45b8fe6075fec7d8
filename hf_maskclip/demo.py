"""The page of `hf-maskclip demo`: what the masks leave of a picture, and what that does to a CLIP's zero-shot scores.

The functions that draw and score come first and know nothing of the page; `build_demo` puts them on it. The example pictures
are scenes of the embedded data set, so that the page needs neither a run's folder nor the network.

Shapes: L patches, E projection size, M labels, R shares of hidden patches.
"""

import io
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPProcessor

from .data.scene_drawing import draw_scene
from .data.scenes import sample_scene
from .models.modeling_maskclip import MaskCLIPModel
from .models.patch_mask_registry import build_patch_mask, patch_masks, resolve_patch_mask
from .models.patch_masking import PatchMask
from .models.patch_masking_attentive import class_attention
from .visualization import draw_patch_masks, draw_pgs_steps

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ImportError('hf-maskclip demo: needs Gradio: pip install "hf_maskclip[demo]"') from error

# Example pictures, scenes of the test split by their numbers, and the labels that they are scored for.
EXAMPLES = {
    "purple star on grass": (21, "a purple star, a red star, a purple car, a green box"),
    "orange flower in leaves": (28, "an orange flower, a blue flower, an orange cup, a black heart"),
    "yellow trees at night": (22, "three yellow trees, three green trees, one yellow fish, a white moon"),
    "red arrow at sea": (1, "a red arrow, a yellow arrow, a red cup, a pink key"),
}
EXAMPLE_SIZE = 160  # in pixels
TEMPLATE = "a photo of {}"
SHARES = tuple(tenths / 10 for tenths in range(10))  # of hidden patches, at which labels are scored; 0 is the whole picture
HALF = SHARES.index(0.5)
SHOWN_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
NUM_DRAWS = 8  # of a mask at each share, over which scores are averaged
MIN_PATCHES_PER_SIDE = 14  # those of ViT-B/16 at 224 pixels: on fewer, one mask looks like another
DPI = 150  # of figures on the page: sharp on dense screens too


def load_model(model_dir: str | Path) -> tuple[MaskCLIPModel, CLIPProcessor]:
    """The CLIP of a folder or a Hub id, in evaluation mode, with the attention that the attentive mask can look at."""
    model = MaskCLIPModel.from_pretrained(model_dir).eval()
    model.vision_model.set_attn_implementation("eager")
    return model, CLIPProcessor.from_pretrained(model_dir)


def mask_at_ratio(name: str, mask_ratio: float) -> dict:
    """The dict of a patch mask that removes this fraction: each option that ends in `mask_ratio` is set to it."""
    options = resolve_patch_mask(name)
    return options | {key: mask_ratio for key in options if key.endswith("mask_ratio")}


def draw_masks(
    model: MaskCLIPModel,
    image: Image.Image | None,
    mask_ratio: float,
    min_mask_ratio: float,
    max_mask_ratio: float,
    similarity_threshold: float,
    seed: int,
) -> tuple[Figure, Figure]:
    """What every mask leaves visible of a picture, and the stages of PGS.

    Patches have the model's size. There are at least 14 of them a side, so that a tiny model's masks can be told apart too.

    Args:
        model: whose attention the attentive mask goes by.
        image: of any size.
        mask_ratio: of all masks but PGS.
        min_mask_ratio, max_mask_ratio, similarity_threshold: of PGS.
        seed: of the masks' randomness.
    """
    _check_picture(image)
    pgs = {"min_mask_ratio": min_mask_ratio, "max_mask_ratio": max_mask_ratio, "similarity_threshold": similarity_threshold}
    masks = {name: mask_at_ratio(name, mask_ratio) for name in _mask_names()} | {"pgs": {"name": "pgs"} | pgs}
    vision = model.config.vision_config
    image_size = max(vision.image_size, MIN_PATCHES_PER_SIDE * vision.patch_size)
    sizes = {"image_size": image_size, "patch_size": vision.patch_size, "seed": int(seed)}
    every = draw_patch_masks([image], masks, **sizes, teacher=model.vision_model, panels_per_row=5)
    stages = draw_pgs_steps([image], masks["pgs"], **sizes, panels_per_row=4)
    return every, stages


def parse_labels(text: str) -> list[str]:
    """Labels that are separated by commas, each once."""
    labels = list(dict.fromkeys(label.strip() for label in text.split(",") if label.strip()))
    if len(labels) < 2:
        raise ValueError(f"labels {text!r}: must be at least two, separated by commas")
    return labels


@torch.no_grad()
def score_labels(
    model: MaskCLIPModel,
    processor: CLIPProcessor,
    image: Image.Image | None,
    labels: Sequence[str],
    template: str,
    mask: str,
    shares: Sequence[float] = SHARES,
) -> torch.Tensor:
    """Zero-shot scores (R, M) of a picture, with each share of its patches hidden: the mean over `NUM_DRAWS` draws of the mask.

    Args:
        model: in evaluation mode.
        labels: M of them.
        template: of the prompts, with `{}` for the label.
        mask: the name of the patch mask that hides them.
        shares: R mask ratios in [0, 1); at 0 the whole picture is scored, whatever the mask.
    """
    _check_picture(image)
    if "{}" not in template:
        raise ValueError(f"template {template!r}: must have {{}} for the label")
    prompts = [template.replace("{}", label) for label in labels]
    inputs = processor(text=prompts, images=image.convert("RGB"), padding=True, truncation=True, return_tensors="pt")
    pixel_values = inputs.pop("pixel_values")  # (1, 3, H, W)
    text_embeds = F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)  # (M, E)
    vision_model = model.vision_model
    attention = class_attention(vision_model, pixel_values) if patch_masks()[mask].needs_patch_scores else None  # (1, L)

    def score(patch_mask: PatchMask | None, generator: torch.Generator | None = None) -> torch.Tensor:  # (M,)
        options = {"generator": generator, "patch_mask": patch_mask, "patch_scores": attention}
        selection = vision_model.select_patches(pixel_values, **options) if patch_mask else None
        image_embeds = model.get_image_features(pixel_values, patch_selection=selection).pooler_output  # (1, E)
        logits = model.logit_scale.exp() * F.normalize(image_embeds, dim=-1) @ text_embeds.T
        return logits.softmax(dim=1)[0]

    def mean_score(share: float) -> torch.Tensor:  # (M,)
        if share == 0:
            return score(None)
        patch_mask = build_patch_mask(mask_at_ratio(mask, share), patch_size=model.config.vision_config.patch_size)
        generator = torch.Generator().manual_seed(0)
        # One picture at a time: among several, cluster lets one hide more than the ratio and another less.
        return torch.stack([score(patch_mask, generator) for _ in range(NUM_DRAWS)]).mean(dim=0)

    return torch.stack([mean_score(share) for share in shares])


def draw_scores(scores: torch.Tensor, labels: Sequence[str]) -> Figure:
    """The scores (R, M) of M labels as curves over `SHARES`."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axis = figure.subplots()
    for label, curve in zip(labels, scores.T.tolist(), strict=True):
        axis.plot(SHARES, curve, marker="o", markersize=3.5, label=label)
    axis.axhline(1 / len(labels), color="grey", linewidth=0.8, linestyle=":", label="chance")
    axis.set(xlabel="patches hidden", ylabel="score", xlim=(-0.02, SHARES[-1] + 0.02), ylim=(0, 1))
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def draw_hidden(model: MaskCLIPModel, image: Image.Image, mask: str) -> Figure:
    """What the model sees of a picture at some of the shares, one draw of the mask each."""
    masks = {f"{share:.0%} hidden": mask_at_ratio(mask, share) for share in SHOWN_SHARES}
    vision = model.config.vision_config
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    return draw_patch_masks([image], masks, **sizes, teacher=model.vision_model)


def build_demo(model_dir: str | Path) -> gr.Blocks:
    """The page, ready to `launch`. It asks nothing of the network beyond a Hub id's model.

    Args:
        model_dir: folder or Hub id of a CLIP.
    """
    model, processor = load_model(model_dir)

    def show_masks(*settings) -> tuple[Image.Image, Image.Image]:
        every, stages = draw_masks(model, *settings)
        return _as_picture(every), _as_picture(stages)

    def show_scores(image, labels, template, mask) -> tuple[dict, dict, Image.Image, Image.Image]:
        names = parse_labels(labels)
        scores = score_labels(model, processor, image, names, template, mask)  # (R, M)
        whole, half = (dict(zip(names, scores[row].tolist(), strict=True)) for row in (0, HALF))
        return whole, half, _as_picture(draw_scores(scores, names)), _as_picture(draw_hidden(model, image, mask))

    with gr.Blocks(title="hf_maskclip", analytics_enabled=False, fill_width=True) as demo:
        gr.Markdown(f"# hf_maskclip\nCLIP on a well-chosen part of each picture's patches. The model: `{model_dir}`.")
        with gr.Tab("Masks"):
            _add_tab(demo, show_masks, *_masks_tab())
        with gr.Tab("Zero-shot"):
            vision_model = model.vision_model
            hides_none = vision_model.patch_mask.keeps_all
            own_mask = "pgs" if hides_none else vision_model.config.patch_mask["name"]
            _add_tab(demo, show_scores, *_zero_shot_tab(own_mask))
    return demo


def _masks_tab() -> tuple[list, list]:
    """The inputs and the outputs of the first tab."""
    defaults = resolve_patch_mask("pgs")
    with gr.Row():
        with gr.Column(scale=1, min_width=370):
            image = _picture_input()
            gr.Examples([[path] for path in _example_paths()], image)
            ratio = gr.Slider(0, 0.95, 0.5, step=0.05, label="Mask ratio", info="the share that all masks but PGS remove")
            least = gr.Slider(0, 0.95, defaults["min_mask_ratio"], step=0.05, label="PGS: least mask ratio")
            most = gr.Slider(0, 0.95, defaults["max_mask_ratio"], step=0.05, label="PGS: largest mask ratio")
            cosine = defaults["similarity_threshold"]
            threshold = gr.Slider(0, 1, cosine, step=0.05, label="PGS: similarity threshold", info="a cosine; above it, alike")
            seed = gr.Slider(0, 99, 0, step=1, label="Seed")
        with gr.Column(scale=3, min_width=600):
            every = _picture("What each mask leaves visible", "masks")
            stages = _picture("PGS, stage by stage", "stages")
    return [image, ratio, least, most, threshold, seed], [every, stages]


def _zero_shot_tab(own_mask: str) -> tuple[list, list]:
    """The inputs and the outputs of the second tab."""
    examples = [[path, labels] for path, (_, labels) in zip(_example_paths(), EXAMPLES.values(), strict=True)]
    with gr.Row():
        with gr.Column(scale=1, min_width=370):
            image = _picture_input()
            labels = gr.Textbox(examples[0][1], label="Labels", info="separated by commas", elem_id="labels", submit_btn=True)
            template = gr.Textbox(TEMPLATE, label="Template", info="{} stands for the label", submit_btn=True)
            mask = gr.Dropdown(_mask_names(), value=own_mask, label="Mask that hides patches")
            gr.Examples(examples, [image, labels], example_labels=list(EXAMPLES))
        with gr.Column(scale=3, min_width=600):
            with gr.Row():
                whole = gr.Label(label="The whole picture", elem_id="whole", show_heading=False)
                half = gr.Label(label="Half of its patches hidden", elem_id="half", show_heading=False)
            curves = _picture(f"Scores as patches go, means of {NUM_DRAWS} draws of the mask", "curves")
            hidden = _picture("What the model sees", "hidden")
    return [image, labels, template, mask], [whole, half, curves, hidden]


def _add_tab(demo: gr.Blocks, show: Callable, inputs: list, outputs: list) -> None:
    """Call `show` when the page opens, and whenever an input is changed; texts when they are submitted."""
    triggers = [item.submit if isinstance(item, gr.Textbox) else item.change for item in inputs]
    # One call at a time over both tabs: class_attention looks into the one model as it runs.
    options = {"show_progress": "minimal", "concurrency_id": "model", "concurrency_limit": 1, "trigger_mode": "always_last"}
    gr.on([demo.load, *triggers], _as_messages(show), inputs, outputs, **options)


def _as_messages(show: Callable) -> Callable:
    """Let what a user did wrong be a message on the page, not a traceback."""

    @wraps(show)
    def shown(*values):
        try:
            return show(*values)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return shown


def _picture_input() -> gr.Image:
    return gr.Image(_example_paths()[0], type="pil", label="Picture", height=260, sources=["upload", "clipboard"], buttons=[])


def _picture(label: str, name: str) -> gr.Image:
    """A picture that the page shows, below its label: one upon it would hide a figure's titles, and so would buttons."""
    gr.Markdown(f"**{label}**")
    return gr.Image(show_label=False, elem_id=name, format="png", interactive=False, buttons=[])


def _check_picture(image: Image.Image | None) -> None:
    if image is None:
        raise ValueError("no picture: drop one in, or take an example")


def _mask_names() -> list[str]:
    return [name for name, mask in patch_masks().items() if not mask.keeps_all]


def draw_example(name: str) -> Image.Image:
    """The picture of an example, one of `EXAMPLES`."""
    return draw_scene(sample_scene(EXAMPLES[name][0], split="test"), EXAMPLE_SIZE)[0]


@cache
def _example_paths() -> list[str]:
    """The example pictures as files, which the page wants: in a temporary folder of this process."""
    folder = Path(tempfile.mkdtemp(prefix="hf_maskclip_demo_"))
    paths = [folder / f"{name.replace(' ', '_')}.png" for name in EXAMPLES]
    for path, name in zip(paths, EXAMPLES, strict=True):
        draw_example(name).save(path)
    return [str(path) for path in paths]


def _as_picture(figure: Figure) -> Image.Image:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return Image.open(content)
