"""Proves that the demo shows what the masks and the model do: sliders move what they name, scores are those of Transformers'
pipeline and go with hidden patches, every kind of label and file is shown or refused in a sentence, and old results go."""

import re
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, pipeline

from hf_maskclip import export_to_clip
from hf_maskclip.data.scenes import sample_scene
from hf_maskclip.models.patch_mask_registry import patch_masks, register_patch_mask
from hf_maskclip.models.patch_masking import PatchMask, PatchSelection, keep_count

pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'hf_maskclip[demo]'")
from hf_maskclip.demo import examples, masking, scoring  # noqa: E402
from hf_maskclip.demo.labels import parse_labels  # noqa: E402

LABELS = ["a red ball", "two blue fish", "a small house"]
MASKS = [name for name in patch_masks() if name != "none"]


@pytest.fixture
def model(make_model):
    return make_model().eval()


@pytest.fixture
def example() -> Image.Image:
    return examples.draw_example(examples.EXAMPLES[0])


def kept(panels) -> dict[str, float]:
    """The share of patches that each panel of a mask shows, by the panel's title."""
    return {panel.title: panel.visible.float().mean().item() for panel in panels if panel.visible is not None}


# ---- Examples -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", examples.EXAMPLES, ids=lambda example: example.name)
def test_each_example_shows_what_its_first_label_says_and_nothing_of_the_others(example):
    shown = {(item.colour, item.shape) for item in sample_scene(example.number, split="test").objects}
    first, *others = parse_labels(example.labels)

    def is_said(label: str) -> bool:
        return any(colour in label and (shape in label or "object" in label) for colour, shape in shown)

    assert is_said(first)
    assert len(others) == 3
    assert not any(is_said(label) for label in others)
    assert examples.draw_example(example).size == (160, 160)


@pytest.mark.parametrize("best", range(len(examples.EXAMPLES)))
def test_the_page_opens_on_the_example_that_its_model_is_right_about(best, monkeypatch, model, processor):
    """Where the model is right about several, on that whose score falls most once hardly a patch is left."""

    def score_labels(model, processor, image, labels, template, mask, shares):
        is_best, is_right = image == chosen, labels[0] != wrong
        last = 0.3 if is_best else 0.8
        return torch.tensor([[score, 1 - score, 0, 0] for score in ((0.9, 0.9, last) if is_right else (0.4, 0.9, 0.1))])

    chosen = examples.draw_example(examples.EXAMPLES[best])
    wrong = parse_labels(examples.EXAMPLES[best - 1].labels)[0]
    monkeypatch.setattr(examples, "score_labels", score_labels)
    outcomes = examples.try_examples(model, processor, "pgs")
    assert outcomes[0].example == examples.EXAMPLES[best]
    assert outcomes[-1].example == examples.EXAMPLES[best - 1]
    assert "Of the 4 examples, this model puts the right label first in 3 with the whole picture, and in 4" in (
        examples.in_words(outcomes)
    )


# ---- Masks ----------------------------------------------------------------------------------------------------------------


def test_the_mask_ratio_is_of_all_masks_but_pgs(model, example):
    every, stages = zip(*(masking.show_masks(model, example, ratio, 0.3, 0.3, 0.5, 0) for ratio in (0.25, 0.75)), strict=True)
    for panels, share in zip(every, (0.75, 0.25), strict=True):
        assert kept(panels) == pytest.approx(dict.fromkeys(MASKS, share) | {"pgs": keep_count(196, 0.3) / 196})
    assert len({kept(panels)["visible"] for panels in stages}) == 1


def test_pgs_goes_by_its_threshold_between_its_ratios(model, example):
    def share(*settings) -> float:
        every, stages = masking.show_masks(model, example, 0.5, *settings, 0)
        assert kept(every)["pgs"] == kept(stages)["visible"]
        return round(kept(stages)["visible"], 2)

    assert (share(0.2, 0.6, 1), share(0.2, 0.6, 0), share(0.4, 0.4, 0)) == (0.8, 0.4, 0.6)


def test_another_seed_is_another_draw(model, example):
    first, second = (masking.show_masks(model, example, 0.5, 0.3, 0.5, 0.5, seed)[0][2].visible for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0.5, 0.95, 0.5, 0.5, 0), "PGS: least mask ratio is 0.95, above PGS: largest mask ratio, which is 0.5: move one"),
        ((1.5, 0.3, 0.5, 0.5, 0), "Mask ratio: 1.5 is not from 0 to 0.95."),
        ((0.5, 0.3, 0.5, 0.5, None), "Seed: nothing is not from 0 to 99."),
    ],
)
def test_messages_name_sliders_by_their_labels(settings, message, model, example):
    with pytest.raises(ValueError, match=re.escape(message)):
        masking.show_masks(model, example, *settings)


def test_a_teacher_shares_the_weights_and_is_seen_by_nobody_else(model, inputs):
    teacher = masking.attention_teacher(model.vision_model)
    weights = zip(teacher.parameters(), model.vision_model.parameters(), strict=True)
    assert all(one is other for one, other in weights)
    seen = []
    hook = teacher.encoder.layers[0].register_forward_hook(lambda *_: seen.append("teacher"))
    model.vision_model(inputs["pixel_values"])
    assert seen == []
    teacher(inputs["pixel_values"])
    assert seen == ["teacher"]
    hook.remove()
    assert model.vision_model.config._attn_implementation != "eager"


# ---- Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_of_whole_pictures_are_those_of_the_pipeline(model, processor, example, tmp_path):
    export_to_clip(model, tmp_path, processor)
    expected = pipeline("zero-shot-image-classification", model=str(tmp_path))(
        example, candidate_labels=LABELS, hypothesis_template="a photo of {}"
    )
    expected = {score["label"]: score["score"] for score in expected}
    (scores,) = scoring.score_labels(model, processor, example, LABELS, "a photo of {}", "pgs", [0])
    assert scores.tolist() == pytest.approx([expected[label] for label in LABELS], abs=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_scores_go_with_the_hidden_patches(mask, model, processor, example, monkeypatch):
    features, visible = model.get_image_features, []

    def get_image_features(pixel_values, patch_selection):
        visible.append(None if patch_selection is None else patch_selection.visible(16).sum(dim=1).tolist())
        return features(pixel_values, patch_selection=patch_selection)

    monkeypatch.setattr(model, "get_image_features", get_image_features)
    done = []
    scores = scoring.score_labels(model, processor, example, LABELS, "{}", mask, [0, 0.25, 0.75], done.append)
    # One pass for all draws of a share.
    assert visible == [None, *([keep_count(16, share)] * scoring.MAX_DRAWS for share in (0.25, 0.75))]
    assert torch.allclose(scores.sum(dim=1), torch.ones(3))
    whole = scoring.score_labels(model, processor, example, LABELS, "{}", "none", [0])[0]
    assert torch.equal(scores[0], whole)
    assert not torch.allclose(scores[2], whole, atol=1e-4)
    assert done == pytest.approx([1 / 3, 2 / 3, 1])


class FirstOrAllMask(PatchMask):
    """Keeps another number of patches at each draw."""

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
        return PatchSelection(torch.arange(1 + int(torch.randint(16, (1,), generator=generator)))[None])


def test_draws_of_a_batch_are_those_one_by_one(model, processor, example):
    register_patch_mask("first_or_all", FirstOrAllMask)
    pixel_values = processor(images=example, return_tensors="pt")["pixel_values"]
    for mask in ("random", "first_or_all"):
        batch = scoring.draw_selections(model, pixel_values, {"name": mask}, None, draws=5)
        generator = torch.Generator().manual_seed(0)
        alone = [model.vision_model.select_patches(pixel_values, patch_mask=mask, generator=generator) for _ in range(5)]
        assert torch.equal(batch.visible(16), torch.cat([selection.visible(16) for selection in alone]))
    assert len(set(batch.lengths.tolist())) > 1
    batched = model.get_image_features(pixel_values.expand(5, -1, -1, -1), patch_selection=batch).pooler_output
    for row, selection in zip(batched, alone, strict=True):
        expected = model.get_image_features(pixel_values, patch_selection=selection).pooler_output[0]
        assert torch.allclose(row, expected, atol=1e-5)


def test_a_larger_tower_gets_fewer_draws(model):
    class Tower:
        def __init__(self, patch_size: int):
            vision = CLIPConfig(vision_config={"patch_size": patch_size}).vision_config
            self.config = type("Config", (), {"vision_config": vision})
            self.vision_model = torch.nn.Linear(86_000_000, 1, bias=False, device="meta")

    assert scoring.num_draws(model) == scoring.MAX_DRAWS
    draws = [scoring.num_draws(Tower(patch_size)) for patch_size in (32, 16, 8, 4)]
    assert draws == sorted(draws, reverse=True)
    assert draws[0] > draws[1] > draws[-1] == 1


def test_one_visitor_at_a_time_uses_the_tokenizer_and_all_get_their_own_scores(model, processor, example):
    """A fast tokenizer says "Already borrowed" where one sets its padding while another reads."""
    held = []

    class Watched:
        model_max_length = processor.tokenizer.model_max_length

        def __call__(self, *arguments, **options):
            held.append(scoring._tokenizer_is_used.locked())
            return processor.tokenizer(*arguments, **options)

    watched = SimpleNamespace(image_processor=processor.image_processor, tokenizer=Watched())
    expected = scoring.score_labels(model, processor, example, LABELS, "{}", "attentive", [0, 0.5])
    found = []

    def visit():
        for _ in range(3):
            scoring.num_cut(model, watched, LABELS, "{}")
            found.append(scoring.score_labels(model, watched, example, LABELS, "{}", "attentive", [0, 0.5]))

    visitors = [threading.Thread(target=visit) for _ in range(4)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert held == [True] * 24
    assert len(found) == 12
    assert all(torch.allclose(scores, expected, atol=1e-6) for scores in found)
