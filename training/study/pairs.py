"""Make the two real image-text sets of the study, clip art and emoji, from public packages.

    python -m training.study.pairs --output_dir runs/pairs

Debian's apt-get and npm fetch the packages into <output_dir>/packages. Without such a tool, put its two files there by hand:

    openclipart-png, openclipart-svg                      1:0.18+dfsg-19    .deb
    emoji-datasource-google, emoji-datasource-twitter     16.0.0            .tgz

A file of another SHA256 than the one in this program is refused. Draws and orders are hashes of names, so nothing is random.

clipart/train-*.tar, clipart/val-000000.tar: jpg, txt, json
    Pictures lie over white. Their longest side is at most 160 pixels, the quality of their JPEG is 90.
    Blank, tiny, huge and equal pictures are left out. So are icons of themes, two authors with titles in Italian and French,
    and drawings that lack a linked picture or do not say that they are in the public domain.
    A title is the drawing's, without numbers and junk words. One that more than two drawings share names a collection, and the
    file's name takes its place. Some folders add a noun, such as "flag". A title has at most ten pictures.
    A caption is the title, with or without keywords, in one of six phrasings.
    A tenth of the titles is held out, a picture each. Titles that differ in colours or order alone stay together.
emoji/train-*.tar: png, txt, json, which has all captions of the emoji
    Pictures have 64 pixels, on a white square of 72, in two styles. Skin tones are left out.
    Captions are in lower case, such as "violin emoji" and "violin emoji, musical instrument".
    A fifth of the emoji of each subcategory of Unicode is held out, in both styles. Emoji that are drawn alike stay together,
    and so do the man, the woman and the person of one emoji.
emoji/wds_emoji_categories: classification in clip-benchmark's layout
    Classes are subcategories of two or more held-out emoji. Pictures are WebP of quality 90. Its train is for linear probes.
emoji/wds_emoji_retrieval: retrieval in clip-benchmark's layout
    Held-out emoji in Google's style have three to five captions each. No caption stands twice.

The same packages and the same Pillow give the same bytes. The Open Clip Art Library is in the public domain. Noto Emoji has the
Apache License 2.0, Twemoji has CC-BY 4.0, and the names of emoji have the MIT License. README.txt says whose they are.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from hf_maskclip.errors import ConfigError, as_config_error
from training.study.pair_clip_art import clip_art
from training.study.pair_emoji import TEMPLATES, emoji_sets
from training.study.pair_files import Package, write_benchmark, write_shards

PACKAGES = {
    "pictures": Package(
        ("apt-get", "download", "openclipart-png=1:0.18+dfsg-19"),
        "openclipart-png_*0.18+dfsg-19_all.deb",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    ),
    "drawings": Package(
        ("apt-get", "download", "openclipart-svg=1:0.18+dfsg-19"),
        "openclipart-svg_*0.18+dfsg-19_all.deb",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    ),
    "google": Package(
        ("npm", "pack", "emoji-datasource-google@16.0.0"),
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "twitter": Package(
        ("npm", "pack", "emoji-datasource-twitter@16.0.0"),
        "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
}
STYLES = ("google", "twitter")

LICENCES = """Image-text pairs of real pictures, made by training/study/pairs.py of hf_maskclip.

clipart: pictures, titles and keywords of the Open Clip Art Library 0.18, which their authors put into the public domain.
emoji, style google: Noto Emoji, copyright Google LLC, Apache License 2.0.
emoji, style twitter: Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0; here placed on white and encoded anew.
emoji, names and groups: emoji-datasource 16.0.0, copyright Cal Henderson, MIT License.
"""


def make_pairs(output_dir: Path, packages: Mapping[str, Package] = PACKAGES) -> str:
    """Fetch the packages and write both sets.

    Returns:
        What was written, as one line.

    Raises:
        ConfigError: a package that cannot be had or is another one, or a folder that cannot be written.
    """
    with as_config_error("output_dir", output_dir):
        folder = output_dir / "packages"
        folder.mkdir(parents=True, exist_ok=True)
        (output_dir / "README.txt").write_text(LICENCES, encoding="utf-8")
    files = {name: package.fetch(folder) for name, package in packages.items()}
    parts = [_write_clip_art(output_dir / "clipart", files), _write_emoji(output_dir / "emoji", files)]
    return f"{'; '.join(parts)}: {output_dir}"


def _write_clip_art(folder: Path, files: Mapping[str, Path]) -> str:
    sets = clip_art(files["pictures"], files["drawings"])
    for split, samples in sets.items():
        write_shards(folder, split, samples, "clipart")
    return f"clip art: {len(sets['train'])} pairs of training, {len(sets['val'])} held out"


def _write_emoji(folder: Path, files: Mapping[str, Path]) -> str:
    sets = emoji_sets({style: files[style] for style in STYLES})
    write_shards(folder, "train", sets.train, "emoji")
    texts = {"classnames.txt": sets.classes, "zeroshot_classification_templates.txt": TEMPLATES}
    write_benchmark(folder / "wds_emoji_categories", texts, sets.categories)
    write_benchmark(folder / "wds_emoji_retrieval", {"dataset_type.txt": ["retrieval"]}, {"test": sets.retrieval})
    (folder / "heldout_codepoints.txt").write_text("\n".join(sets.held_out) + "\n", encoding="utf-8")
    in_classes = f"{len(sets.categories['test'])} held out in {len(sets.classes)} classes"
    return f"emoji: {len(sets.train)} pairs of training, {in_classes}, {len(sets.retrieval)} for retrieval"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="gets packages/, clipart/, emoji/ and README.txt")
    try:
        print(make_pairs(parser.parse_args(arguments).output_dir))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
