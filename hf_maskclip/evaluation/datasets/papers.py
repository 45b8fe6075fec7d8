"""The papers' data sets (arXiv 2503.17080): 17 + 3 + 3 + 6 in clip-benchmark's layout, and SugarCrepe's seven splits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ...data.clip_benchmark import ClipBenchmarkFolder
from ...data.scene_sets import COMPOSITIONALITY_KINDS
from ..download import Missing
from ..tasks import ClassificationData, Evaluation, Task
from . import clip_benchmark, sugar_crepe

# Columns of the papers' tables (arXiv 2503.17080), and clip-benchmark's names of the data sets (https://huggingface.co/clip-benchmark).
ZERO_SHOT = {
    "Food101": "food101",
    "CIFAR10": "vtab-cifar10",
    "CIFAR100": "vtab-cifar100",
    "SUN397": "sun397",
    "Cars": "cars",
    "VOC2007": "voc2007",
    "Aircraft": "fgvc_aircraft",
    "DTD": "vtab-dtd",
    "Pets": "vtab-pets",
    "Caltech101": "vtab-caltech101",
    "Flowers": "vtab-flowers",
    "STL10": "stl10",
    "EuroSAT": "vtab-eurosat",
    "RESISC45": "vtab-resisc45",
    "GTSRB": "gtsrb",
    "Country211": "country211",
    "PCam": "vtab-pcam",
}
RETRIEVAL = {"COCO": "mscoco_captions", "Flickr8k": "flickr8k", "Flickr30k": "flickr30k"}
LINEAR_PROBE = {"CIFAR10": "vtab-cifar10", "CIFAR100": "vtab-cifar100", "ImageNet-1K": "imagenet1k"}
ROBUSTNESS = {
    "ImageNet-1K": "imagenet1k",
    "V2": "imagenetv2",
    "A": "imagenet-a",
    "R": "imagenet-r",
    "O": "imagenet-o",
    "Sketch": "imagenet_sketch",
}
TWO_HUNDRED_CLASSES = ("A", "R", "O")

# The files beside the splits: a pattern such as *.txt would bring those of splits that are not wanted.
ABOUT = ("dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt")


@dataclass(frozen=True)
class PaperSuite:
    """The tasks of the papers' tables, on data sets under one folder.

    `data_root` holds `wds_food101/`, ... (with or without `wds_` and `vtab-`), and `sugar_crepe/` with SugarCrepe's JSON files
    and COCO's `val2017/`.
    """

    data_root: Path

    def tasks(self) -> list[Task]:
        """All of them, each with what it lacks."""
        return [*self._zero_shot(), *self._retrieval(), *self._linear_probe(), *self._robustness(), *self._compositionality()]

    def _zero_shot(self) -> Iterator[Task]:
        for column, name in ZERO_SHOT.items():
            yield self._task("zero_shot", column, name, lambda data: data.zero_shot())

    def _retrieval(self) -> Iterator[Task]:
        for column, name in RETRIEVAL.items():
            folder = self._folder(name)
            yield Task("retrieval", column, str(folder), partial(_retrieval_of, folder, column), self._missing(name))

    def _linear_probe(self) -> Iterator[Task]:
        for column, name in LINEAR_PROBE.items():
            yield self._task("linear_probe", column, name, lambda data: data.linear_probe(), ("train", "test"))

    def _robustness(self) -> Iterator[Task]:
        for column, name in ROBUSTNESS.items():
            of_200 = column in TWO_HUNDRED_CLASSES
            opened = partial(_robustness_of, only_occurring=of_200)
            yield self._task("robustness", column, name, opened)

    def _compositionality(self) -> Iterator[Task]:
        folder = self.data_root / "sugar_crepe"
        for kind in COMPOSITIONALITY_KINDS:
            name = sugar_crepe.file_name(kind)
            needed = {name: f"{sugar_crepe.WHERE}/{name}", "val2017": sugar_crepe.PICTURES}
            missing = tuple(Missing(folder / file, address) for file, address in needed.items() if not (folder / file).exists())
            yield Task("compositionality", kind, str(folder), partial(sugar_crepe.sugar_crepe_kind, folder, kind), missing)

    def _task(
        self,
        family: str,
        column: str,
        name: str,
        evaluation: Callable[[ClassificationData], Evaluation],
        splits: tuple[str, ...] = ("test",),
    ) -> Task:
        folder = self._folder(name)

        def opened() -> Evaluation:
            return replace(evaluation(clip_benchmark.classification(ClipBenchmarkFolder(str(folder)))), column=column)

        return Task(family, column, str(folder), opened, self._missing(name, splits))

    def _folder(self, name: str) -> Path:
        names = (f"wds_{name}", name, name.removeprefix("vtab-"))
        return next((self.data_root / n for n in names if (self.data_root / n).is_dir()), self.data_root / f"wds_{name}")

    def _missing(self, name: str, splits: tuple[str, ...] = ("test",)) -> tuple[Missing, ...]:
        folder = self._folder(name)
        layout = ClipBenchmarkFolder(str(folder))
        absent = [split for split in splits if not layout.has(split)]
        wanted = Missing(folder, f"clip-benchmark/wds_{name}", (*ABOUT, *(f"{split}/*" for split in absent)))
        return (wanted,) if absent else ()


def _retrieval_of(folder: Path, column: str) -> Evaluation:
    return replace(clip_benchmark.captioned(ClipBenchmarkFolder(str(folder))), column=column)


def _robustness_of(data: ClassificationData, *, only_occurring: bool) -> Evaluation:
    return data.zero_shot(family="robustness", only_occurring=only_occurring)
