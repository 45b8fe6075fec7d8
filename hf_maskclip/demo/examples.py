"""The example pictures: scenes of the embedded data set, so that the page needs neither a run's folder nor the network."""

import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..data.scene_drawing import draw_scene
from ..data.scenes import sample_scene
from .labels import parse_labels
from .scoring import TEMPLATE, score_labels

EXAMPLE_SIZE = 160  # in pixels


class Example(NamedTuple):
    """A scene of the test split by its number, and labels of which the first is right."""

    name: str
    number: int
    labels: str


class Outcome(NamedTuple):
    """What a model makes of an example.

    Attributes:
        example: the example.
        is_right: whether the right label leads, at the three `TRIED_SHARES`.
        scores: of the right label, there.
    """

    example: Example
    is_right: tuple[bool, ...]
    scores: tuple[float, ...]

    @property
    def shows_the_effect(self) -> tuple[bool, bool, float]:
        """Larger where the right label leads, still leads at half, and loses more where hardly a patch is left."""
        whole, _, last = self.scores
        return *self.is_right[:2], whole - last


TRIED_SHARES = (0, 0.5, 0.9)
# Most ask for a colour, which a small model learns long before shapes. The page opens on the one that shows most.
EXAMPLES = (
    Example("brown umbrella on checks", 31, "a brown object, a red object, a green object, a blue object"),
    Example("red crown at sea", 68, "a red object, an orange object, a pink object, a white object"),
    Example("purple star on grass", 21, "a purple object, a red object, a yellow object, a blue object"),
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


def try_examples(model: PreTrainedModel, processor: ProcessorMixin, mask: str) -> list[Outcome]:
    """All examples as the model scores them, those first that show the effect of the mask best."""
    outcomes = []
    for example in EXAMPLES:
        labels = parse_labels(example.labels)
        scores = score_labels(model, processor, draw_example(example), labels, TEMPLATE, mask, TRIED_SHARES)  # (3, M)
        leads = (scores[:, 0] > scores[:, 1:].amax(dim=1)).tolist()
        outcomes.append(Outcome(example, tuple(leads), tuple(scores[:, 0].tolist())))
    return sorted(outcomes, key=lambda outcome: outcome.shows_the_effect, reverse=True)


def in_words(outcomes: list[Outcome]) -> str:
    """How well the model does on the examples, in a sentence."""
    whole, half = (sum(outcome.is_right[column] for outcome in outcomes) for column in (0, 1))
    return (
        f"Of the {len(outcomes)} examples, this model puts the right label first in {whole} with the whole picture, "
        f"and in {half} with half of its patches hidden."
    )
