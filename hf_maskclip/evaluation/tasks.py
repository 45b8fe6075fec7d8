"""An evaluation: pictures, what is asked of them, and what the record of its result says besides the metrics."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ..data.decoding import Decoder, SkippedSample, sample_key
from ..errors import ConfigError, as_config_error, fail
from .class_names import warn_of_names_without_words
from .compositionality import evaluate_compositionality
from .download import Missing
from .encoder import ImageSet
from .linear_probe import Solver, evaluate_linear_probe
from .pixels import NamedPicture
from .retrieval import evaluate_retrieval
from .zero_shot import evaluate_multi_label, evaluate_zero_shot

logger = logging.getLogger(__name__)

SINGLE_TEMPLATE = ["a photo of a {c}"]


@dataclass
class Evaluation:
    """One evaluation: `run(encoder)` gives its metrics, `run(encoder, details=True)` what stands behind them, too.

    Args:
        family: of the papers' tables: zero_shot, retrieval, linear_probe, robustness or compositionality.
        column: of the table.
        about: what else belongs into the record of its result.
        images: what it reads.
        suffix: of its name, where one file has its result under several masks.
    """

    family: str
    column: str
    run: Callable[..., dict[str, Any]]
    about: dict[str, Any]
    images: tuple[ImageSet, ...]
    suffix: str = ""

    @property
    def name(self) -> str:
        return name_of_result(self.family, self.column) + self.suffix

    def check(self) -> None:
        """Look at all targets before a picture is encoded. Raises ConfigError for a wrong one."""
        for images in self.images:
            images.check()


@dataclass(frozen=True)
class Task:
    """An evaluation of a suite. Nothing of its data is read before it is opened.

    Args:
        family, column: of the papers' tables.
        data: where it is.
        open: gives the evaluation.
        missing: the parts of the data that are not there.
    """

    family: str
    column: str
    data: str
    open: Callable[[], Evaluation]
    missing: tuple[Missing, ...] = ()

    @property
    def name(self) -> str:
        return name_of_result(self.family, self.column)


def name_of_result(family: str, column: str) -> str:
    return f"{family}_{column}".lower().replace(" ", "_")


@dataclass
class Rows:
    """The samples of an [`ImageSet`]: rows of streams, of which pictures are decoded when they are asked for.

    Args:
        streams: of `hf_maskclip.data.sources.open_files`, one after the other.
        target: from a row to what is known of its picture; None leaves the row out.
        decoder: from a row to its picture.
        source: named in messages.
    """

    streams: list[datasets.IterableDataset]
    target: Callable[[dict[str, Any]], Any]
    decoder: Decoder
    source: str
    _is_checked: bool = field(default=False, init=False, repr=False)

    def __iter__(self) -> Iterator[tuple[NamedPicture, Any]]:
        for row, target in self.targets():
            yield NamedPicture(sample_key(row), partial(self._picture, row)), target

    def check(self) -> None:
        """Look at all targets once, without decoding a picture: a wrong one would end an evaluation of hours at its end.

        What is not on a disk is not looked at, for it would be downloaded twice. There a wrong one is an error when it comes.

        Raises:
            ConfigError: there is none, one is no label, no label of several classes has a 1, or a shard cannot be read.
        """
        if self._is_checked or "://" in self.source:
            return
        targets = [target for _, target in self.targets()]
        if not targets:
            fail(f"{self.source}: the split is empty")
        if all(isinstance(target, list) and not any(target) for target in targets):
            fail(f"{self.source}: no label of its {len(targets)} samples has a 1, so that there is nothing to find")
        self._is_checked = True

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
        only_split: the name of its only split; `""`: it has those that are asked for.
    """

    name: str
    data: str
    images: Callable[[str], ImageSet]
    class_names: list[str]
    templates: list[str]
    templates_source: str
    is_multi_label: bool = False
    only_split: str = ""

    def zero_shot(self, split: str = "test", *, family: str = "zero_shot", only_occurring: bool = False) -> Evaluation:
        split = self.only_split or split
        warn_of_names_without_words(self.class_names, self.data)
        images = self.images(split)
        about = {"data": self.data, "split": split, "templates": self.templates, "templates_source": self.templates_source}
        about |= {"class_names_hash": hash_of(self.class_names)} | _fingerprint(images)
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
        return Evaluation(family, self.name, run, {"task": "zero_shot_classification"} | about, (images,))

    def linear_probe(self, split: str = "test", solver: Solver = "gradient_descent") -> Evaluation:
        if self.is_multi_label:
            fail(f"{self.name}: a linear probe needs one class a picture")
        if self.only_split:
            fail(f"{self.data}: has no splits, and a linear probe needs two; move its classes into train/ and {split}/")
        train, test = self.images("train"), self.images(split)
        about = {"task": "linear_probe", "data": self.data, "split": split, "train_split": "train", "solver": solver}
        about |= {"class_names_hash": hash_of(self.class_names)} | _fingerprint(train, test)
        names = self.class_names
        run = partial(evaluate_linear_probe, train=train, test=test, num_classes=len(names), solver=solver, class_names=names)
        return Evaluation("linear_probe", self.name, run, about, (train, test))


def retrieval(name: str, data: str, images: ImageSet, split: str = "test") -> Evaluation:
    about = {"task": "zero_shot_retrieval", "data": data, "split": split} | _fingerprint(images)
    return Evaluation("retrieval", name, partial(evaluate_retrieval, images=images), about, (images,))


def compositionality(kind: str, data: str, images: ImageSet) -> Evaluation:
    about = {"task": "compositionality", "data": data, "split": "test"} | _fingerprint(images)
    return Evaluation("compositionality", kind, partial(evaluate_compositionality, images=images), about, (images,))


def _fingerprint(*images: ImageSet) -> dict[str, str]:
    """What changes with the data, for the record; nothing where that is not known."""
    known = [one.fingerprint for one in images]
    return {"data_fingerprint": hash_of(known)} if all(known) else {}


def hash_of(values: list[str]) -> str:
    """16 hexadecimal digits that change with the texts."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def choose_templates(file: str, own: str | None) -> tuple[list[str], str]:
    """The templates of a file of the user's, else of the data set's, else the single one; and which of these they are.

    Raises:
        ConfigError: no template, or one without `{c}`.
    """
    if file:
        templates, source = lines_of_file(file), file
    elif own is not None:
        templates, source = split_lines(own), "data set"
    else:
        templates, source = SINGLE_TEMPLATE, "default"
    if not templates:
        fail(f"prompt templates ({source}): there is none")
    for template in templates:
        if "{c}" not in template:
            fail(f"prompt template {template!r} ({source}): has no {{c}} for the class name")
    return templates, source


def lines_of_file(path: str) -> list[str]:
    with as_config_error("file", path):
        return split_lines(Path(path).read_text(encoding="utf-8"))


def split_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
