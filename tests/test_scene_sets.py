"""Proves that the evaluation sets say the truth of the scenes that they really drew: labels, captions and hard negatives."""

import re
from operator import attrgetter

import numpy as np
import pytest
from caption_parser import PLURALS, is_true
from PIL import Image

from hf_maskclip.data import scene_sets
from hf_maskclip.data.scene_drawing import COLOURS, FILLS, SHAPES, SIZES, draw_scene
from hf_maskclip.data.scene_sets import (
    CLASSIFICATION_KINDS,
    COMPOSITIONALITY_KINDS,
    classification_set,
    compositionality_set,
    retrieval_set,
)
from hf_maskclip.data.scenes import SPLITS, is_held_out

pair = attrgetter("shape", "colour")


@pytest.fixture
def drawn(monkeypatch):
    """The scenes that the evaluation sets draw, in their order."""
    record = []

    def recording(scene, *args):
        record.append(scene)
        return draw_scene(scene, *args)

    monkeypatch.setattr(scene_sets, "draw_scene", recording)
    return record


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", CLASSIFICATION_KINDS)
def test_classification_labels_name_the_drawn_object(drawn, kind, split):
    samples, class_names, templates = classification_set(kind, 70, split=split)
    assert len(samples) == len(drawn) == 70
    assert len(set(class_names)) == len(class_names)
    for (image, label), scene in zip(samples, drawn, strict=True):
        (item,) = scene.objects
        names = {"shape": item.shape, "colour": item.colour, "pair": f"{item.colour} {item.shape}"}
        assert class_names[label] == names[kind]
        assert item.size != "small"
        assert image.tobytes() == draw_scene(scene)[0].tobytes()
        for template in templates:
            assert is_true(template.format(c=class_names[label]), scene)
    held_out = [is_held_out(*pair(scene.objects[0])) for scene in drawn]
    if split == "train":
        assert not any(held_out)
    elif kind == "pair":
        assert all(held_out)
    else:
        assert any(held_out)
        assert not all(held_out)
    counts = np.bincount([label for _, label in samples], minlength=len(class_names))
    assert counts.max() - counts.min() <= 1


def test_classification_styles_share_their_scenes(drawn):
    plain, *_ = classification_set("shape", 5, seed=1)
    sketched, *_ = classification_set("shape", 5, seed=1, style="sketch")
    assert drawn[:5] == drawn[5:]
    assert all(a[1] == b[1] and a[0].tobytes() != b[0].tobytes() for a, b in zip(plain, sketched, strict=True))


def test_retrieval_captions_name_all_objects_and_are_unique(drawn):
    samples = retrieval_set(120)
    assert len(samples) == len(drawn) == 120
    captions = [caption for _, several in samples for caption in several]
    assert len(captions) == len(set(captions)) == 360
    for (_, several), scene in zip(samples, drawn, strict=True):
        assert any(is_held_out(*pair(item)) for item in scene.objects)
        for caption in several:
            assert is_true(caption, scene), caption
            for shape, colour in map(pair, scene.objects):
                assert re.search(rf"{colour} ({shape}|{PLURALS[shape]})", caption), caption


@pytest.mark.parametrize("kind", COMPOSITIONALITY_KINDS)
def test_hard_negatives_are_false_and_of_their_kind(drawn, kind):
    samples = compositionality_set(kind, 80)
    assert len(samples) == len(drawn) == 80
    for (image, true, false), scene in zip(samples, drawn, strict=True):
        assert isinstance(image, Image.Image)
        assert is_true(true, scene), true
        assert not is_true(false, scene), false
        old, new = (re.sub(r"\ban\b", "a", caption).replace(",", "").split() for caption in (true, false))
        if kind.startswith("replace"):
            changed = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
            group = {"object": SHAPES, "relation": ("left", "right", "above", "below")}
            words = group.get(kind.removeprefix("replace_"), (*COLOURS, *SIZES, *FILLS))
            assert len(changed) == 1
            assert set(changed[0]) <= set(words)
        elif kind.startswith("swap"):
            moved = {a for a, b in zip(old, new, strict=True) if a != b}
            assert sorted(old) == sorted(new)
            assert len(moved & set(COLOURS)) == 2
            assert len(moved & set(SHAPES)) == (2 if kind == "swap_object" else 0)
        else:
            added = list(new)
            for word in old:
                added.remove(word)
            if kind == "add_attribute":
                assert len(added) == 1
                assert added[0] in COLOURS
            else:
                assert {"with", "a"} < set(added)
                assert len(added) == 4
                assert not set(SHAPES).isdisjoint(added)
