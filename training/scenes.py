"""The embedded data set: endless captioned scenes, drawn on the fly, and evaluation sets from the same generator.

Every scene is a pure function of (seed, split, index), so any range of indices can be drawn by any process.

Held out by combination: a (shape, colour) pair is held out when ``(s + 3 c) % 7 == 0``, with s and c its places in
``SHAPES`` and ``COLOURS`` (about one pair in seven, some for every shape and every colour). Scenes of the "train"
split have no held-out pair, every scene of the "test" split has at least one, and the evaluation sets use "test".
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice, product

import numpy as np
from PIL import Image

from training.scene_drawing import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    REACH,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    SceneObject,
    draw_scene,
)

__all__ = [
    "BACKGROUNDS",
    "CLASSIFICATION_KINDS",
    "COLOURS",
    "COMPOSITIONALITY_KINDS",
    "FILLS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "STYLES",
    "Scene",
    "SceneObject",
    "caption_scene",
    "classification_set",
    "compositionality_set",
    "draw_scene",
    "is_held_out",
    "relations",
    "retrieval_set",
    "sample_scene",
]

SPLITS = ("train", "test")
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
MAX_CAPTION_WORDS = 24
MAX_OBJECTS = 4
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLURALS = {"box": "boxes", "fish": "fish"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
# Streams of random numbers that must not repeat each other for the same seed.
_CAPTION_STREAM, _CLASSIFICATION_STREAM, _COMPOSITION_STREAM = 10, 11, 12


def is_held_out(shape: str, colour: str) -> bool:
    """Whether the pair is kept out of the training split."""
    return (SHAPES.index(shape) + 3 * list(COLOURS).index(colour)) % 7 == 0


_HELD_OUT_PAIRS = tuple(pair for pair in product(SHAPES, COLOURS) if is_held_out(*pair))
_TRAINING_PAIRS = tuple(pair for pair in product(SHAPES, COLOURS) if not is_held_out(*pair))


def _require(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(allowed)}")


def _require_count(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name} is {value}: it must be 0 or more")


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


# -------------------------------------------------------------------------------------------------- sampling


def sample_scene(index: int, *, seed: int = 0, split: str = "train") -> Scene:
    """The scene with this number: one to four objects that do not overlap, on a background they stand out from.

    Objects that share shape and colour are alike in fill and size too. Raises ValueError for a negative ``index`` or
    ``seed`` or an unknown ``split``.
    """
    _require("split", split, SPLITS)
    _require_count("index", index)
    _require_count("seed", seed)
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    kinds = rng.choice(MAX_OBJECTS, p=(0.3, 0.35, 0.2, 0.15)) + 1
    if split == "train":
        pairs = [_pick(rng, _TRAINING_PAIRS) for _ in range(kinds)]
    else:
        others = [_pick(rng, _TRAINING_PAIRS + _HELD_OUT_PAIRS) for _ in range(kinds - 1)]
        pairs = [_pick(rng, _HELD_OUT_PAIRS), *others]
    pairs = list(dict.fromkeys(pairs))
    if len(pairs) < MAX_OBJECTS and rng.random() < 0.2:
        pairs[:1] *= int(rng.integers(2, MAX_OBJECTS - len(pairs) + 2))
    # A large object is half as wide as the picture: none in a crowd, and none that comes in copies.
    is_crowd = len(pairs) == MAX_OBJECTS or len(set(pairs)) < len(pairs)
    return _compose(rng, pairs, ("small", "medium") if is_crowd else tuple(SIZES))


def _compose(rng: np.random.Generator, pairs: list[tuple[str, str]], sizes: tuple[str, ...]) -> Scene:
    """Place an object for each (shape, colour) pair, at most one of them large; some may find no room."""
    looks: dict[tuple[str, str], tuple[str, str]] = {}
    objects: list[SceneObject] = []
    for shape, colour in pairs:
        if (shape, colour) not in looks:
            looks[shape, colour] = _pick(rng, sizes), _pick(rng, FILLS)
        size, fill = looks[shape, colour]
        if size == "large":
            sizes = tuple(name for name in sizes if name != "large")
        diameter = SIZES[size] * float(_pick(rng, (0.93, 1.0, 1.07)))
        centre = _free_place(rng, diameter, objects)
        if centre:
            angle, mirrored = int(_pick(rng, (-10, 0, 10))), bool(rng.integers(2))
            objects.append(SceneObject(shape, colour, size, fill, centre, diameter, angle, mirrored))
    return Scene(
        objects=tuple(objects),
        background=_pick(rng, _fitting_backgrounds(objects)),
        light_angle=float(rng.uniform(-0.9, -0.1) * np.pi),
        texture_seed=int(rng.integers(2**32)),
    )


def _fitting_backgrounds(objects: list[SceneObject]) -> list[str]:
    """Backgrounds against which all objects stand out and that show no such shape themselves."""
    colours, shapes = {item.colour for item in objects}, {item.shape for item in objects}
    return [
        name
        for name, background in BACKGROUNDS.items()
        if colours.isdisjoint(background.clashes) and background.shows not in shapes
    ]


def _free_place(rng: np.random.Generator, diameter: float, objects: list[SceneObject]) -> tuple[float, float] | None:
    """A centre at which a silhouette lies inside the picture and touches no other object, if one is found."""
    margin = REACH * diameter + 0.01
    for x, y in rng.uniform(margin, 1 - margin, (30, 2)).tolist():
        if all(
            np.hypot(x - item.centre[0], y - item.centre[1]) > REACH * (diameter + item.diameter) + 0.02 for item in objects
        ):
            return x, y
    return None


# -------------------------------------------------------------------------------------------------- captions


@dataclass(frozen=True)
class _Mention:
    """How a caption speaks of one or several like objects; attributes that are None are left unsaid."""

    shape: str | None
    colour: str | None = None
    size: str | None = None
    fill: str | None = None
    number: int = 1
    determiner: str = "a"  # for one object: "a", "one" or "the"

    def __str__(self) -> str:
        noun = self.shape or "object"
        if self.number > 1:
            noun = PLURALS.get(noun, noun + "s")
        words = [word for word in (self.size, self.fill, self.colour, noun) if word]
        determiner = self.determiner if self.number == 1 else NUMBERS[self.number]
        if determiner == "a" and words[0][0] in "aeiou":
            determiner = "an"
        return " ".join((determiner, *words))


def relations(first: SceneObject, second: SceneObject) -> tuple[str, ...]:
    """The word for where ``first`` clearly is as seen from ``second``, or nothing: at most one of four directions."""
    dx, dy = (there - here for here, there in zip(first.centre, second.centre, strict=True))
    if max(abs(dx), abs(dy)) < 0.2 or max(abs(dx), abs(dy)) < 1.5 * min(abs(dx), abs(dy)):
        return ()
    if abs(dx) > abs(dy):
        return ("left of",) if dx > 0 else ("right of",)
    return ("above",) if dy > 0 else ("below",)


def _groups(scene: Scene) -> list[list[SceneObject]]:
    """The objects, like ones together."""
    groups: dict[tuple[str, str], list[SceneObject]] = {}
    for item in scene.objects:
        groups.setdefault((item.shape, item.colour), []).append(item)
    return list(groups.values())


def _mention(scene: Scene, group: list[SceneObject], rng: np.random.Generator, says_colour: float, detail: float) -> _Mention:
    """Name a group; its colour and, with probability ``detail`` each, size and fill are said by chance.

    Where another object has the same shape, the colour is always said.
    """
    item = group[0]
    shape_is_shared = any(other.shape == item.shape and other.colour != item.colour for other in scene.objects)
    return _Mention(
        shape=item.shape,
        colour=item.colour if shape_is_shared or rng.random() < says_colour else None,
        size=item.size if rng.random() < detail else None,
        fill=item.fill if rng.random() < detail and (item.fill != "plain" or rng.random() < 0.2) else None,
        number=len(group),
        determiner=str(rng.choice(("a", "one", "the"), p=(0.7, 0.15, 0.15))),
    )


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _relate(groups: list[list[SceneObject]], mentions: list[_Mention], rng: np.random.Generator) -> str | None:
    """The first two mentions as a relation and the others after "with", or None where no relation is clear."""
    if len(groups) < 2 or len(groups[0]) > 1 or len(groups[1]) > 1:
        return None
    found = relations(groups[0][0], groups[1][0])
    if not found:
        return None
    word = found[0]
    if word.endswith(" of") and rng.random() < 0.3:
        word = "to the " + word
    others = [str(mention) for mention in mentions[2:]]
    return f"{mentions[0]} {word} {mentions[1]}" + (f", with {_join(others)}" if others else "")


def _phrase(body: str, plural: bool, background: str | None, rng: np.random.Generator) -> str:
    """One of several sentence frames round the description of the objects."""
    there_is = f"there {'are' if plural else 'is'} {body}"
    phrase = _pick(rng, BACKGROUNDS[background].phrases) if background else ""
    if phrase and rng.random() < 0.2:
        return f"{phrase}, {_pick(rng, (body, there_is))}"
    sentence = _pick(rng, (body, body, f"a picture of {body}", f"a photo of {body}", there_is))
    return f"{sentence} {phrase}".rstrip()


def _partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of one group alone, sometimes of its colour alone ("a red object")."""
    group = _pick(rng, _groups(scene))
    mention = _mention(scene, group, rng, says_colour=0.7, detail=0.3)
    if len(group) == len(scene.objects) and mention.colour and rng.random() < 0.6:
        mention = replace(mention, shape=None)
    return _phrase(str(mention), mention.number > 1, scene.background if rng.random() < 0.3 else None, rng)


def _full_caption(
    scene: Scene, rng: np.random.Generator, says_colour: float, details: tuple[float, ...], says_background: float
) -> str:
    """A caption that names all objects, with as much of ``details`` (tried in order) as fits the word limit."""
    for detail in (*details, 0.0):
        groups = _groups(scene)
        order = rng.permutation(len(groups))
        groups = [groups[place] for place in order]
        mentions = [_mention(scene, group, rng, says_colour, detail) for group in groups]
        body = _relate(groups, mentions, rng) if rng.random() < 0.7 else None
        body = body or _join([str(mention) for mention in mentions])
        background = scene.background if rng.random() < says_background else None
        caption = _phrase(body, mentions[0].number > 1, background, rng)
        if len(caption.split()) <= MAX_CAPTION_WORDS:
            break
    return caption


def caption_scene(scene: Scene, rng: np.random.Generator) -> str:
    """A true English caption of at most 24 words, lower case; one in six names only some of the objects."""
    if rng.random() < 1 / 6:
        return _partial_caption(scene, rng)
    return _full_caption(scene, rng, says_colour=0.85, details=(0.5, 0.3, 0.15), says_background=0.6)


# ------------------------------------------------------------------------------------------- evaluation sets

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
    _require("kind", kind, CLASSIFICATION_KINDS)
    _require("style", style, STYLES)
    _require("split", split, SPLITS)
    _require_count("n", n)
    pairs = _TRAINING_PAIRS if split == "train" else _TRAINING_PAIRS + _HELD_OUT_PAIRS
    if kind == "pair":
        pairs = _TRAINING_PAIRS if split == "train" else _HELD_OUT_PAIRS
        members = {f"{colour} {shape}": [(shape, colour)] for shape, colour in pairs}
    else:
        place, names = (0, SHAPES) if kind == "shape" else (1, tuple(COLOURS))
        members = {name: [pair for pair in pairs if pair[place] == name] for name in names}
    class_names = list(members)
    samples = []
    stream = (seed, _CLASSIFICATION_STREAM, CLASSIFICATION_KINDS.index(kind), SPLITS.index(split))
    for index in range(n):
        rng = np.random.default_rng((*stream, index))
        label = index % len(class_names)
        scene = _compose(rng, [_pick(rng, members[class_names[label]])], sizes=("medium", "large"))
        samples.append((draw_scene(scene, image_size, style)[0], label))
    return samples, class_names, list(_COLOUR_TEMPLATES if kind == "colour" else _THING_TEMPLATES)


def retrieval_set(
    n: int, *, seed: int = 0, image_size: int = 96, captions_per_image: int = 3
) -> list[tuple[Image.Image, list[str]]]:
    """``n`` test pictures with captions that name all objects; no two captions in the whole set are the same.

    Raises ValueError for a negative n or for other than one to five captions a picture.
    """
    _require_count("n", n)
    if not 1 <= captions_per_image <= 5:
        raise ValueError(f"captions_per_image is {captions_per_image}: it must be 1 to 5")
    samples: list[tuple[Image.Image, list[str]]] = []
    used: set[str] = set()
    for index in count():
        if len(samples) == n:
            return samples
        scene = sample_scene(index, seed=seed, split="test")
        rng = np.random.default_rng((seed, SPLITS.index("test"), index, _CAPTION_STREAM))
        tries = (_full_caption(scene, rng, 1.0, details=(1.0, 0.8, 0.5), says_background=0.9) for _ in range(20))
        captions = list(islice(dict.fromkeys(tries), captions_per_image))
        if len(captions) == captions_per_image and used.isdisjoint(captions):
            used.update(captions)
            samples.append((draw_scene(scene, image_size)[0], captions))


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
    return _pick(rng, [option for option in options if option not in present])


def _replace_attribute(mention: _Mention, item: SceneObject, present: set, rng: np.random.Generator) -> _Mention:
    """Give ``mention`` another size, or a colour or fill that no object has."""
    name = _pick(rng, ("colour", "size", "fill") if mention.fill else ("colour", "size"))
    options = {"colour": tuple(COLOURS), "size": tuple(SIZES), "fill": FILLS}[name]
    return replace(mention, **{name: _other(rng, options, present | {getattr(item, name)})})


def _statements(kind: str, scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A true and a false description of a scene of two unlike objects, the second made from the first."""
    a, b = scene.objects if rng.random() < 0.5 else scene.objects[::-1]
    relation = relations(a, b)[0]
    first, second = (_Mention(x.shape, x.colour) for x in (a, b))
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
        extra = _Mention(_other(rng, SHAPES, present), _other(rng, tuple(COLOURS), present))
        false += f", with {extra}"
    return true, false


def compositionality_set(kind: str, n: int, *, seed: int = 0, image_size: int = 96) -> list[tuple[Image.Image, str, str]]:
    """``n`` test pictures, each with a true caption and a hard negative of one of SugarCrepe's seven kinds.

    The negative is false of the picture and as fluent as the true caption, from which it differs by what ``kind``
    says: an object, attribute or relation replaced, two objects or colours swapped, an object or attribute added.
    Raises ValueError for an unknown kind or a negative n.
    """
    _require("kind", kind, COMPOSITIONALITY_KINDS)
    _require_count("n", n)
    samples = []
    for scene, rng in islice(_contrast_scenes(seed, COMPOSITIONALITY_KINDS.index(kind)), n):
        true, false = _statements(kind, scene, rng)
        phrase = _pick(rng, BACKGROUNDS[scene.background].phrases)
        ending = f" {phrase}" if rng.random() < 0.5 else ""
        samples.append((draw_scene(scene, image_size)[0], true + ending, false + ending))
    return samples
