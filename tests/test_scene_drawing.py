"""Proves that scenes are drawn as they are described: each object is where it should be, in its colour and shape, and stands
out from the background in every style."""

from itertools import combinations

import numpy as np
import pytest

from hf_maskclip.data.scene_backgrounds import BACKGROUNDS
from hf_maskclip.data.scene_drawing import COLOURS, FILLS, REACH, SHAPES, SIZES, STYLES, Scene, SceneObject, draw_scene
from hf_maskclip.data.scenes import sample_scene


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


def test_drawing_is_repeatable_at_any_size():
    scene = sample_scene(7)
    for image_size in (32, 96, 160):
        (image, mask), (again, mask_again) = draw_scene(scene, image_size), draw_scene(scene, image_size)
        assert image.mode == "RGB"
        assert image.size == (image_size, image_size)
        assert mask.shape == image.size
        assert image.tobytes() == again.tobytes()
        assert np.array_equal(mask, mask_again)


def test_mask_covers_exactly_what_the_objects_change():
    for i in range(30):
        scene = sample_scene(i)
        image, mask = draw_scene(scene, style="flat")
        empty, empty_mask = draw_scene(Scene((), scene.background, scene.light_angle, scene.texture_seed), style="flat")
        changed = np.abs(pixels(image) - pixels(empty)).max(axis=2) > 0.02
        assert mask.dtype == bool
        assert not empty_mask.any()
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
