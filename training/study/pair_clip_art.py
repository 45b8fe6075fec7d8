"""Clip art with captions, from the Open Clip Art Library as Debian packages it.

Pictures come from the one package, titles and keywords from the drawings in the other.
"""

import hashlib
import html
import io
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from training.study.pair_files import Sample, as_json, read_package, share

LONGEST_SIDE = 160  # pixels
SHORTEST_SIDE = 15
MOST_PIXELS = 25_000_000  # of a picture that is opened
HELD_OUT = 0.1  # of the titles, which are about 8 % of the pictures
PICTURES_PER_TITLE = 10
PICTURES_PER_COLLECTION = 2  # a title of more pictures than that names a collection, and tells nothing of any of them

# Icons of themes have the names of programs, and two authors wrote titles in Italian and French.
LEFT_OUT = re.compile(r".*-theme/.*")
AUTHORS_LEFT_OUT = ("rollandin", "guillou")

# What a drawing is, by its folder, where titles seldom say it.
NOUNS = {
    "arrows": "arrow",
    "callouts": "callout",
    "cards": "playing card",
    "clocks": "clock",
    "flags": "flag",
    "flowchart": "flowchart symbol",
    "jigsaw": "jigsaw piece",
    "led": "light",
    "map_symbols": "map symbol",
    "patterns": "pattern",
    "roadsigns": "road sign",
    "smilies": "smiley",
    "stars": "star",
    "stickmen": "stick man",
}
JUNK = set("aiga aj art bb bwh clip clipart cm elements hash illustration image magick rpg svg symbol theme unsorted".split())
JUNK |= {"openclipart", "untitled"}
# Keywords that say nothing about one drawing.
GENERIC = set("appicon,geometry,icon,icons,mapsym,mathsymbol,miscellany,networksym,shape,shapes,sign".split(","))
GENERIC |= {"signs and", "signs and symbols", "united nations member"}
# Words in which near variants of one drawing differ, such as its black-and-white copy.
VARIANT_WORDS = set("and black blue brown colour dark flat gray green grey light of orange pink purple red simple the".split())
VARIANT_WORDS |= {"aqua", "seagreen", "white", "yellow"}
PHRASINGS = ("{title}", "clip art of {title}", "{title} illustration")
PHRASINGS_WITH_KEYWORDS = ("{title}, {first}", "{title} ({first})", "{title}, {keywords}", *PHRASINGS)


@dataclass(frozen=True)
class Drawing:
    """What a drawing's file says about it."""

    title: str
    keywords: tuple[str, ...]
    author: str
    is_usable: bool  # in the public domain by its own word, and whole without pictures that it links to

    @classmethod
    def read(cls, content: bytes) -> "Drawing":
        text = content.decode("utf-8", errors="replace")

        def found(pattern: str) -> list[str]:
            return [" ".join(html.unescape(value).split()) for value in re.findall(pattern, text, flags=re.DOTALL)]

        title = found(r"<dc:title[^>]*>([^<]*)</dc:title>")
        author = found(r"<dc:creator>.*?<dc:title[^>]*>([^<]*)</dc:title>")
        is_public = bool(re.search(r'<cc:license rdf:resource="[^"]*public_?domain', text, flags=re.IGNORECASE))
        links = found(r'<image\b[^>]*?xlink:href="(?!data:)([^"]*)"')
        keywords = tuple(found(r"<rdf:li[^>]*>([^<]*)</rdf:li>"))
        return cls(title[0] if title else "", keywords, author[0].lower() if author else "", is_public and not links)


def words_of(text: str) -> list[str]:
    """The words of a title, keyword or file name in lower case, without numbers, single letters and junk."""
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower().replace("_", " ")
    text = re.sub(r"\b(b ?& ?w|b and w|bw)\b", "black and white", text)
    words = [word.strip("0123456789") for word in re.findall(r"\w+(?:'\w+)?", text)]
    return [word for word in words if len(word) > 1 and not re.search(r"\d", word) and word not in JUNK]


def title_of(source: str, drawing: Drawing, is_collection: bool) -> str:
    """A title in words: the drawing's own or, of a collection, the file's name without its author; with the folder's noun."""
    words = [] if is_collection else words_of(re.sub(r"^clipart by .*? - ", "", drawing.title, flags=re.IGNORECASE))
    if not words:
        words = words_of(Path(source).stem)
        authors = re.findall(r"\w+", drawing.author)
        while words and any(name.startswith(words[-1]) for name in authors):  # file names cut the author's name
            words.pop()
    nouns = [NOUNS[folder] for folder in source.split("/") if folder in NOUNS]
    if nouns and words and not set(words) & set(nouns[-1].split()):
        words += nouns[-1].split()
    return " ".join(words)


def keywords_of(source: str, drawing: Drawing, title: str) -> list[str]:
    """At most two keywords, of up to two words each, that add something to the title."""
    known = [*title.split(), *re.findall(r"\w+", drawing.author)]

    def adds_something(keyword: str) -> bool:
        repeats = any(word in keyword.split() or (len(word) > 3 and word in keyword) for word in known)
        return bool(keyword) and keyword not in GENERIC and keyword.count(" ") < 2 and not repeats

    cleaned = dict.fromkeys(" ".join(words_of(keyword)) for keyword in drawing.keywords)
    return sorted(filter(adds_something, cleaned), key=lambda keyword: share(source + keyword))[:2]


def caption_of(source: str, title: str, keywords: list[str]) -> str:
    phrasings = PHRASINGS_WITH_KEYWORDS if keywords else PHRASINGS
    phrasing = phrasings[int(share(f"phrasing {source}") * len(phrasings))]
    return phrasing.format(title=title, first="".join(keywords[:1]), keywords=", ".join(keywords))


def as_jpeg(content: bytes) -> bytes | None:
    """A picture over white, not enlarged, or None where it is blank, tiny or huge."""
    width, height = struct.unpack_from(">II", content, 16)  # of the PNG, before Pillow warns of its size
    if width * height > MOST_PIXELS:
        return None
    with Image.open(io.BytesIO(content)) as picture:
        drawn = picture.convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    white.alpha_composite(drawn)
    small = white.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    if min(small.size) < SHORTEST_SIDE or all(high - low < 8 for low, high in small.getextrema()):
        return None
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue()


def read_clip_art(pictures: Path, drawings: Path) -> dict[str, tuple[str, Drawing, bytes]]:
    """The title, the drawing and the JPEG of all usable pictures, by their path inside the collection."""
    about = {name: Drawing.read(content) for name, content in read_package(drawings, r"usr/share/openclipart/svg/(.+)\.svg")}
    uses = Counter(drawing.title for drawing in about.values())
    found = {}
    for source, content in read_package(pictures, r"usr/share/openclipart/png/(.+)\.png"):
        drawing = about.get(source)
        if not drawing or not drawing.is_usable or LEFT_OUT.match(source) or drawing.author.endswith(AUTHORS_LEFT_OUT):
            continue
        title = title_of(source, drawing, uses[drawing.title] > PICTURES_PER_COLLECTION)
        jpeg = as_jpeg(content) if title else None
        if jpeg:
            found[source] = (title, drawing, jpeg)
    return found


def is_held_out(title: str) -> bool:
    """Whether a title is held out, as all of its variants are then."""
    return share(" ".join(sorted(set(title.split()) - VARIANT_WORDS)) or title) < HELD_OUT


def clip_art(pictures: Path, drawings: Path) -> dict[str, list[Sample]]:
    """The samples of `train` and `val`, as `jpg`, `txt` and `json`, in an order that mixes the folders."""
    samples: dict[str, list[Sample]] = {"train": [], "val": []}
    found = read_clip_art(pictures, drawings)
    seen: set[bytes] = set()
    uses: Counter[str] = Counter()
    for source in sorted(found, key=share):
        title, drawing, jpeg = found[source]
        split = "val" if is_held_out(title) else "train"
        content = hashlib.sha256(jpeg).digest()
        # A title of val stands for one picture, so that a caption there has one right answer.
        if content in seen or uses[title] == (1 if split == "val" else PICTURES_PER_TITLE):
            continue
        seen.add(content)
        uses[title] += 1
        keywords = keywords_of(source, drawing, title)
        about = {"title": title, "keywords": keywords, "category": source.split("/")[0], "source": f"{source}.png"}
        samples[split].append({"jpg": jpeg, "txt": caption_of(source, title, keywords).encode(), "json": as_json(about)})
    train_captions = {sample["txt"] for sample in samples["train"]}
    samples["val"] = [sample for sample in samples["val"] if sample["txt"] not in train_captions]
    return samples
