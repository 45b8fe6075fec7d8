"""The evaluations that options name: of clip-benchmark's folders, image folders, Hub data sets, SugarCrepe, and pairs."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from hf_maskclip.evaluation import ImageSet
from hf_maskclip.evaluation.linear_probe import Solver
from training.clip_benchmark_layout import ClipBenchmarkFolder, find_clip_benchmark_folder
from training.data import PairDecoder, decode_image, first_pair
from training.errors import fail, naming
from training.evaluation_sets import (
    ClassificationData,
    Evaluation,
    Rows,
    choose_templates,
    compositionality,
    lines_of_file,
    retrieval,
)
from training.skipping import SkippedSample
from training.sources import TAR_SUFFIXES, expand_braces, open_stream

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------ what options name


def evaluations_of_spec(spec: str, decoder: PairDecoder, split: str = "test") -> list[Evaluation]:
    """One evaluation for each folder that the braces of `spec` lead to, named after it.

    A clip-benchmark folder is what its files say it is; all else is retrieval. Data is opened here, so that a wrong name is
    found before anything long starts, and read anew at each evaluation.

    Raises:
        ConfigError: data that is not there or cannot be used; two folders of one name.
    """
    by_folder: dict[Path, list[str]] = {}
    for path in expand_braces(spec):
        is_file = path.endswith((*TAR_SUFFIXES, ".parquet"))
        by_folder.setdefault(Path(path).parent if is_file else Path(path), []).append(path)
    evaluations = [_evaluation_of_folder(folder, paths, decoder, split) for folder, paths in by_folder.items()]
    names = [evaluation.name for evaluation in evaluations]
    if repeated := [name for name in names if names.count(name) > 1]:
        fail(f"{spec!r}: two evaluations would be named {repeated[0]}; rename a folder")
    return evaluations


def _evaluation_of_folder(folder: Path, paths: list[str], decoder: PairDecoder, split: str) -> Evaluation:
    found = ClipBenchmarkFolder(str(folder)) if folder.is_dir() and paths == [str(folder)] else None
    if found and found.kind == "retrieval":
        return found.retrieval(split)
    if found and found.text("classnames.txt") is not None:
        return found.classification().zero_shot(split)
    return pairs(folder.name, paths, decoder, split)


def evaluations_of_data(
    data: str,
    task: str,
    split: str,
    decoder: PairDecoder,
    *,
    class_names_file: str = "",
    templates_file: str = "",
    solver: Solver = "gradient_descent",
) -> list[Evaluation]:
    """Those of one data set under one task: one, or the seven of SugarCrepe.

    Args:
        data: a clip-benchmark folder, local or on the Hub; an image folder or Hub data set with labels; for `retrieval` also
            pairs in any form that training takes; for `compositionality` SugarCrepe's JSON files beside COCO's `val2017/`.
        decoder: for pairs.
        class_names_file, templates_file: replace those of the data set; `""`: they do not.
    """
    if task == "compositionality":
        return sugar_crepe(Path(data))
    with naming("data", data):
        folder = find_clip_benchmark_folder(data)
    if task == "retrieval":
        if folder and folder.kind == "retrieval":
            return [folder.retrieval(split)]
        if folder:
            fail(f"data={data!r}: is a data set of classes, and has no captions for retrieval")
        return evaluations_of_spec(data, decoder, split)
    if folder and folder.kind == "retrieval":
        fail(f"data={data!r}: is a retrieval data set, and has no classes for {task}")
    files = {"class_names_file": class_names_file, "templates_file": templates_file}
    labelled = folder.classification(**files) if folder else labelled_data(data, split, **files)
    return [labelled.zero_shot(split) if task == "zero_shot_classification" else labelled.linear_probe(split, solver)]


# ------------------------------------------------------------------------------ labelled folders and Hub data sets


def labelled_data(data: str, split: str, class_names_file: str = "", templates_file: str = "") -> ClassificationData:
    """An image folder (`SPLIT/CLASS/picture.jpg`) or a Hub data set, whose labels 🤗 Datasets knows by name.

    Raises:
        ConfigError: it cannot be loaded, or has no labels.
    """

    splits = sorted(path.name for path in Path(data).iterdir() if path.is_dir()) if Path(data).is_dir() else []

    def open_split(split: str) -> datasets.IterableDataset:
        with naming("data", data):
            if not splits:
                return datasets.load_dataset(data, split=split, streaming=True)
            if split not in splits:
                fail(f"split={split!r}: {data} has {', '.join(splits)}")
            # All splits at once, so that a class has one index in all of them, also where one split lacks it.
            files = {name: f"{data}/{name}/**" for name in splits}
            return datasets.load_dataset("imagefolder", data_files=files, split=split, streaming=True)

    features = open_split(split).features or {}
    labels = {name: feature for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(labels) != 1 or len(pictures) != 1:
        found = f"{', '.join(pictures) or 'none'} of pictures, {', '.join(labels) or 'none'} of class labels"
        fail(f"data={data!r}: has the fields {found}; one of each is needed")
    field, label = next(iter(labels.items()))
    names = [name.replace("_", " ") for name in label.names]
    class_names = lines_of_file(class_names_file) if class_names_file else names
    templates, source = choose_templates(templates_file, None)

    def images(split: str) -> ImageSet:
        stream = open_split(split).cast_column(pictures[0], datasets.Image(decode=False))
        return ImageSet(Rows([stream], lambda row: int(row[field]), PairDecoder(image_key=pictures[0]), data))

    return ClassificationData(Path(data).name, data, images, class_names, templates, source)


# ------------------------------------------------------------------------------------------------ SugarCrepe

SUGAR_CREPE = {
    "replace_object": "replace_obj",
    "replace_attribute": "replace_att",
    "replace_relation": "replace_rel",
    "swap_object": "swap_obj",
    "swap_attribute": "swap_att",
    "add_object": "add_obj",
    "add_attribute": "add_att",
}


def sugar_crepe(folder: Path) -> list[Evaluation]:
    """Its seven splits: JSON files beside COCO's pictures in `val2017/`. Raises ConfigError where something is missing."""
    for stem in SUGAR_CREPE.values():
        if not (folder / f"{stem}.json").is_file():
            fail(f"{folder}: has no {stem}.json (https://github.com/RAIVNLab/sugar-crepe, its folder data)")
    return [
        compositionality(kind, str(folder), sugar_crepe_split(folder / f"{stem}.json")) for kind, stem in SUGAR_CREPE.items()
    ]


def sugar_crepe_split(file: Path) -> ImageSet:
    """Pictures of COCO's `val2017/` beside one of SugarCrepe's JSON files, with their true and false captions.

    Raises:
        ConfigError: the file has another form, or pictures are missing.
    """
    try:
        rows = [(r["filename"], r["caption"], r["negative_caption"]) for r in json.loads(file.read_text()).values()]
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        fail(f"{file}: is none of SugarCrepe's files ({type(error).__name__}: {error})")
    folder = file.parent / "val2017"
    absent = [name for name, _, _ in rows if not (folder / name).is_file()]
    if absent:
        fail(f"{folder}: {len(absent)} of {len(rows)} pictures are missing, the first is {absent[0]}")
    samples = [(partial(_open_picture, folder / name), (true, false)) for name, true, false in rows]
    return ImageSet(samples, fingerprint=f"{file} {file.stat().st_mtime_ns} {folder.stat().st_mtime_ns}")


def _open_picture(path: Path) -> Image.Image | None:
    try:
        return decode_image(path.read_bytes())
    except SkippedSample:
        return None


# ----------------------------------------------------------------------------------------- pairs, as for training


def pairs(name: str, paths: list[str], decoder: PairDecoder, split: str) -> Evaluation:
    """Retrieval among pictures and captions in any form that training takes. A sample without a caption is left out."""
    streams = [open_stream(path, split=split) for path in paths]
    for stream, path in zip(streams, paths, strict=True):
        first_pair(stream, decoder, path)

    def captions(row: dict[str, Any]) -> list[str] | None:
        try:
            return decoder.captions(row)
        except SkippedSample as cause:
            logger.warning("%s: evaluation leaves out %s (%s)", name, row.get("__key__"), cause)
            return None

    return retrieval(name, ",".join(paths), ImageSet(Rows(streams, captions, decoder, name)), split)
