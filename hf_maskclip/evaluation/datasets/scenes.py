"""Evaluations on drawn scenes: all five families of the papers' tables, without any data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from PIL import Image

from ...data.scene_drawing import STYLES
from ...data.scene_sets import COMPOSITIONALITY_KINDS, classification_set, compositionality_set, retrieval_set
from ...data.scene_source import NAME
from ..encoder import ImageSet
from ..tasks import ClassificationData, Evaluation, Task, compositionality, retrieval

# Small enough to evaluate the tiny model in seconds, large enough for a standard error of about two points.
SCENES_PER_SET = 400
PROBE_SCENES = 2000
COMPOSITIONALITY_SCENES = 200


def scene_evaluations(image_size: int, seed: int = 0) -> list[Evaluation]:
    """What a training run on scenes evaluates: three zero-shot classifications and retrieval."""
    sets = [_scenes_classification(kind, image_size, seed).zero_shot() for kind in ("shape", "colour", "pair")]
    return [*sets, retrieval(NAME, NAME, _scene_set(retrieval_set, SCENES_PER_SET, seed=seed, image_size=image_size))]


def scene_suite(image_size: int, seed: int = 0) -> list[Task]:
    """All five families, on scenes. Robustness is that of naming pairs of colour and shape, in other styles."""
    return [_as_task(evaluation) for evaluation in _suite(image_size, seed)]


def _as_task(evaluation: Evaluation) -> Task:
    return Task(evaluation.family, evaluation.column, NAME, lambda: evaluation)


def _suite(image_size: int, seed: int) -> Iterator[Evaluation]:
    yield from scene_evaluations(image_size, seed)
    for kind in ("shape", "colour"):
        yield _scenes_classification(kind, image_size, seed).linear_probe()
    for style in STYLES:
        yield _scenes_classification("pair", image_size, seed, style, name=style).zero_shot(family="robustness")
    for kind in COMPOSITIONALITY_KINDS:
        pictures = _scene_set(_hard_negatives, kind, COMPOSITIONALITY_SCENES, seed=seed, image_size=image_size)
        yield compositionality(kind, NAME, pictures)


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

    return ClassificationData(name or kind, NAME, images, class_names, templates, "data set")
