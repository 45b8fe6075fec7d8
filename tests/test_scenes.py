"""Proves that the embedded scenes are reproducible, captioned truthfully and held out by rule."""

from itertools import combinations
from operator import attrgetter

import numpy as np
import pytest
from caption_parser import COUNTS, DIRECTIONS, is_related, is_true

from hf_maskclip.data.scene_backgrounds import BACKGROUNDS
from hf_maskclip.data.scene_drawing import COLOURS, FILLS, REACH, SHAPES, SIZES, Scene, SceneObject, draw_scene
from hf_maskclip.data.scene_sets import (
    OPPOSITES,
    classification_set,
    compositionality_set,
    retrieval_set,
)
from hf_maskclip.data.scenes import SPLITS, caption_scene, is_held_out, relations, sample_scene

pair = attrgetter("shape", "colour")


# ---- Vocabulary and scenes -------------------------------------------------------------------------------------------------


def test_vocabulary_is_large_and_its_words_are_distinct():
    assert len(SHAPES) >= 14
    assert len(COLOURS) >= 10
    assert len(SIZES) == 3
    assert len(FILLS) >= 4
    words = [*SHAPES, *COLOURS, *SIZES, *FILLS]
    assert len(set(words)) == len(words)
    assert min(b / a for a, b in zip(SIZES.values(), list(SIZES.values())[1:], strict=False)) > 1.3


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_depend_on_index_seed_and_split_alone(split):
    first = [sample_scene(i, seed=3, split=split) for i in range(50)]
    assert [sample_scene(i, seed=3, split=split) for i in reversed(range(50))] == first[::-1]
    assert len(set(first)) == 50
    assert sample_scene(0, seed=4, split=split) != first[0]
    assert sample_scene(0, seed=3, split="test" if split == "train" else "train") != first[0]


@pytest.mark.parametrize("split", SPLITS)
def test_objects_lie_apart_inside_a_fitting_background(split):
    sampled = [sample_scene(i, split=split) for i in range(800)]
    assert {len(scene.objects) for scene in sampled} == {1, 2, 3, 4}
    assert {scene.background for scene in sampled} == set(BACKGROUNDS)
    for scene in sampled:
        background = BACKGROUNDS[scene.background]
        for item in scene.objects:
            assert all(REACH * item.diameter <= place <= 1 - REACH * item.diameter for place in item.centre)
            assert item.colour not in background.clashes
            assert item.shape != background.shows
        for a, b in combinations(scene.objects, 2):
            assert np.hypot(*np.subtract(a.centre, b.centre)) > REACH * (a.diameter + b.diameter)


def test_held_out_pairs_are_absent_from_training_and_present_in_every_test_scene():
    held_out = {(shape, colour) for shape in SHAPES for colour in COLOURS if is_held_out(shape, colour)}
    assert 0.12 < len(held_out) / (len(SHAPES) * len(COLOURS)) < 0.18
    assert {shape for shape, _ in held_out} == set(SHAPES)
    assert {colour for _, colour in held_out} == set(COLOURS)
    training = {pair(item) for i in range(3000) for item in sample_scene(i).objects}
    assert training.isdisjoint(held_out)
    assert len(training) == len(SHAPES) * len(COLOURS) - len(held_out)
    for i in range(300):
        assert not held_out.isdisjoint(pair(item) for item in sample_scene(i, split="test").objects)


# ---- Captions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_short_and_varied(split):
    captions = []
    for i in range(1500):
        scene = sample_scene(i, split=split)
        caption = caption_scene(scene, np.random.default_rng(i))
        assert is_true(caption, scene), (caption, scene)
        assert caption == caption.lower()
        assert len(caption.split()) <= 24, caption
        captions.append(caption)
    text = " ".join(captions)
    assert len(set(captions)) > 0.9 * len(captions)
    words = {
        *SHAPES,
        *COLOURS,
        *SIZES,
        *FILLS,
        *DIRECTIONS,
        *COUNTS,
        "object",
        "fish",
        "boxes",
        "there are",
        "to the left of",
    }
    assert not {word for word in words if word not in text}


def test_the_parser_rejects_false_captions():
    scene = Scene(
        (
            SceneObject("star", "red", "small", "striped", (0.2, 0.5), 0.23),
            SceneObject("cup", "blue", "large", "plain", (0.7, 0.5), 0.5),
        ),
        "grass",
        -1.0,
        0,
    )
    assert is_true("a small striped red star left of a large blue cup on a grassy background", scene)
    for false in (
        "a small striped red star right of a large blue cup",
        "a red star above a blue cup",
        "a blue star",
        "two red stars",
        "one cup in the snow",
        "a red star and a green tree",
    ):
        assert not is_true(false, scene), false


def test_relation_words_agree_with_the_coordinates():
    seen = set()
    for i in range(400):
        for a, b in combinations(sample_scene(i).objects, 2):
            for word in relations(a, b):
                assert is_related(a, word, b)
                assert relations(b, a) == (OPPOSITES[word],)
                seen.add(word)
    assert seen == set(DIRECTIONS)


@pytest.mark.parametrize(
    ("call", "value"),
    [
        (lambda: sample_scene(0, split="valid"), "'valid'"),
        (lambda: sample_scene(-1), "-1"),
        (lambda: sample_scene(0, seed=-2), "-2"),
        (lambda: draw_scene(sample_scene(0), style="oil"), "'oil'"),
        (lambda: draw_scene(sample_scene(0), 8), "8"),
        (lambda: classification_set("size", 1), "'size'"),
        (lambda: classification_set("shape", 1, style="oil"), "'oil'"),
        (lambda: classification_set("shape", -5), "-5"),
        (lambda: retrieval_set(1, captions_per_image=9), "9"),
        (lambda: compositionality_set("replace", 1), "'replace'"),
    ],
)
def test_bad_arguments_are_named_in_one_line(call, value):
    with pytest.raises(ValueError) as error:
        call()
    assert value in str(error.value)
    assert "\n" not in str(error.value)
