"""Emoji with captions in two drawing styles, from the npm packages emoji-datasource-google and emoji-datasource-twitter.

A fifth of the emoji of each subcategory of Unicode is held out, in both styles.
"""

import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from training.study.pair_files import Sample, as_json, read_package, share

SIDE = 72  # pixels of a white square, in which the picture has 64
HELD_OUT = 0.2  # of the emoji of a subcategory
TEST_EMOJI_PER_CLASS = 20
TRAIN_EMOJI_PER_CLASS = 16  # of the pictures for a linear probe
LEAST_HELD_OUT = 2  # emoji of a class

# Subcategories whose last word does not name them.
NAMES = {
    "alphanum": "letter or number button",
    "animal-marine": "sea animal",
    "arts & crafts": "arts and crafts",
    "av-symbol": "media control button",
    "award-medal": "medal",
    "body-parts": "body part",
    "book-paper": "book or paper",
    "cat-face": "cat face",
    "country-flag": "country flag",
    "currency": "currency symbol",
    "emotion": "emotion symbol",
    "event": "celebration",
    "face-affection": "affectionate face",
    "face-concerned": "worried or sad face",
    "face-costume": "monster or costume face",
    "face-glasses": "face with glasses",
    "face-hand": "face with a hand",
    "face-hat": "face with a hat",
    "face-negative": "angry face",
    "face-neutral-skeptical": "neutral or skeptical face",
    "face-sleepy": "sleepy face",
    "face-smiling": "smiling face",
    "face-tongue": "face with tongue out",
    "face-unwell": "sick face",
    "family": "family or couple",
    "food-asian": "asian food",
    "food-prepared": "prepared food",
    "food-sweet": "sweet dessert",
    "gender": "gender symbol",
    "geometric": "coloured shape",
    "hand-fingers-closed": "closed hand",
    "hand-fingers-open": "open hand",
    "hand-fingers-partial": "hand sign",
    "hand-prop": "hand with an object",
    "hand-single-finger": "pointing hand",
    "hands": "pair of hands",
    "household": "household item",
    "light & video": "light or camera",
    "math": "math symbol",
    "medical": "medical item",
    "monkey-face": "monkey face",
    "musical-instrument": "musical instrument",
    "office": "office supply",
    "person-activity": "person doing an activity",
    "person-fantasy": "fantasy character",
    "person-gesture": "person making a gesture",
    "person-resting": "resting person",
    "person-role": "person with a job",
    "person-sport": "person doing sport",
    "person-symbol": "person symbol",
    "place-geographic": "landscape",
    "place-other": "place",
    "place-religious": "religious building",
    "plant-other": "plant",
    "punctuation": "punctuation mark",
    "religion": "religious symbol",
    "science": "scientific instrument",
    "sky & weather": "sky and weather",
    "sound": "sound device",
    "sport": "sports equipment",
    "subdivision-flag": "subdivision flag",
    "time": "clock",
    "transport-air": "aircraft",
    "transport-ground": "ground vehicle",
    "transport-sign": "transport sign",
    "transport-water": "boat",
    "warning": "warning sign",
    "writing": "writing tool",
    "zodiac": "zodiac sign",
}
TEMPLATES = ("{c} emoji", "an emoji of a {c}", "a {c} icon", "a small picture of a {c}", "an emoji showing a {c}")

# Code points and words that tell the man, the woman and the person of one emoji apart, or join parts.
PERSONS = {"1f468", "1f469", "1f9d1", "2640", "2642", "200d", "fe0f"}
PERSON_WORDS = set("adult boy girl female females male males man mans men mens person woman womans women womens".split())


@dataclass(frozen=True)
class Emoji:
    """An emoji: what its package says of it, and a picture in each style as the pixels of a white square."""

    about: dict[str, Any]
    pictures: dict[str, Image.Image]

    @property
    def codepoints(self) -> str:
        return self.about["unified"].lower()

    @property
    def name(self) -> str:
        return self.about["name"].lower()

    @property
    def kind(self) -> str:
        """Its subcategory in plain words."""
        subcategory = self.about["subcategory"]
        return NAMES.get(subcategory, subcategory.rpartition("-")[2])

    def names(self) -> list[str]:
        """Its name and its short names, of which those of flags and of ideographs are left out, as they are codes."""
        short = [] if self.about["category"] == "Flags" else self.about["short_names"]
        short = [re.sub(r"[_-]+", " ", name) for name in short if not re.fullmatch("u[0-9a-f]{4}", name)]
        return list(dict.fromkeys([self.name, *short]))

    def captions(self) -> list[str]:
        names = self.names()
        category = self.about["category"].lower().replace("&", "and")
        ends = [f"{names[0]} emoji, {self.kind}", f"{names[-1]} emoji from the {category} group"]
        return [*(f"{name} emoji" for name in names[:2]), *ends]

    def keys(self) -> Iterable[str]:
        """What it shares with its variants: code points or words without persons, or a picture."""
        yield "-".join(code for code in self.codepoints.split("-") if code not in PERSONS)
        yield " ".join(word for word in re.findall(r"\w+", self.name) if word not in PERSON_WORDS)
        for picture in self.pictures.values():
            yield hashlib.sha256(picture.tobytes()).hexdigest()


def on_white(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as picture:
        drawn = picture.convert("RGBA")
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    white.alpha_composite(drawn, ((SIDE - drawn.width) // 2, (SIDE - drawn.height) // 2))
    return white.convert("RGB")


def read_emoji(packages: dict[str, Path]) -> list[Emoji]:
    """The emoji that have a picture in each style, without skin tones, in the order of their hashes."""
    pictures: dict[str, dict[str, bytes]] = {}
    for style, file in packages.items():
        pictures[style] = dict(read_package(file, rf"package/img/{style}/64/(.+\.png)"))
    ((_, table),) = read_package(next(iter(packages.values())), r"package/(emoji\.json)")
    whole = [
        Emoji(about, {style: on_white(files[about["image"]]) for style, files in pictures.items()})
        for about in json.loads(table)
        if about["category"] != "Component" and all(about["image"] in files for files in pictures.values())
    ]
    return sorted(whole, key=lambda emoji: share(emoji.codepoints))


def groups_of_variants(all_emoji: list[Emoji]) -> list[list[Emoji]]:
    """Emoji that share a key are one group, and so are groups that share one."""
    group_of: dict[str, list[Emoji]] = {}
    for emoji in all_emoji:
        keys = list(emoji.keys())
        joined = {id(group_of[key]): group_of[key] for key in keys if key in group_of}
        group = [emoji, *(member for group in joined.values() for member in group)]
        for member in group:
            group_of.update(dict.fromkeys(member.keys(), group))
    return list({id(group): group for group in group_of.values()}.values())


def held_out_of(all_emoji: list[Emoji]) -> set[str]:
    """The code points of the emoji that are held out: whole groups, as many of each subcategory as there is room for."""
    sizes: dict[str, int] = defaultdict(int)
    for emoji in all_emoji:
        sizes[emoji.kind] += 1
    room = {kind: round(HELD_OUT * size) for kind, size in sizes.items()}
    held_out: set[str] = set()
    for group in sorted(groups_of_variants(all_emoji), key=lambda group: min(share(emoji.codepoints) for emoji in group)):
        kind = group[0].kind
        if len(group) <= room[kind]:
            room[kind] -= len(group)
            held_out |= {emoji.codepoints for emoji in group}
    return held_out


def encode(picture: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, quality=90)  # PNG has no quality
    return content.getvalue()


def training_samples(emoji: list[Emoji]) -> list[Sample]:
    """A sample of each style as `png`, `txt` and `json`, which has all captions, in an order that mixes them."""
    samples: dict[str, Sample] = {}
    for each in emoji:
        captions = each.captions()
        about = {"captions": captions, "name": each.name, "codepoints": each.codepoints}
        about |= {key: each.about[key] for key in ("category", "subcategory")}
        for style, picture in each.pictures.items():
            key = f"{style} {each.codepoints}"
            caption = captions[int(share(f"caption {key}") * len(captions))].encode()
            samples[key] = {"png": encode(picture, "PNG"), "txt": caption, "json": as_json(about | {"style": style})}
    return [samples[key] for key in sorted(samples, key=share)]


def retrieval_samples(emoji: list[Emoji], known: set[str]) -> list[Sample]:
    """Pictures of the first style with three to five captions each, of which none is known or stands twice."""
    samples = []
    for each in emoji:
        wanted = [*(f"{name} emoji" for name in each.names()[:2]), *each.captions()[-2:], f"an emoji of {each.name}"]
        captions = [caption for caption in dict.fromkeys(wanted) if caption not in known]
        if len(captions) >= 3:
            known = known.union(captions)
            picture = next(iter(each.pictures.values()))
            samples.append({"png": encode(picture, "PNG"), "txt": "\n".join(captions).encode()})
    return samples


def class_samples(emoji: list[Emoji], classes: list[str], per_class: int) -> list[Sample]:
    """Pictures of both styles as `webp` and `cls`, of at most so many emoji of each class."""
    samples = []
    for label, name in enumerate(classes):
        for each in [member for member in emoji if member.kind == name][:per_class]:
            samples += [{"cls": str(label).encode(), "webp": encode(picture, "WEBP")} for picture in each.pictures.values()]
    return samples


@dataclass(frozen=True)
class EmojiSets:
    """The samples of training, retrieval, and of both splits of the classification."""

    train: list[Sample]
    retrieval: list[Sample]
    classes: list[str]
    categories: dict[str, list[Sample]]
    held_out: list[str]


def emoji_sets(packages: dict[str, Path]) -> EmojiSets:
    """The sets of the packages of styles; the first style is that of retrieval."""
    all_emoji = read_emoji(packages)
    names = held_out_of(all_emoji)
    held_out = [emoji for emoji in all_emoji if emoji.codepoints in names]
    known = [emoji for emoji in all_emoji if emoji.codepoints not in names]
    kinds = [emoji.kind for emoji in held_out]
    classes = sorted(kind for kind in set(kinds) if kinds.count(kind) >= LEAST_HELD_OUT)
    return EmojiSets(
        train=training_samples(known),
        retrieval=retrieval_samples(held_out, {caption for emoji in known for caption in emoji.captions()}),
        classes=classes,
        categories={
            "test": class_samples(held_out, classes, TEST_EMOJI_PER_CLASS),
            "train": class_samples(known, classes, TRAIN_EMOJI_PER_CLASS),
        },
        held_out=sorted(names),
    )
