"""SugarCrepe (arXiv 2306.14610): COCO's pictures with true captions and false ones of the same words."""

import json
from functools import partial
from pathlib import Path

from PIL import Image

from ...data.decoding import SkippedSample, decode_image
from ...data.scene_sets import COMPOSITIONALITY_KINDS
from ...errors import fail
from ..encoder import ImageSet
from ..pixels import NamedPicture
from ..tasks import Evaluation, compositionality

WHERE = "https://raw.githubusercontent.com/RAIVNLab/sugar-crepe/main/data"
PICTURES = "http://images.cocodataset.org/zips/val2017.zip"


def file_name(kind: str) -> str:
    """SugarCrepe's file of a kind of false captions: `replace_object` is `replace_obj.json`."""
    change, _, what = kind.partition("_")
    return f"{change}_{what[:3]}.json"


def sugar_crepe(folder: Path) -> list[Evaluation]:
    """Its seven splits: JSON files beside COCO's pictures in `val2017/`. Raises ConfigError where something is missing."""
    for kind in COMPOSITIONALITY_KINDS:
        if not (folder / file_name(kind)).is_file():
            fail(f"{folder}: has no {file_name(kind)} ({WHERE}/{file_name(kind)})")
    return [sugar_crepe_kind(folder, kind) for kind in COMPOSITIONALITY_KINDS]


def sugar_crepe_kind(folder: Path, kind: str) -> Evaluation:
    """The evaluation of one kind of false captions. Raises ConfigError for another form of file, or missing pictures."""
    return compositionality(kind, str(folder), sugar_crepe_split(folder / file_name(kind)))


def sugar_crepe_split(file: Path) -> ImageSet:
    """Pictures of COCO's `val2017/` beside one of SugarCrepe's JSON files, with their true and false captions.

    Raises:
        ConfigError: the file has another form, or pictures are missing.
    """
    try:
        rows = [
            (r["filename"], r["caption"], r["negative_caption"]) for r in json.loads(file.read_text(encoding="utf-8")).values()
        ]
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        fail(f"{file}: is none of SugarCrepe's files ({type(error).__name__}: {error})")
    folder = file.parent / "val2017"
    absent = [name for name, _, _ in rows if not (folder / name).is_file()]
    if absent:
        fail(f"{folder}: {len(absent)} of {len(rows)} pictures are missing, the first is {absent[0]}")
    samples = [(NamedPicture(name, partial(_open_picture, folder / name)), (true, false)) for name, true, false in rows]
    return ImageSet(samples, fingerprint=f"{file} {file.stat().st_mtime_ns} {folder.stat().st_mtime_ns}")


def _open_picture(path: Path) -> Image.Image | None:
    try:
        return decode_image(path.read_bytes())
    except SkippedSample:
        return None
