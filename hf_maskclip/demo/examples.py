"""The example pictures: scenes of the embedded data set, so that the page needs neither a run's folder nor the network."""

import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from transformers import CLIPProcessor

from ..data.scene_drawing import draw_scene
from ..data.scenes import sample_scene
from ..models.modeling_maskclip import MaskCLIPModel
from .labels import parse_labels
from .scoring import SHARES, TEMPLATE, HALF, score_labels

EXAMPLE_SIZE = 160  # in pixels


class Example(NamedTuple):
    """A scene of the test split by its number, and labels of which the first is right."""

    name: str
    number: int
    labels: str


class Outcome(NamedTuple):
    """What a model makes of an example: whether the right label leads, and its score, whole and with half of it hidden."""

    example: Example
    is_right: tuple[bool, bool]
    scores: tuple[float, float]


# Colours first: a small model learns them long before shapes. The page opens on the example that its model does best.
EXAMPLES = (
    Example("purple star on grass", 21, "a purple object, a red object, a yellow object, a blue object"),
    Example("blue key on grass", 45, "a blue object, a red object, an orange object, a white object"),
    Example("turquoise mushroom on sand", 59, "a turquoise object, a red object, a purple object, a black object"),
    Example("yellow trees at night", 22, "three yellow trees, three green trees, one yellow fish, a white moon"),
)


def draw_example(example: Example) -> Image.Image:
    return draw_scene(sample_scene(example.number, split="test"), EXAMPLE_SIZE)[0]


@cache
def example_path(example: Example) -> str:
    """The picture of an example as a file, which the page wants: in a temporary folder of this process."""
    path = _folder() / f"{example.name.replace(' ', '_')}.png"
    draw_example(example).save(path)
    return str(path)


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="hf_maskclip_demo_"))


def try_examples(model: MaskCLIPModel, processor: CLIPProcessor, mask: str) -> list[Outcome]:
    """All examples as the model scores them, what it does best first."""
    outcomes = []
    for example in EXAMPLES:
        labels = parse_labels(example.labels)
        shares = (SHARES[0], SHARES[HALF])
        scores = score_labels(model, processor, draw_example(example), labels, TEMPLATE, mask, shares)  # (2, M)
        whole, half = (bool(row.argmax() == 0) for row in scores)
        outcomes.append(Outcome(example, (whole, half), (scores[0, 0].item(), scores[1, 0].item())))
    return sorted(outcomes, key=lambda outcome: (*outcome.is_right, min(outcome.scores)), reverse=True)


def in_words(outcomes: list[Outcome]) -> str:
    """How well the model does on the examples, in a sentence."""
    whole, half = (sum(outcome.is_right[column] for outcome in outcomes) for column in (0, 1))
    return (
        f"Of the {len(outcomes)} examples, this model puts the right label first in {whole} with the whole picture, "
        f"and in {half} with half of its patches hidden."
    )
