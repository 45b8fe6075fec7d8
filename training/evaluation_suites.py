"""The suites: all five families of the papers' tables, on the embedded scenes or on the papers' data sets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from hf_maskclip.evaluation import ImageSet
from training.clip_benchmark_layout import ClipBenchmarkFolder
from training.evaluation_data import SUGAR_CREPE, sugar_crepe
from training.evaluation_sets import ClassificationData, Evaluation, compositionality, retrieval
from training.scenes import COMPOSITIONALITY_KINDS, STYLES, classification_set, compositionality_set, retrieval_set

# Small enough to evaluate the tiny model in seconds, large enough for a standard error of about two points.
SCENES_PER_SET = 400
PROBE_SCENES = 2000
COMPOSITIONALITY_SCENES = 200

# ------------------------------------------------------------------------------------------------------ scenes


def scene_evaluations(image_size: int, seed: int = 0) -> list[Evaluation]:
    """What a training run on scenes evaluates: three zero-shot classifications and retrieval."""
    sets = [_scenes_classification(kind, image_size, seed).zero_shot() for kind in ("shape", "colour", "pair")]
    return [*sets, retrieval("scenes", "scenes", _scene_set(retrieval_set, SCENES_PER_SET, seed=seed, image_size=image_size))]


def scene_suite(image_size: int, seed: int = 0) -> Iterator[Evaluation]:
    """All five families, on scenes. Robustness is that of naming pairs of colour and shape, in other styles."""
    yield from scene_evaluations(image_size, seed)
    for kind in ("shape", "colour"):
        yield _scenes_classification(kind, image_size, seed).linear_probe()
    for style in STYLES:
        yield _scenes_classification("pair", image_size, seed, style, name=style).zero_shot(family="robustness")
    for kind in COMPOSITIONALITY_KINDS:
        pictures = _scene_set(_hard_negatives, kind, COMPOSITIONALITY_SCENES, seed=seed, image_size=image_size)
        yield compositionality(kind, "scenes", pictures)


def _hard_negatives(*args: Any, **kwargs: Any) -> list[tuple[Image.Image, tuple[str, str]]]:
    return [(picture, (true, false)) for picture, true, false in compositionality_set(*args, **kwargs)]


@dataclass
class _DrawnWhenAsked:
    """Samples that are drawn at the first look, and kept for the later evaluations of a training run."""

    draw: Callable[[], list[tuple[Image.Image, Any]]]

    @cached_property
    def samples(self) -> list[tuple[Image.Image, Any]]:
        return self.draw()

    def __iter__(self) -> Iterator[tuple[Image.Image, Any]]:
        return iter(self.samples)


def _scene_set(draw: Callable[..., list[tuple[Image.Image, Any]]], *args: Any, **kwargs: Any) -> ImageSet:
    return ImageSet(_DrawnWhenAsked(partial(draw, *args, **kwargs)), fingerprint=f"scenes {draw.__name__} {args} {kwargs}")


def _scenes_classification(kind: str, image_size: int, seed: int, style: str = "plain", name: str = "") -> ClassificationData:
    _, class_names, templates = classification_set(kind, 0)

    def draw(n: int, split: str) -> list[tuple[Image.Image, int]]:
        return classification_set(kind, n, seed=seed, image_size=image_size, style=style, split=split)[0]

    def images(split: str) -> ImageSet:
        n = PROBE_SCENES if split == "train" else SCENES_PER_SET
        fingerprint = f"scenes classification {kind} {n} {seed} {image_size} {style} {split}"
        return ImageSet(_DrawnWhenAsked(partial(draw, n, split)), fingerprint)

    return ClassificationData(name or kind, "scenes", images, class_names, templates, "data set")


# ------------------------------------------------------------------------------------------- the papers' data sets

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
        wanted = {name: ("test",) for table in (ZERO_SHOT, RETRIEVAL, ROBUSTNESS) for name in table.values()}
        wanted |= {name: ("train", "test") for name in LINEAR_PROBE.values()}
        lines = []
        for name, splits in wanted.items():
            folder = self._folder(name)
            absent = [split for split in splits if not (folder / split / "nshards.txt").is_file()]
            if absent:
                get = f"hf download clip-benchmark/wds_{name} --repo-type dataset --local-dir {self.data_root}/wds_{name}"
                lines.append(f"{folder} ({', '.join(absent)}): {get}")
        return lines + self._missing_of_sugar_crepe()

    def _missing_of_sugar_crepe(self) -> list[str]:
        places = {f"{stem}.json": "https://github.com/RAIVNLab/sugar-crepe, its folder data" for stem in SUGAR_CREPE.values()}
        places |= {"val2017": "http://images.cocodataset.org/zips/val2017.zip"}
        folder = self.data_root / "sugar_crepe"
        return [f"{folder / name}: {place}" for name, place in places.items() if not (folder / name).exists()]

    def evaluations(self) -> Iterator[Evaluation]:
        """Those of the data sets that are there, each opened when its turn comes."""
        for column, name in ZERO_SHOT.items():
            if self._has(name, "test"):
                yield replace(self._classification(name).zero_shot(), column=column)
        for column, name in RETRIEVAL.items():
            if self._has(name, "test"):
                yield replace(ClipBenchmarkFolder(str(self._folder(name))).retrieval(), column=column)
        for column, name in LINEAR_PROBE.items():
            if self._has(name, "train") and self._has(name, "test"):
                yield replace(self._classification(name).linear_probe(), column=column)
        for column, name in ROBUSTNESS.items():
            if self._has(name, "test"):
                only_occurring = column in TWO_HUNDRED_CLASSES
                data = self._classification(name)
                yield replace(data.zero_shot(family="robustness", only_occurring=only_occurring), column=column)
        if not self._missing_of_sugar_crepe():
            yield from sugar_crepe(self.data_root / "sugar_crepe")

    def _folder(self, name: str) -> Path:
        names = (f"wds_{name}", name, name.removeprefix("vtab-"))
        return next((self.data_root / n for n in names if (self.data_root / n).is_dir()), self.data_root / f"wds_{name}")

    def _has(self, name: str, split: str) -> bool:
        return (self._folder(name) / split / "nshards.txt").is_file()

    def _classification(self, name: str) -> ClassificationData:
        return ClipBenchmarkFolder(str(self._folder(name))).classification()
