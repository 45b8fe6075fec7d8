"""clip-benchmark's layout of data sets, on a disk or anywhere that fsspec reads, and what its files say."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from hf_maskclip.evaluation import ImageSet
from hf_maskclip.hub import HUB_ID
from training.data import PairDecoder
from training.errors import ConfigError, fail
from training.evaluation_sets import (
    ClassificationData,
    Evaluation,
    Rows,
    choose_templates,
    lines_of_file,
    retrieval,
    split_lines,
)
from training.sources import TAR_SUFFIXES, open_stream

SPLITS = ("train", "validation", "test")
TAR_END = 1024  # zero bytes that end a tar file; one that is cut between two samples lacks nothing else


@dataclass
class ClipBenchmarkFolder:
    """A folder in clip-benchmark's layout, on a disk or anywhere that fsspec reads, such as `hf://datasets/clip-benchmark/...`.

    `dataset_type.txt` (`retrieval`, `multilabel`, or absent: classification), `classnames.txt`,
    `zeroshot_classification_templates.txt`, and for each split `nshards.txt` and the shards `0.tar`, `1.tar`, ...
    """

    root: str

    def __post_init__(self):
        self.root = self.root.rstrip("/")
        self.name = self.root.rpartition("/")[2].removeprefix("wds_")
        self.kind = (self.text("dataset_type.txt") or "classification").strip().lower()

    def text(self, name: str) -> str | None:
        """The content of a file, or None where there is no such file. Raises ConfigError for a place that does not answer."""
        try:
            with fsspec.open(f"{self.root}/{name}", "r", encoding="utf-8") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except Exception as error:  # fsspec passes on what the clients of its file systems raise
            fail(f"{self.root}: {name} cannot be read ({type(error).__name__}: {error})")

    def shards(self, split: str) -> list[str]:
        """The shards of a split. Raises ConfigError for a split or a shard that is not there, or not there to its end."""
        filesystem, root = fsspec.core.url_to_fs(self.root)
        count = self.text(f"{split}/nshards.txt")
        if count is None:
            found = [name for name in SPLITS if filesystem.exists(f"{root}/{name}/nshards.txt")]
            fail(f"split={split!r}: {self.root} has {', '.join(found) or 'no folder with an nshards.txt'}")
        if not count.strip().isdigit():
            fail(f"{self.root}/{split}/nshards.txt: {count.strip()!r} is no number of shards")
        names = [f"{split}/{number}.tar" for number in range(int(count))]
        for name in names:
            if not filesystem.exists(f"{root}/{name}"):
                fail(f"{self.root}: {name} is missing; its nshards.txt says {len(names)} shards")
            if any(filesystem.tail(f"{root}/{name}", TAR_END)):
                fail(f"{self.root}: {name} is cut off, it does not end as a tar file does")
        return [f"{self.root}/{name}" for name in names]

    def images(self, split: str, target: Callable[[dict[str, Any]], Any], num_classes: int | None = None) -> ImageSet:
        """The pictures of a split, their targets checked: `target` is that of [`Rows`], `num_classes` of [`check_targets`]."""
        shards = self.shards(split)
        rows = Rows([open_stream(shard) for shard in shards], target, PairDecoder(), self.root)
        check_targets(rows, num_classes)
        filesystem, _ = fsspec.core.url_to_fs(self.root)
        about = [filesystem.info(fsspec.core.url_to_fs(shard)[1]) for shard in shards]
        return ImageSet(rows, hashlib.sha256(json.dumps([self.root, split, about], default=str).encode()).hexdigest())

    def classification(self, class_names_file: str = "", templates_file: str = "") -> ClassificationData:
        """Raises ConfigError where the folder has no `classnames.txt` and none is given."""
        own_names = self.text("classnames.txt")
        if own_names is None and not class_names_file:
            fail(f"{self.root}: has no classnames.txt")
        class_names = lines_of_file(class_names_file) if class_names_file else split_lines(own_names)
        templates, source = choose_templates(templates_file, self.text("zeroshot_classification_templates.txt"))
        target = multi_hot if self.kind == "multilabel" else class_index

        def images(split: str) -> ImageSet:
            return self.images(split, target, len(class_names))

        return ClassificationData(self.name, self.root, images, class_names, templates, source, self.kind == "multilabel")

    def retrieval(self, split: str = "test") -> Evaluation:
        return retrieval(self.name, self.root, self.images(split, captions_by_line), split)


def find_clip_benchmark_folder(data: str) -> ClipBenchmarkFolder | None:
    """The folder or the Hub data set in clip-benchmark's layout that `data` names, if it is one."""
    is_hub_id = re.fullmatch(HUB_ID, data) and not Path(data).exists()
    if data.endswith((*TAR_SUFFIXES, ".parquet")) or not (is_hub_id or "://" in data or Path(data).is_dir()):
        return None
    folder = ClipBenchmarkFolder(f"hf://datasets/{data}" if is_hub_id else data)
    if any(folder.text(name) is not None for name in ("dataset_type.txt", "classnames.txt")):
        return folder
    return folder if any(folder.text(f"{split}/nshards.txt") is not None for split in SPLITS) else None


def class_index(row: dict[str, Any]) -> int:
    try:
        return int(row["cls"])
    except (KeyError, ValueError):
        raise ConfigError(f"sample {row.get('__key__')!r}: has no class index in its field cls") from None


def multi_hot(row: dict[str, Any]) -> list[int]:
    try:
        return [int(value) for value in np.load(BytesIO(row["npy"]), allow_pickle=False)]
    except (KeyError, ValueError):
        raise ConfigError(f"sample {row.get('__key__')!r}: has no array of classes in its field npy") from None


def captions_by_line(row: dict[str, Any]) -> list[str] | None:
    """The lines of a sample's text; None where it has none, or none that is UTF-8."""
    try:
        return split_lines(row["txt"].decode()) or None
    except (KeyError, UnicodeDecodeError):
        return None


def check_targets(rows: Rows, num_classes: int | None = None) -> None:
    """Look at all targets without decoding a picture: a wrong one would end an evaluation of hours at its end.

    What is not on a disk is not looked at, for it would be downloaded twice.

    Args:
        num_classes: of class indices, or of arrays of 0 and 1; None where the targets are captions.

    Raises:
        ConfigError: there is none, one is outside the classes, or a shard cannot be read.
    """
    if "://" in rows.source:
        return
    is_empty = True
    for row, target in rows.targets():
        is_empty = False
        if num_classes is None:
            continue
        sample = f"{rows.source}: sample {row['__key__']!r}"
        if isinstance(target, list) and len(target) != num_classes:
            fail(f"{sample} has {len(target)} classes, but there are {num_classes} class names")
        if isinstance(target, int) and not 0 <= target < num_classes:
            fail(f"{sample} has class index {target}, but there are {num_classes} class names")
    if is_empty:
        fail(f"{rows.source}: the split is empty")
