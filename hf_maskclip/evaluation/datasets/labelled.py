"""Pictures with labels: image folders and Hub data sets, whose labels 🤗 Datasets knows by name."""

from pathlib import Path
from typing import Any

import datasets

from ...data.decoding import PairDecoder, sample_key
from ...errors import as_config_error, fail
from ..encoder import ImageSet
from ..labels import class_label
from ..tasks import ClassificationData, Rows, check_targets, choose_templates, lines_of_file


def labelled_data(data: str, split: str, class_names_file: str = "", templates_file: str = "") -> ClassificationData:
    """An image folder (`SPLIT/CLASS/picture.jpg`) or a Hub data set, whose labels 🤗 Datasets knows by name.

    Raises:
        ConfigError: it cannot be loaded, or has no labels.
    """

    splits = sorted(path.name for path in Path(data).iterdir() if path.is_dir()) if Path(data).is_dir() else []

    def open_split(split: str) -> datasets.IterableDataset:
        with as_config_error("data", data):
            if not splits:
                return datasets.load_dataset(data, split=split, streaming=True)
            if split not in splits:
                fail(f"split={split!r}: {data} has the folders {', '.join(splits)}; pictures are looked for in {split}/CLASS/")
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

        def label_of(row: dict[str, Any]) -> int:
            return class_label(row[field], len(class_names), f"{data}: sample {sample_key(row)!r}")

        rows = Rows([stream], label_of, PairDecoder(image_key=pictures[0]), data)
        if splits:  # on a disk
            check_targets(rows)
        return ImageSet(rows)

    return ClassificationData(Path(data).name, data, images, class_names, templates, source)
