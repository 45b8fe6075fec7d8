"""Evaluations of folders in clip-benchmark's layout."""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np

from ...data.clip_benchmark import ClipBenchmarkFolder
from ...data.decoding import PairDecoder
from ...data.sources import open_files
from ...errors import fail
from ..encoder import ImageSet
from ..labels import class_label, multi_hot_label
from ..tasks import ClassificationData, Evaluation, Rows, choose_templates, lines_of_file, retrieval, split_lines


def classification(folder: ClipBenchmarkFolder, class_names_file: str = "", templates_file: str = "") -> ClassificationData:
    """A folder's pictures with classes. Raises ConfigError where it has no `classnames.txt` and none is given."""
    own_names = folder.text("classnames.txt")
    if class_names_file:
        class_names = lines_of_file(class_names_file)
    elif own_names is not None:
        class_names = split_lines(own_names)
    else:
        fail(f"{folder.root}: has no classnames.txt")
    templates, source = choose_templates(templates_file, folder.text("zeroshot_classification_templates.txt"))
    is_multi_label = folder.kind == "multilabel"
    target = partial(multi_hot if is_multi_label else class_index, num_classes=len(class_names), source=folder.root)

    def images(split: str) -> ImageSet:
        return _images(folder, split, target)

    return ClassificationData(folder.name, folder.root, images, class_names, templates, source, is_multi_label)


def captioned(folder: ClipBenchmarkFolder, split: str = "test") -> Evaluation:
    """Retrieval in a folder whose pictures have captions."""
    return retrieval(folder.name, folder.root, _images(folder, split, captions_by_line), split)


def _images(folder: ClipBenchmarkFolder, split: str, target: Callable[[dict[str, Any]], Any]) -> ImageSet:
    """The pictures of a split: `target` is that of [`Rows`]."""
    shards = folder.shards(split)
    rows = Rows([open_files(shard) for shard in shards], target, PairDecoder(), folder.root)
    return ImageSet(rows, folder.fingerprint(split, shards), rows.check)


def class_index(row: dict[str, Any], num_classes: int, source: str) -> int:
    sample = f"{source}: sample {row.get('__key__')!r}"
    if "cls" not in row:
        fail(f"{sample}: has no class index in its field cls")
    value = row["cls"]
    return class_label(value.decode(errors="replace").strip() if isinstance(value, bytes) else value, num_classes, sample)


def multi_hot(row: dict[str, Any], num_classes: int, source: str) -> list[int]:
    sample = f"{source}: sample {row.get('__key__')!r}"
    try:
        value = np.load(BytesIO(row["npy"]), allow_pickle=False)
    except (KeyError, ValueError, EOFError):
        fail(f"{sample}: has no array of classes in its field npy")
    return multi_hot_label(value, num_classes, sample)


def captions_by_line(row: dict[str, Any]) -> list[str] | None:
    """The lines of a sample's text; None where it has none, or none that is UTF-8."""
    try:
        return split_lines(row["txt"].decode()) or None
    except (KeyError, UnicodeDecodeError):
        return None
