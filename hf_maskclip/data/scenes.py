"""The embedded data set: endless scenes and their captions, as descriptions that are drawn elsewhere.

Every scene is a pure function of (seed, split, index), so any range of indices can be drawn by any process.

Held out by combination: a (shape, colour) pair is held out when ``(s + 3 c) % 7 == 0``, with s and c its indices in
``SHAPES`` and ``COLOURS`` (about one pair in seven, some for every shape and every colour). Scenes of the "train"
split have no held-out pair, every scene of the "test" split has at least one, and the evaluation sets use "test".
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from .scene_backgrounds import BACKGROUNDS
from .scene_drawing import COLOURS, FILLS, REACH, SHAPES, SIZES, Scene, SceneObject

SPLITS = ("train", "test")
MAX_CAPTION_WORDS = 24
MAX_OBJECTS = 4
PLURALS = {"box": "boxes", "fish": "fish"}
NUMBERS = {2: "two", 3: "three", 4: "four"}


def is_held_out(shape: str, colour: str) -> bool:
    """Whether the pair is kept out of the training split."""
    return (SHAPES.index(shape) + 3 * list(COLOURS).index(colour)) % 7 == 0


HELD_OUT_PAIRS = tuple(pair for pair in product(SHAPES, COLOURS) if is_held_out(*pair))
TRAINING_PAIRS = tuple(pair for pair in product(SHAPES, COLOURS) if not is_held_out(*pair))


def check_known(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(allowed)}")


def check_count(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name} is {value}: it must be 0 or more")


def pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


# -------------------------------------------------------------------------------------------------- sampling


def sample_scene(index: int, *, seed: int = 0, split: str = "train") -> Scene:
    """The scene with this number: one to four objects that do not overlap, on a background they stand out from.

    Objects that share shape and colour are alike in fill and size too. Raises ValueError for a negative ``index`` or
    ``seed`` or an unknown ``split``.
    """
    check_known("split", split, SPLITS)
    check_count("index", index)
    check_count("seed", seed)
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    kinds = rng.choice(MAX_OBJECTS, p=(0.3, 0.35, 0.2, 0.15)) + 1
    if split == "train":
        pairs = [pick(rng, TRAINING_PAIRS) for _ in range(kinds)]
    else:
        others = [pick(rng, TRAINING_PAIRS + HELD_OUT_PAIRS) for _ in range(kinds - 1)]
        pairs = [pick(rng, HELD_OUT_PAIRS), *others]
    pairs = list(dict.fromkeys(pairs))
    if len(pairs) < MAX_OBJECTS and rng.random() < 0.2:
        pairs[:1] *= int(rng.integers(2, MAX_OBJECTS - len(pairs) + 2))
    # A large object is half as wide as the picture: none in a crowd, and none that comes in copies.
    is_crowd = len(pairs) == MAX_OBJECTS or len(set(pairs)) < len(pairs)
    return compose_scene(rng, pairs, ("small", "medium") if is_crowd else tuple(SIZES))


def compose_scene(rng: np.random.Generator, pairs: list[tuple[str, str]], sizes: tuple[str, ...]) -> Scene:
    """Place an object for each (shape, colour) pair, at most one of them large; some may find no room."""
    looks: dict[tuple[str, str], tuple[str, str]] = {}
    objects: list[SceneObject] = []
    for shape, colour in pairs:
        if (shape, colour) not in looks:
            looks[shape, colour] = pick(rng, sizes), pick(rng, FILLS)
        size, fill = looks[shape, colour]
        if size == "large":
            sizes = tuple(name for name in sizes if name != "large")
        diameter = SIZES[size] * float(pick(rng, (0.93, 1.0, 1.07)))
        centre = _free_centre(rng, diameter, objects)
        if centre:
            angle, mirrored = int(pick(rng, (-10, 0, 10))), bool(rng.integers(2))
            objects.append(SceneObject(shape, colour, size, fill, centre, diameter, angle, mirrored))
    return Scene(
        objects=tuple(objects),
        background=pick(rng, _fitting_backgrounds(objects)),
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


def _free_centre(rng: np.random.Generator, diameter: float, objects: list[SceneObject]) -> tuple[float, float] | None:
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
class Mention:
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


def _mention(scene: Scene, group: list[SceneObject], rng: np.random.Generator, says_colour: float, detail: float) -> Mention:
    """Name a group; its colour and, with probability ``detail`` each, size and fill are said by chance.

    Where another object has the same shape, the colour is always said.
    """
    item = group[0]
    shape_is_shared = any(other.shape == item.shape and other.colour != item.colour for other in scene.objects)
    return Mention(
        shape=item.shape,
        colour=item.colour if shape_is_shared or rng.random() < says_colour else None,
        size=item.size if rng.random() < detail else None,
        fill=item.fill if rng.random() < detail and (item.fill != "plain" or rng.random() < 0.2) else None,
        number=len(group),
        determiner=str(rng.choice(("a", "one", "the"), p=(0.7, 0.15, 0.15))),
    )


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _relate(groups: list[list[SceneObject]], mentions: list[Mention], rng: np.random.Generator) -> str | None:
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
    phrase = pick(rng, BACKGROUNDS[background].phrases) if background else ""
    if phrase and rng.random() < 0.2:
        return f"{phrase}, {pick(rng, (body, there_is))}"
    sentence = pick(rng, (body, body, f"a picture of {body}", f"a photo of {body}", there_is))
    return f"{sentence} {phrase}".rstrip()


def _partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of one group alone, sometimes of its colour alone ("a red object")."""
    group = pick(rng, _groups(scene))
    mention = _mention(scene, group, rng, says_colour=0.7, detail=0.3)
    if len(group) == len(scene.objects) and mention.colour and rng.random() < 0.6:
        mention = replace(mention, shape=None)
    return _phrase(str(mention), mention.number > 1, scene.background if rng.random() < 0.3 else None, rng)


def full_caption(
    scene: Scene, rng: np.random.Generator, says_colour: float, details: tuple[float, ...], says_background: float
) -> str:
    """A caption that names all objects, with as much of ``details`` (tried in order) as fits the word limit."""
    for detail in (*details, 0.0):
        groups = _groups(scene)
        order = rng.permutation(len(groups))
        groups = [groups[index] for index in order]
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
    return full_caption(scene, rng, says_colour=0.85, details=(0.5, 0.3, 0.15), says_background=0.6)
