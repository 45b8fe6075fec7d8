"""Evaluation sets of drawn scenes: to be classified, to be retrieved by captions, and with false captions.

Every set is a pure function of its arguments. Pictures are of the "test" split, unless a probe is to be fitted.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

import numpy as np
from PIL import Image

from .scene_backgrounds import BACKGROUNDS
from .scene_drawing import COLOURS, FILLS, SHAPES, SIZES, STYLES, Scene, SceneObject, draw_scene
from .scenes import (
    HELD_OUT_PAIRS,
    SPLITS,
    TRAINING_PAIRS,
    Mention,
    check_count,
    check_known,
    compose_scene,
    full_caption,
    pick,
    relations,
    sample_scene,
)

CLASSIFICATION_KINDS = ("shape", "colour", "pair")
COMPOSITIONALITY_KINDS = (
    "replace_object",
    "replace_attribute",
    "replace_relation",
    "swap_object",
    "swap_attribute",
    "add_object",
    "add_attribute",
)
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Streams of random numbers that must not repeat each other for the same seed.
_CAPTION_STREAM, _CLASSIFICATION_STREAM, _COMPOSITION_STREAM = 10, 11, 12

_THING_TEMPLATES = ("a photo of the {c}", "a picture of one {c}", "there is one {c}", "the {c}", "one {c}")
_COLOUR_TEMPLATES = tuple(template.replace("{c}", "{c} object") for template in _THING_TEMPLATES)


def classification_set(
    kind: str, n: int, *, seed: int = 0, image_size: int = 96, style: str = "plain", split: str = "test"
) -> tuple[list[tuple[Image.Image, int]], list[str], list[str]]:
    """Pictures of one medium or large object, to be told apart by shape, colour or (shape, colour) pair.

    The same arguments but ``style`` give the same scenes, so that styles can be compared. Classes come equally often.
    With ``split="test"`` the classes of kind "pair" are the held-out pairs; shapes come in all colours, and colours on
    all shapes: a class of held-out pairs alone would be told by the one or two colours that it comes in.
    ``split="train"`` has no held-out pair, for example to fit a linear probe on.

    Returns the ``n`` (image, label) pairs, the class names, and prompt templates with ``{c}`` for the class name.
    Raises ValueError for an unknown kind, style or split or a negative n.
    """
    check_known("kind", kind, CLASSIFICATION_KINDS)
    check_known("style", style, STYLES)
    check_known("split", split, SPLITS)
    check_count("n", n)
    pairs = TRAINING_PAIRS if split == "train" else TRAINING_PAIRS + HELD_OUT_PAIRS
    if kind == "pair":
        pairs = TRAINING_PAIRS if split == "train" else HELD_OUT_PAIRS
        members = {f"{colour} {shape}": [(shape, colour)] for shape, colour in pairs}
    else:
        index, names = (0, SHAPES) if kind == "shape" else (1, tuple(COLOURS))
        members = {name: [pair for pair in pairs if pair[index] == name] for name in names}
    class_names = list(members)
    samples = []
    stream = (seed, _CLASSIFICATION_STREAM, CLASSIFICATION_KINDS.index(kind), SPLITS.index(split))
    for number in range(n):
        rng = np.random.default_rng((*stream, number))
        label = number % len(class_names)
        scene = compose_scene(rng, [pick(rng, members[class_names[label]])], sizes=("medium", "large"))
        samples.append((draw_scene(scene, image_size, style)[0], label))
    return samples, class_names, list(_COLOUR_TEMPLATES if kind == "colour" else _THING_TEMPLATES)


def retrieval_set(
    n: int, *, seed: int = 0, image_size: int = 96, captions_per_image: int = 3
) -> list[tuple[Image.Image, list[str]]]:
    """``n`` test pictures with captions that name all objects; no two captions in the whole set are the same.

    Raises ValueError for a negative n or for other than one to five captions a picture.
    """
    check_count("n", n)
    if not 1 <= captions_per_image <= 5:
        raise ValueError(f"captions_per_image is {captions_per_image}: it must be 1 to 5")
    samples: list[tuple[Image.Image, list[str]]] = []
    used: set[str] = set()
    indices = count()
    while len(samples) < n:
        index = next(indices)
        scene = sample_scene(index, seed=seed, split="test")
        rng = np.random.default_rng((seed, SPLITS.index("test"), index, _CAPTION_STREAM))
        tries = (full_caption(scene, rng, 1.0, details=(1.0, 0.8, 0.5), says_background=0.9) for _ in range(20))
        captions = list(islice(dict.fromkeys(tries), captions_per_image))
        if len(captions) == captions_per_image and used.isdisjoint(captions):
            used.update(captions)
            samples.append((draw_scene(scene, image_size)[0], captions))
    return samples


def _contrast_scenes(seed: int, stream: int) -> Iterator[tuple[Scene, np.random.Generator]]:
    """Test scenes of two objects that differ in shape and colour and stand in a clear relation."""
    for index in count():
        scene = sample_scene(index, seed=seed, split="test")
        if len(scene.objects) != 2:
            continue
        first, second = scene.objects
        if first.shape != second.shape and first.colour != second.colour and relations(first, second):
            yield scene, np.random.default_rng((seed, _COMPOSITION_STREAM, stream, index))


def _other(rng: np.random.Generator, options, present: set) -> str:
    return pick(rng, [option for option in options if option not in present])


def _replace_attribute(mention: Mention, item: SceneObject, present: set, rng: np.random.Generator) -> Mention:
    """Give ``mention`` another size, or a colour or fill that no object has."""
    name = pick(rng, ("colour", "size", "fill") if mention.fill else ("colour", "size"))
    options = {"colour": tuple(COLOURS), "size": tuple(SIZES), "fill": FILLS}[name]
    other: dict[str, Any] = {name: _other(rng, options, present | {getattr(item, name)})}
    return replace(mention, **other)


def _statements(kind: str, scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A true and a false description of a scene of two unlike objects, the second made from the first."""
    a, b = scene.objects if rng.random() < 0.5 else scene.objects[::-1]
    relation = relations(a, b)[0]
    first, second = (Mention(x.shape, x.colour) for x in (a, b))
    present = {word for x in (a, b) for word in (x.shape, x.colour, x.fill)} | {BACKGROUNDS[scene.background].shows}
    if kind == "replace_attribute":
        first, second = (replace(m, size=x.size, fill=x.fill) for m, x in ((first, a), (second, b)))
    elif kind == "add_attribute":
        first = replace(first, colour=None)
    true = f"{first} {relation} {second}"
    if kind == "replace_object":
        second = replace(second, shape=_other(rng, SHAPES, present))
    elif kind == "replace_attribute":
        first = _replace_attribute(first, a, present, rng)
    elif kind == "replace_relation":
        relation = OPPOSITES[relation]
    elif kind == "swap_object":
        first, second = second, first
    elif kind == "swap_attribute":
        first, second = replace(first, colour=b.colour), replace(second, colour=a.colour)
    elif kind == "add_attribute":
        first = replace(first, colour=_other(rng, tuple(COLOURS), present))
    false = f"{first} {relation} {second}"
    if kind == "add_object":
        extra = Mention(_other(rng, SHAPES, present), _other(rng, tuple(COLOURS), present))
        false += f", with {extra}"
    return true, false


def compositionality_set(kind: str, n: int, *, seed: int = 0, image_size: int = 96) -> list[tuple[Image.Image, str, str]]:
    """``n`` test pictures, each with a true caption and a hard negative of one of SugarCrepe's seven kinds.

    The negative is false of the picture and as fluent as the true caption, from which it differs by what ``kind``
    says: an object, attribute or relation replaced, two objects or colours swapped, an object or attribute added.
    Raises ValueError for an unknown kind or a negative n.
    """
    check_known("kind", kind, COMPOSITIONALITY_KINDS)
    check_count("n", n)
    samples = []
    for scene, rng in islice(_contrast_scenes(seed, COMPOSITIONALITY_KINDS.index(kind)), n):
        true, false = _statements(kind, scene, rng)
        phrase = pick(rng, BACKGROUNDS[scene.background].phrases)
        ending = f" {phrase}" if rng.random() < 0.5 else ""
        samples.append((draw_scene(scene, image_size)[0], true + ending, false + ending))
    return samples
