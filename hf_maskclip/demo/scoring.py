"""Zero-shot scores of a picture as a mask hides more and more of its patches.

Shapes: L patches, E projection size, M labels, R shares of hidden patches, N draws of a mask.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin

from ..dual_encoders import check_can_be_shown, load_dual_encoder, load_processor
from ..models.patch_mask_registry import build_patch_mask, find_patch_mask, set_mask_ratios
from ..models.patch_masking import PatchSelection, keep_first_of_each
from ..models.patch_masking_attentive import class_attention
from ..texts import context_length, encode_texts
from ..visualization import Panel, mask_panels
from .masking import attention_teacher

TEMPLATE = "a photo of {}"
SHARES = tuple(tenths / 10 for tenths in range(10))  # of hidden patches, at which labels are scored; 0 is the whole picture
HALF = SHARES.index(0.5)
SHOWN_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
MAX_DRAWS = 8  # of a mask at each share, over which scores are averaged
# Multiplications of all draws of a whole picture: a ViT-B/16 gets two, so that two cores answer in a few seconds.
BUDGET = 35e9
_tokenizer_is_used = threading.Lock()  # a fast tokenizer keeps its padding and truncation as state


def load_model(model_dir: str | Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The CLIP of a folder or a Hub id, or a model of its kin, in evaluation mode.

    Raises:
        ConfigError: a model of another family.
    """
    check_can_be_shown(str(model_dir))
    return load_dual_encoder(str(model_dir)).eval(), load_processor(str(model_dir))


def num_draws(model: PreTrainedModel) -> int:
    """How many draws of a mask are averaged: fewer for a larger vision tower, at most `MAX_DRAWS`."""
    vision = model.config.vision_config
    num_tokens = 1 + (vision.image_size // vision.patch_size) ** 2
    cost = num_tokens * sum(weight.numel() for weight in model.vision_model.parameters())
    return max(1, min(MAX_DRAWS, round(BUDGET / cost)))


def num_cut(model: PreTrainedModel, processor: ProcessorMixin, labels: Sequence[str], template: str) -> int:
    """How many of the labels' prompts are longer than the model reads."""
    prompts = [template.replace("{}", label) for label in labels]
    with _tokenizer_is_used:
        tokens = processor.tokenizer(prompts, verbose=False)["input_ids"]
    return sum(len(ids) > context_length(model.config, processor.tokenizer) for ids in tokens)


@torch.no_grad()
def score_labels(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    labels: Sequence[str],
    template: str,
    mask: str,
    shares: Sequence[float] = SHARES,
    report: Callable[[float], object] = lambda done: None,
) -> torch.Tensor:
    """Zero-shot scores (R, M) of a picture, with each share of its patches hidden: means over `num_draws` draws of the mask.

    Args:
        model: in evaluation mode.
        labels: M of them.
        template: of the prompts, with `{}` for the label.
        mask: the name of the patch mask that hides them.
        shares: R mask ratios in [0, 1); at 0 the whole picture is scored, whatever the mask.
        report: called with the share of the work that is done, in (0, 1].
    """
    if "{}" not in template:
        raise ValueError(f"Template: {template!r} must have {{}} where the label goes.")
    prompts = [template.replace("{}", label) for label in labels]
    with _tokenizer_is_used:
        texts = encode_texts(model.config, processor.tokenizer, prompts)
    pixel_values = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]  # (1, 3, H, W)
    text_embeds = F.normalize(model.get_text_features(**texts).pooler_output, dim=-1)  # (M, E)
    needs_scores = find_patch_mask(mask).needs_patch_scores
    attention = class_attention(attention_teacher(model.vision_model), pixel_values) if needs_scores else None  # (1, L)
    draws = num_draws(model)

    scores = []
    for done, share in enumerate(shares, start=1):
        pictures = pixel_values
        selection = None
        if share:
            selection = draw_selections(model, pixel_values, set_mask_ratios(mask, share), attention, draws)
            pictures = pixel_values.expand(draws, -1, -1, -1)
        image_embeds = F.normalize(
            model.get_image_features(pictures, patch_selection=selection).pooler_output, dim=-1
        )  # (N, E)
        logits = model.logit_scale.exp() * image_embeds @ text_embeds.T  # (N, M)
        scores.append(logits.softmax(dim=1).mean(dim=0))
        report(done / len(shares))
    return torch.stack(scores)


def draw_selections(
    model: PreTrainedModel, pixel_values: torch.Tensor, mask: dict, attention: torch.Tensor | None, draws: int
) -> PatchSelection:
    """Several draws of a mask of one picture (1, C, H, W), as the selection of a batch of them.

    Each is drawn alone: among several pictures, cluster lets one hide more than the ratio and another less.
    """
    patch_mask = build_patch_mask(mask, patch_size=model.config.vision_config.patch_size)
    options = {"generator": torch.Generator().manual_seed(0), "patch_mask": patch_mask, "patch_scores": attention}
    num_patches = pixel_values[0, 0].numel() // patch_mask.patch_size**2
    drawn = [model.vision_model.select_patches(pixel_values, **options) for _ in range(draws)]
    visible = torch.cat([selection.visible(num_patches) for selection in drawn])  # (N, L)
    order = visible.int().argsort(dim=1, descending=True, stable=True)  # visible patches first
    num_kept = visible.sum(dim=1)
    if (num_kept == num_kept[0]).all():
        return PatchSelection(order[:, : num_kept[0]])
    return keep_first_of_each(order, num_kept, int(num_kept.max()))


def show_hidden(model: PreTrainedModel, image: Image.Image, mask: str) -> list[Panel]:
    """What the model sees of a picture, whole and at some of the shares: the first of the draws that are scored."""
    masks = {f"{share:.0%} hidden": set_mask_ratios(mask, share) for share in SHOWN_SHARES}
    vision = model.config.vision_config
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    (panels,) = mask_panels([image], masks, **sizes, teacher=attention_teacher(model.vision_model))
    return [panel for panel in panels if panel.title != "edges"]
