"""The suites: all five families of the papers' tables, on the embedded scenes or on the papers' data sets."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState

from ..data.clip_benchmark import ClipBenchmarkFolder
from ..data.scene_sets import COMPOSITIONALITY_KINDS
from .datasets import clip_benchmark, scenes, sugar_crepe
from .tasks import ClassificationData, Evaluation


def open_suite(name: str, image_size: int, data_root: str) -> Iterator[Evaluation]:
    """The evaluations of a suite, one of [`hf_maskclip.options.SUITES`].

    Args:
        image_size: in pixels, of pictures that are drawn.
        data_root: the folder of the papers' data sets; what is missing there is printed first.
    """
    if name == "scenes":
        return scenes.scene_suite(image_size)
    suite = PaperSuite(Path(data_root))
    if (missing := suite.missing()) and PartialState().is_main_process:
        print("missing, and where to get it:\n  " + "\n  ".join(missing), file=sys.stderr)
    return suite.evaluations()


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


@dataclass
class PaperSuite:
    """The papers' 17 + 3 + 3 + 6 data sets in clip-benchmark's layout, and SugarCrepe's seven splits, under one folder.

    `data_root` holds `wds_food101/`, ... (with or without `wds_` and `vtab-`), and `sugar_crepe/` with SugarCrepe's JSON files
    and COCO's `val2017/`.
    """

    data_root: Path

    def missing(self) -> list[str]:
        """One line for each data set that is not there: which, and where to get it."""
        wanted: dict[str, tuple[str, ...]] = {
            name: ("test",) for table in (ZERO_SHOT, RETRIEVAL, ROBUSTNESS) for name in table.values()
        }
        wanted |= {name: ("train", "test") for name in LINEAR_PROBE.values()}
        lines = []
        for name, splits in wanted.items():
            folder = self._folder(name)
            absent = [split for split in splits if not self._has(name, split)]
            if absent:
                get = f"hf download clip-benchmark/wds_{name} --repo-type dataset --local-dir {self.data_root}/wds_{name}"
                lines.append(f"{folder} ({', '.join(absent)}): {get}")
        return lines + self._missing_of_sugar_crepe()

    def _missing_of_sugar_crepe(self) -> list[str]:
        addresses = {sugar_crepe.file_name(kind): sugar_crepe.WHERE for kind in COMPOSITIONALITY_KINDS}
        addresses |= {"val2017": "http://images.cocodataset.org/zips/val2017.zip"}
        folder = self.data_root / "sugar_crepe"
        return [f"{folder / name}: {address}" for name, address in addresses.items() if not (folder / name).exists()]

    def evaluations(self) -> Iterator[Evaluation]:
        """Those of the data sets that are there, each opened when its turn comes."""
        for column, name in ZERO_SHOT.items():
            if self._has(name, "test"):
                yield replace(self._classification(name).zero_shot(), column=column)
        for column, name in RETRIEVAL.items():
            if self._has(name, "test"):
                yield replace(clip_benchmark.captioned(self._layout(name)), column=column)
        for column, name in LINEAR_PROBE.items():
            if self._has(name, "train") and self._has(name, "test"):
                yield replace(self._classification(name).linear_probe(), column=column)
        for column, name in ROBUSTNESS.items():
            if self._has(name, "test"):
                only_occurring = column in TWO_HUNDRED_CLASSES
                data = self._classification(name)
                yield replace(data.zero_shot(family="robustness", only_occurring=only_occurring), column=column)
        if not self._missing_of_sugar_crepe():
            yield from sugar_crepe.sugar_crepe(self.data_root / "sugar_crepe")

    def _folder(self, name: str) -> Path:
        names = (f"wds_{name}", name, name.removeprefix("vtab-"))
        return next((self.data_root / n for n in names if (self.data_root / n).is_dir()), self.data_root / f"wds_{name}")

    def _layout(self, name: str) -> ClipBenchmarkFolder:
        return ClipBenchmarkFolder(str(self._folder(name)))

    def _has(self, name: str, split: str) -> bool:
        return self._layout(name).has(split)

    def _classification(self, name: str) -> ClassificationData:
        return clip_benchmark.classification(self._layout(name))
