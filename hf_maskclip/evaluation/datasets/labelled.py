"""Pictures with labels: image folders and Hub data sets, whose labels 🤗 Datasets knows by name."""

import logging
from pathlib import Path
from typing import Any

import datasets

from ...data.decoding import PairDecoder, sample_key
from ...data.folders import SPLITS
from ...errors import as_config_error, fail
from ..encoder import ImageSet
from ..labels import class_label
from ..tasks import ClassificationData, Rows, choose_templates, hash_of, lines_of_file

logger = logging.getLogger(__name__)

WHOLE = "all"  # the split of a folder that has no splits


def labelled_data(data: str, split: str, class_names_file: str = "", templates_file: str = "") -> ClassificationData:
    """An image folder (`SPLIT/CLASS/picture.jpg`, or `CLASS/picture.jpg`) or a Hub data set.

    Raises:
        ConfigError: it cannot be loaded, or has no labels.
    """
    folders = sorted(path.name for path in Path(data).iterdir() if path.is_dir()) if Path(data).is_dir() else []
    is_whole = bool(folders) and split not in folders and not _names_of_splits(folders)
    if is_whole:
        split, files = WHOLE, {WHOLE: f"{data}/**"}
        logger.warning("%s: has no splits; its folders %s are taken for the classes of one", data, ", ".join(folders[:5]))
    else:  # all splits at once, so that a class has one index in all of them, also where one split lacks it
        files = {name: f"{data}/{name}/**" for name in folders}

    def open_split(split: str) -> datasets.IterableDataset:
        with as_config_error("data", data):
            if not files:
                return datasets.load_dataset(data, split=split, streaming=True)
            if split not in files:
                fail(f"split={split!r}: {data} has the folders {', '.join(files)}; pictures are looked for in {split}/CLASS/")
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

        def label_of(row: dict[str, Any]) -> int:
            return class_label(row[field], len(class_names), f"{data}: sample {sample_key(row)!r}")

        rows = Rows([stream], label_of, PairDecoder(image_key=pictures[0]), data)
        return ImageSet(rows, _fingerprint(data, split), rows.check) if files else ImageSet(rows)

    only_split = WHOLE if is_whole else ""
    return ClassificationData(Path(data).name, data, images, class_names, templates, source, only_split=only_split)


def _names_of_splits(folders: list[str]) -> list[str]:
    known = {name for names in SPLITS.values() for name in names}
    return [name for name in folders if name.lower() in known]


def _fingerprint(data: str, split: str) -> str:
    """A hash that changes whenever a file of the split does."""
    root = Path(data) if split == WHOLE else Path(data) / split
    found = [(str(path.relative_to(root)), path.stat()) for path in sorted(root.rglob("*")) if path.is_file()]
    return hash_of([data, split, *(f"{name} {about.st_size} {about.st_mtime_ns}" for name, about in found)])
