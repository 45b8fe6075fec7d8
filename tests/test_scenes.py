"""Proves that the embedded scenes are reproducible, drawn as described, captioned truthfully and held out by rule.

Captions are checked by a parser of their own: it must understand every word, and what it reads is compared with the
objects and coordinates of the scene. The evaluation sets are checked against the scenes they really drew.
"""

import re
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from hf_maskclip.data import scene_sets
from hf_maskclip.data.scene_backgrounds import BACKGROUNDS
from hf_maskclip.data.scene_drawing import COLOURS, FILLS, REACH, SHAPES, SIZES, STYLES, Scene, SceneObject, draw_scene
from hf_maskclip.data.scene_sets import (
    CLASSIFICATION_KINDS,
    COMPOSITIONALITY_KINDS,
    OPPOSITES,
    classification_set,
    compositionality_set,
    retrieval_set,
)
from hf_maskclip.data.scenes import SPLITS, caption_scene, is_held_out, relations, sample_scene

PLURALS = {noun: {"box": "boxes", "fish": "fish"}.get(noun, noun + "s") for noun in (*SHAPES, "object")}
SINGULARS = {plural: shape for shape, plural in PLURALS.items()}
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
DIRECTIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
MENTION = re.compile(
    rf"\b(?P<determiner>an?|the|{'|'.join(COUNTS)})"
    rf"(?: (?P<size>{'|'.join(SIZES)}))?(?: (?P<fill>{'|'.join(FILLS)}))?(?: (?P<colour>{'|'.join(COLOURS)}))?"
    rf" (?P<noun>{'|'.join((*PLURALS.values(), *PLURALS))})\b"
)


def pair(item):
    return item.shape, item.colour


def pixels(image):
    return np.asarray(image, np.float32) / 255


def one_object(shape="ball", colour="red", size="medium", fill="plain", background="checks"):
    item = SceneObject(shape, colour, size, fill, (0.5, 0.5), SIZES[size])
    return Scene((item,), background, light_angle=-2.0, texture_seed=5)


def grow(mask, steps):
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


def matching(scene, words):
    """The objects that fit a parsed mention."""
    shape = SINGULARS.get(words["noun"], words["noun"])
    wanted = {"shape": None if shape == "object" else shape, **{k: words[k] for k in ("size", "fill", "colour")}}
    return [o for o in scene.objects if all(value in (None, getattr(o, name)) for name, value in wanted.items())]


def is_related(first, word, second):
    (x, y), (dx, dy) = np.subtract(second.centre, first.centre), DIRECTIONS[word]
    along, across = x * dx + y * dy, abs(x * dy) + abs(y * dx)
    return along >= 0.2 and along > across


def is_true(caption, scene):
    """Whether all that ``caption`` says holds of ``scene``. Fails the test if a part of it cannot be understood."""
    phrases = {phrase: name for name, background in BACKGROUNDS.items() for phrase in background.phrases}
    said = next((p for p in phrases if caption.endswith(" " + p) or caption.startswith(p + ", ")), None)
    body = caption
    if said:
        body = caption.removesuffix(" " + said).removeprefix(said + ", ")
    opening = re.match(r"a picture of |a photo of |there (is|are) |", body)
    body = body[opening.end() :].replace("to the left of", "left of").replace("to the right of", "right of")
    mentions = list(MENTION.finditer(body))
    assert mentions and mentions[0].start() == 0 and mentions[-1].end() == len(body), caption
    if opening[1]:
        assert (opening[1] == "are") == (mentions[0]["determiner"] in ("two", "three", "four")), caption
    truths = [said is None or phrases[said] == scene.background]
    found = [matching(scene, mention) for mention in mentions]
    for mention, objects in zip(mentions, found, strict=True):
        number = COUNTS.get(mention["determiner"], 1)
        assert mention["noun"] in (PLURALS.values() if number > 1 else PLURALS), caption
        if mention["determiner"] in ("a", "an"):
            assert (mention["determiner"] == "an") == (mention[0].split()[1][0] in "aeiou"), caption
        truths.append(len(objects) == number if mention["determiner"] in COUNTS else len(objects) >= 1)
    for place, (left, right) in enumerate(zip(mentions, mentions[1:], strict=False)):
        link = body[left.end() : right.start()].strip()
        assert link in {",", "and", ", with", *DIRECTIONS}, caption
        if link in DIRECTIONS:
            truths.append(any(is_related(a, link, b) for a in found[place] for b in found[place + 1]))
    return all(truths)


@pytest.fixture
def drawn(monkeypatch):
    """The scenes that the evaluation sets draw, in their order."""
    record = []

    def recording(scene, *args):
        record.append(scene)
        return draw_scene(scene, *args)

    monkeypatch.setattr(scene_sets, "draw_scene", recording)
    return record


# ------------------------------------------------------------------------------------- vocabulary and scenes


def test_vocabulary_is_large_and_its_words_are_distinct():
    assert len(SHAPES) >= 14 and len(COLOURS) >= 10 and len(SIZES) == 3 and len(FILLS) >= 4
    words = [*SHAPES, *COLOURS, *SIZES, *FILLS]
    assert len(set(words)) == len(words)
    assert min(b / a for a, b in zip(SIZES.values(), list(SIZES.values())[1:], strict=False)) > 1.3


def test_colours_are_far_apart():
    for (first, a), (second, b) in combinations(COLOURS.items(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 0.25, (first, second)


def test_silhouettes_are_far_apart():
    masks = {shape: draw_scene(one_object(shape, size="large"))[1] for shape in SHAPES}
    for first, second in combinations(SHAPES, 2):
        shared = (masks[first] & masks[second]).sum() / (masks[first] | masks[second]).sum()
        assert shared < 0.9, (first, second, shared)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_allowed_colours_stand_out_from_the_background(background):
    picture = pixels(draw_scene(Scene((), background, -1.5, 3))[0]).mean(axis=(0, 1))
    for colour in set(COLOURS) - set(BACKGROUNDS[background].clashes):
        assert np.linalg.norm(COLOURS[colour] - picture) > 0.25, colour


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
            assert item.colour not in background.clashes and item.shape != background.shows
        for a, b in combinations(scene.objects, 2):
            assert np.hypot(*np.subtract(a.centre, b.centre)) > REACH * (a.diameter + b.diameter)


def test_held_out_pairs_are_absent_from_training_and_present_in_every_test_scene():
    held_out = {(shape, colour) for shape in SHAPES for colour in COLOURS if is_held_out(shape, colour)}
    assert 0.12 < len(held_out) / (len(SHAPES) * len(COLOURS)) < 0.18
    assert {shape for shape, _ in held_out} == set(SHAPES) and {colour for _, colour in held_out} == set(COLOURS)
    training = {pair(item) for i in range(3000) for item in sample_scene(i).objects}
    assert training.isdisjoint(held_out)
    assert len(training) == len(SHAPES) * len(COLOURS) - len(held_out)
    for i in range(300):
        assert not held_out.isdisjoint(pair(item) for item in sample_scene(i, split="test").objects)


# --------------------------------------------------------------------------------------------------- drawing


def test_drawing_is_repeatable_at_any_size():
    scene = sample_scene(7)
    for image_size in (32, 96, 160):
        (image, mask), (again, mask_again) = draw_scene(scene, image_size), draw_scene(scene, image_size)
        assert image.mode == "RGB" and image.size == (image_size, image_size) and mask.shape == image.size
        assert image.tobytes() == again.tobytes() and np.array_equal(mask, mask_again)


def test_mask_covers_exactly_what_the_objects_change():
    for i in range(30):
        scene = sample_scene(i)
        image, mask = draw_scene(scene, style="flat")
        empty, empty_mask = draw_scene(Scene((), scene.background, scene.light_angle, scene.texture_seed), style="flat")
        changed = np.abs(pixels(image) - pixels(empty)).max(axis=2) > 0.02
        assert mask.dtype == bool and not empty_mask.any()
        assert not (changed & ~grow(mask, 3)).any()
        assert (mask & ~changed).sum() <= 0.02 * mask.sum()


def test_each_object_is_where_the_scene_says():
    y, x = (np.indices((96, 96)) + 0.5) / 96
    for i in range(30):
        scene = sample_scene(i)
        mask = draw_scene(scene)[1]
        for item in scene.objects:
            disc = np.hypot(x - item.centre[0], y - item.centre[1]) < REACH * item.diameter + 0.01
            assert (mask & disc).sum() > 0.15 * disc.sum(), item
            mask = mask & ~disc
        assert not mask.any()


@pytest.mark.parametrize("colour", COLOURS)
def test_a_plain_object_has_its_colour(colour):
    image, mask = draw_scene(one_object("ball", colour, "large"), style="flat")
    assert np.abs(pixels(image)[mask] - COLOURS[colour]).max(axis=1).mean() < 0.1


def test_every_fill_looks_different():
    seen = [pixels(draw_scene(one_object("ball", "blue", "small", fill))[0]) for fill in FILLS]
    mask = draw_scene(one_object("ball", "blue", "small"))[1]
    for a, b in combinations(seen, 2):
        assert np.abs(a - b)[mask].mean() > 0.04


@pytest.mark.parametrize("style", STYLES)
def test_styles_change_the_picture_but_not_the_objects_places(style):
    for i in range(8):
        scene = sample_scene(i)
        (plain, mask), (image, styled_mask) = draw_scene(scene), draw_scene(scene, 96, style)
        assert np.array_equal(mask, styled_mask)
        assert (np.abs(pixels(plain) - pixels(image)).mean() > 0.008) == (style != "plain")


def test_recoloured_changes_the_background_and_keeps_the_objects():
    for background in BACKGROUNDS:
        scene = one_object("box", "turquoise", background=background)
        plain, mask = draw_scene(scene)
        recoloured = pixels(draw_scene(scene, style="recoloured")[0])
        inside, outside = ~grow(~mask, 3), ~grow(mask, 12)
        assert np.array_equal(recoloured[inside], pixels(plain)[inside])
        assert np.abs((recoloured - pixels(plain))[outside].mean(axis=0)).max() > 0.04, background


# -------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_short_and_varied(split):
    captions = []
    for i in range(1500):
        scene = sample_scene(i, split=split)
        caption = caption_scene(scene, np.random.default_rng(i))
        assert is_true(caption, scene), (caption, scene)
        assert caption == caption.lower() and len(caption.split()) <= 24, caption
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


# ------------------------------------------------------------------------------------------- evaluation sets


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", CLASSIFICATION_KINDS)
def test_classification_labels_name_the_drawn_object(drawn, kind, split):
    samples, class_names, templates = classification_set(kind, 70, split=split)
    assert len(samples) == len(drawn) == 70 and len(set(class_names)) == len(class_names)
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
        assert any(held_out) and not all(held_out)
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
        assert is_true(true, scene) and not is_true(false, scene), (true, false)
        old, new = (re.sub(r"\ban\b", "a", caption).replace(",", "").split() for caption in (true, false))
        if kind.startswith("replace"):
            changed = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
            group = {"object": SHAPES, "relation": ("left", "right", "above", "below")}
            words = group.get(kind.removeprefix("replace_"), (*COLOURS, *SIZES, *FILLS))
            assert len(changed) == 1 and set(changed[0]) <= set(words)
        elif kind.startswith("swap"):
            moved = {a for a, b in zip(old, new, strict=True) if a != b}
            assert sorted(old) == sorted(new)
            assert len(moved & set(COLOURS)) == 2 and len(moved & set(SHAPES)) == (2 if kind == "swap_object" else 0)
        else:
            added = list(new)
            for word in old:
                added.remove(word)
            if kind == "add_attribute":
                assert len(added) == 1 and added[0] in COLOURS
            else:
                assert {"with", "a"} < set(added) and len(added) == 4 and not set(SHAPES).isdisjoint(added)


# ---------------------------------------------------------------------------------------------------- errors


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
    assert value in str(error.value) and "\n" not in str(error.value)
