"""Evaluation of a model in training: which held-out data the options name, and the results as one dict."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from hf_maskclip.evaluation import evaluate_retrieval, evaluate_zero_shot
from training.data import PairDecoder, SkippedSample, first_pair
from training.errors import ConfigError
from training.scenes import classification_set, retrieval_set
from training.sources import expand_braces, open_stream

logger = logging.getLogger(__name__)

DEFAULT_TEMPLATES = ["a photo of a {c}"]
# Small enough to evaluate the tiny model in seconds, large enough for a standard error of about two points.
SCENES_PER_SET = 400


@dataclass
class EvaluationSet:
    """A named evaluation: `run(model, processor)` gives its metrics."""

    name: str
    run: Callable[[CLIPModel, CLIPProcessor], dict[str, Any]]


def load_evaluation_sets(spec: str, decoder: PairDecoder, image_size: int, seed: int = 0) -> list[EvaluationSet]:
    """The evaluations of `eval_data`, one for each folder that the braces of `spec` lead to, and named after it.

    A clip-benchmark folder with `classnames.txt` is a zero-shot classification; all else is retrieval. Data is opened here, so
    that a wrong name is found before training starts, and read anew at each evaluation.
    """
    if not spec:
        return []
    if spec == "scenes":
        return _scene_sets(image_size, seed)
    by_folder: dict[Path, list[str]] = {}
    for path in expand_braces(spec):
        by_folder.setdefault(Path(path) if Path(path).is_dir() else Path(path).parent, []).append(path)
    return [
        _classification_set(folder) if (folder / "classnames.txt").is_file() else _retrieval_set(folder, paths, decoder)
        for folder, paths in by_folder.items()
    ]


def evaluate_sets(model: CLIPModel, processor: CLIPProcessor, sets: list[EvaluationSet]) -> dict[str, dict[str, Any]]:
    """The metrics of each set by its name. Whole images, in the model's own precision."""
    return {evaluation.name: evaluation.run(model, processor) for evaluation in sets}


def _scene_sets(image_size: int, seed: int) -> list[EvaluationSet]:
    sets = []
    for kind in ("shape", "colour", "pair"):
        samples, class_names, templates = classification_set(kind, SCENES_PER_SET, seed=seed, image_size=image_size)
        sets.append(_zero_shot(f"zero_shot_{kind}", samples.__iter__, class_names, templates))
    pairs = retrieval_set(SCENES_PER_SET, seed=seed, image_size=image_size)
    sets.append(EvaluationSet("retrieval", lambda model, processor: evaluate_retrieval(model, processor, pairs)))
    return sets


def _zero_shot(name: str, samples: Callable[[], Iterator], class_names: list[str], templates: list[str]) -> EvaluationSet:
    def run(model, processor):
        result = evaluate_zero_shot(model, processor, samples(), class_names, templates)
        return result | {"templates": templates}

    return EvaluationSet(name, run)


def _classification_set(folder: Path) -> EvaluationSet:
    class_names = _lines(folder / "classnames.txt")
    template_file = folder / "zeroshot_classification_templates.txt"
    templates = _lines(template_file) if template_file.is_file() else DEFAULT_TEMPLATES
    stream = open_stream(str(folder), split="test")
    decoder = PairDecoder()

    def samples() -> Iterator[tuple[Image.Image, int]]:
        for row in stream:
            try:
                yield decoder.picture(row), _label(row)
            except SkippedSample as skipped:
                logger.warning("%s: evaluation leaves out %s (%s)", folder, row.get("__key__"), skipped)

    # All labels are looked at now: a wrong one would end the training at its first evaluation.
    labels = sorted({_label(row) for row in stream})
    if not labels:
        raise ConfigError(f"eval_data={str(folder)!r}: its test split is empty")
    if not 0 <= labels[0] <= labels[-1] < len(class_names):
        wrong = labels[0] if labels[0] < 0 else labels[-1]
        raise ConfigError(f"eval_data={str(folder)!r}: class index {wrong}, but there are {len(class_names)} class names")
    return _zero_shot(f"zero_shot_{folder.name}", samples, class_names, templates)


def _label(row: dict[str, Any]) -> int:
    try:
        return int(row["cls"])
    except (KeyError, ValueError):
        raise ConfigError(f"sample {row.get('__key__')!r}: has no class index in its field cls") from None


def _retrieval_set(folder: Path, paths: list[str], decoder: PairDecoder) -> EvaluationSet:
    streams = [open_stream(path, split="test") for path in paths]
    by_line = _one_caption_a_line(folder)
    if by_line:
        decoder = PairDecoder()  # the layout fixes the fields, whatever those of the training data are

    def pairs() -> Iterator[tuple[Image.Image, list[str]]]:
        for row in chain(*streams):
            try:
                captions = decoder.captions(row)
                captions = [line for text in captions for line in text.splitlines() if line] if by_line else captions
                yield decoder.picture(row), captions
            except SkippedSample as skipped:
                logger.warning("%s: evaluation leaves out %s (%s)", folder, row.get("__key__"), skipped)

    for stream, path in zip(streams, paths, strict=True):
        first_pair(stream, decoder, path)
    return EvaluationSet(f"retrieval_{folder.name}", lambda model, processor: evaluate_retrieval(model, processor, pairs()))


def _one_caption_a_line(folder: Path) -> bool:
    """Whether this is clip-benchmark's retrieval layout, where the lines of a text file are captions of their own."""
    marker = folder / "dataset_type.txt"
    return marker.is_file() and marker.read_text().strip() == "retrieval"


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
