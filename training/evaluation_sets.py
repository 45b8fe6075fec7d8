"""Held-out data of all forms as evaluations: clip-benchmark's folders (local or on the Hub), image folders, pairs, scenes."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
from PIL import Image

from hf_maskclip.evaluation import (
    Encoder,
    ImageSet,
    evaluate_compositionality,
    evaluate_linear_probe,
    evaluate_multi_label,
    evaluate_retrieval,
    evaluate_zero_shot,
)
from hf_maskclip.evaluation.linear_probe import Solver
from training.data import PairDecoder, decode_image, first_pair
from training.errors import ConfigError, fail, naming
from training.skipping import SkippedSample
from training.sources import TAR_SUFFIXES, expand_braces, open_stream

logger = logging.getLogger(__name__)

SINGLE_TEMPLATE = ["a photo of a {c}"]
SPLITS = ("train", "validation", "test")
TAR_END = 1024  # zero bytes that end a tar file; one that is cut between two samples lacks nothing else


@dataclass
class Evaluation:
    """One evaluation: `run(encoder)` gives its metrics.

    Args:
        family: of the papers' tables: zero_shot, retrieval, linear_probe, robustness or compositionality.
        column: of the table.
        about: what else belongs into the record of its result.
    """

    family: str
    column: str
    run: Callable[[Encoder], dict[str, Any]]
    about: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.family}_{self.column}".lower().replace(" ", "_")


def run_evaluations(encoder: Encoder, evaluations: Iterable[Evaluation]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the record of each result, as soon as it is there."""
    for evaluation in evaluations:
        place = {"family": evaluation.family, "column": evaluation.column}
        yield evaluation.name, place | evaluation.run(encoder) | evaluation.about | encoder.describe()


@dataclass
class Rows:
    """The samples of an [`ImageSet`]: rows of streams, of which pictures are decoded when they are asked for.

    Args:
        streams: of `training.sources.open_stream`, one after the other.
        target: from a row to what is known of its picture; None leaves the row out.
        decoder: from a row to its picture.
        source: named in messages.
    """

    streams: list[datasets.IterableDataset]
    target: Callable[[dict[str, Any]], Any]
    decoder: PairDecoder
    source: str

    def __iter__(self) -> Iterator[tuple[Callable[[], Image.Image | None], Any]]:
        for row, target in self.targets():
            yield partial(self._picture, row), target

    def targets(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """The rows and their targets, without decoding a picture.

        Raises:
            ConfigError: a shard cannot be read to its end; a row has no target.
        """
        for row in chain(*self.streams):
            if "__error__" in row:
                raise ConfigError(f"{self.source}: {row['__url__']} cannot be read to its end ({row['__error__']})")
            target = self.target(row)
            if target is not None:
                yield row, target

    def _picture(self, row: dict[str, Any]) -> Image.Image | None:
        try:
            return self.decoder.picture(row)
        except SkippedSample as cause:
            logger.warning("%s: evaluation leaves out %s (%s)", self.source, row.get("__key__"), cause)
            return None


@dataclass
class ClassificationData:
    """A data set of pictures with class indices or, where `is_multi_label`, with a 0 or 1 for each class.

    Args:
        name: of the data set, for the column of a table.
        data: where it is.
        images: from a split to its pictures.
        class_names: M names.
        templates, templates_source: prompts with `{c}`, and where they came from.
    """

    name: str
    data: str
    images: Callable[[str], ImageSet]
    class_names: list[str]
    templates: list[str]
    templates_source: str
    is_multi_label: bool = False

    def zero_shot(self, split: str = "test", *, family: str = "zero_shot", only_occurring: bool = False) -> Evaluation:
        images = self.images(split)
        about = {"data": self.data, "split": split, "templates": self.templates, "templates_source": self.templates_source}
        if self.is_multi_label:
            run = partial(evaluate_multi_label, images=images, class_names=self.class_names, templates=self.templates)
        else:
            run = partial(
                evaluate_zero_shot,
                images=images,
                class_names=self.class_names,
                templates=self.templates,
                only_occurring=only_occurring,
            )
        return Evaluation(family, self.name, run, {"task": "zero_shot_classification"} | about)

    def linear_probe(self, split: str = "test", solver: Solver = "gradient_descent") -> Evaluation:
        if self.is_multi_label:
            fail(f"{self.name}: a linear probe needs one class a picture")
        train, test = self.images("train"), self.images(split)
        about = {"task": "linear_probe", "data": self.data, "split": split, "train_split": "train"}
        run = partial(evaluate_linear_probe, train=train, test=test, num_classes=len(self.class_names), solver=solver)
        return Evaluation("linear_probe", self.name, run, about)


def retrieval(name: str, data: str, images: ImageSet, split: str = "test") -> Evaluation:
    about = {"task": "zero_shot_retrieval", "data": data, "split": split}
    return Evaluation("retrieval", name, partial(evaluate_retrieval, images=images), about)


def compositionality(kind: str, data: str, images: ImageSet) -> Evaluation:
    about = {"task": "compositionality", "data": data, "split": "test"}
    return Evaluation("compositionality", kind, partial(evaluate_compositionality, images=images), about)


# ------------------------------------------------------------------------------------- clip-benchmark's layout


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

    def rows(self, split: str, target: Callable[[dict[str, Any]], Any]) -> Rows:
        return Rows([open_stream(shard) for shard in self.shards(split)], target, PairDecoder(), self.root)

    def fingerprint(self, split: str) -> str:
        filesystem, _ = fsspec.core.url_to_fs(self.root)
        about = [filesystem.info(fsspec.core.url_to_fs(shard)[1]) for shard in self.shards(split)]
        return hashlib.sha256(json.dumps([self.root, split, about], default=str).encode()).hexdigest()

    def classification(self, class_names_file: str = "", templates_file: str = "") -> ClassificationData:
        """Raises ConfigError where the folder has no `classnames.txt` and none is given."""
        own_names = self.text("classnames.txt")
        if own_names is None and not class_names_file:
            fail(f"{self.root}: has no classnames.txt")
        class_names = lines_of_file(class_names_file) if class_names_file else _lines(own_names)
        templates, source = choose_templates(templates_file, self.text("zeroshot_classification_templates.txt"))
        target = multi_hot if self.kind == "multilabel" else class_index

        def images(split: str) -> ImageSet:
            rows = self.rows(split, target)
            check_targets(rows, len(class_names))
            return ImageSet(rows, self.fingerprint(split))

        return ClassificationData(self.name, self.root, images, class_names, templates, source, self.kind == "multilabel")

    def retrieval(self, split: str = "test") -> Evaluation:
        rows = self.rows(split, captions_by_line)
        check_targets(rows)
        return retrieval(self.name, self.root, ImageSet(rows, self.fingerprint(split)), split)


def find_clip_benchmark_folder(data: str) -> ClipBenchmarkFolder | None:
    """The folder or the Hub data set in clip-benchmark's layout that `data` names, if it is one."""
    root = data if "://" in data or Path(data).exists() else f"hf://datasets/{data}"
    folder = ClipBenchmarkFolder(root)
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
        return _lines(row["txt"].decode()) or None
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


def choose_templates(file: str, own: str | None) -> tuple[list[str], str]:
    """The templates of a file of the user's, else of the data set's, else the single one; and which of these they are.

    Raises:
        ConfigError: a template without `{c}`.
    """
    if file:
        templates, source = lines_of_file(file), file
    elif own is not None:
        templates, source = _lines(own), "data set"
    else:
        templates, source = SINGLE_TEMPLATE, "default"
    for template in templates:
        if "{c}" not in template:
            fail(f"prompt template {template!r} ({source}): has no {{c}} for the class name")
    return templates, source


def lines_of_file(path: str) -> list[str]:
    with naming("file", path):
        return _lines(Path(path).read_text(encoding="utf-8"))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


# ------------------------------------------------------------------------------ labelled folders and Hub data sets


def labelled_data(data: str, class_names_file: str = "", templates_file: str = "") -> ClassificationData:
    """An image folder (`SPLIT/CLASS/picture.jpg`) or a Hub data set, whose labels 🤗 Datasets knows by name.

    Raises:
        ConfigError: it cannot be loaded, or has no labels.
    """

    def open_split(split: str) -> datasets.IterableDataset:
        with naming("data", data):
            if not Path(data).is_dir():
                return open_stream(data, split=split)
            if not (Path(data) / split).is_dir():
                fail(f"split={split!r}: {data} has {', '.join(sorted(p.name for p in Path(data).iterdir() if p.is_dir()))}")
            pattern = f"{data}/{split}/**"
            found = datasets.load_dataset("imagefolder", data_files=pattern, split="train", streaming=True)
            return found.cast_column("image", datasets.Image(decode=False))

    features = open_split("test").features or {}
    labels = {name: feature for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    if len(labels) != 1:
        fail(f"data={data!r}: has {len(labels)} fields of class labels ({', '.join(labels) or 'none'}); one is needed")
    field, label = next(iter(labels.items()))
    names = [name.replace("_", " ") for name in label.names]
    class_names = lines_of_file(class_names_file) if class_names_file else names
    templates, source = choose_templates(templates_file, None)

    def images(split: str) -> ImageSet:
        rows = Rows([open_split(split)], lambda row: int(row[field]), PairDecoder(), data)
        return ImageSet(rows)

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


def pairs(name: str, paths: Iterable[str], decoder: PairDecoder, split: str = "test") -> Evaluation:
    """Retrieval among pictures and captions in any form that training takes. A sample without a caption is left out."""
    paths = list(paths)
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


# ------------------------------------------------------------------------------------------ what options name


def evaluations_of_spec(spec: str, decoder: PairDecoder) -> list[Evaluation]:
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
    evaluations = [_evaluation_of_folder(folder, paths, decoder) for folder, paths in by_folder.items()]
    names = [evaluation.name for evaluation in evaluations]
    if repeated := [name for name in names if names.count(name) > 1]:
        fail(f"{spec!r}: two evaluations would be named {repeated[0]}; rename a folder")
    return evaluations


def _evaluation_of_folder(folder: Path, paths: list[str], decoder: PairDecoder) -> Evaluation:
    found = ClipBenchmarkFolder(str(folder)) if folder.is_dir() and paths == [str(folder)] else None
    if found and found.kind == "retrieval":
        return found.retrieval()
    if found and found.text("classnames.txt") is not None:
        return found.classification().zero_shot()
    return pairs(folder.name, paths, decoder)


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
        return [pairs(Path(data).name, expand_braces(data), decoder, split)]
    if folder and folder.kind == "retrieval":
        fail(f"data={data!r}: is a retrieval data set, and has no classes for {task}")
    files = {"class_names_file": class_names_file, "templates_file": templates_file}
    labelled = folder.classification(**files) if folder else labelled_data(data, **files)
    return [labelled.zero_shot(split) if task == "zero_shot_classification" else labelled.linear_probe(split, solver)]
