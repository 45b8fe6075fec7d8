"""A parser of the scenes' captions of its own: it must understand every word, and what it reads is compared with the objects
and coordinates of the scene."""

import re

import numpy as np

from hf_maskclip.data.scene_backgrounds import BACKGROUNDS
from hf_maskclip.data.scene_drawing import COLOURS, FILLS, SHAPES, SIZES

PLURALS = {noun: {"box": "boxes", "fish": "fish"}.get(noun, noun + "s") for noun in (*SHAPES, "object")}
SINGULARS = {plural: shape for shape, plural in PLURALS.items()}
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
DIRECTIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
MENTION = re.compile(
    rf"\b(?P<determiner>an?|the|{'|'.join(COUNTS)})"
    rf"(?: (?P<size>{'|'.join(SIZES)}))?(?: (?P<fill>{'|'.join(FILLS)}))?(?: (?P<colour>{'|'.join(COLOURS)}))?"
    rf" (?P<noun>{'|'.join((*PLURALS.values(), *PLURALS))})\b"
)


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
    assert mentions, caption
    assert mentions[0].start() == 0, caption
    assert mentions[-1].end() == len(body), caption
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
