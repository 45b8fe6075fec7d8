"""The results on a card: those of the repository's own weights on whole pictures, as tables, in words, and for the Hub."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult

from ..errors import fail
from ..evaluation.encoder import hash_of_weights
from ..evaluation.report import mask_of
from ..evaluation.report_files import ResultFile

# The Hub's task of each family: a picture and two captions are two candidate labels; retrieval is by features.
TASKS = {
    "zero_shot": ("zero-shot-image-classification", "Zero-Shot Image Classification"),
    "robustness": ("zero-shot-image-classification", "Zero-Shot Image Classification"),
    "compositionality": ("zero-shot-image-classification", "Zero-Shot Image Classification"),
    "linear_probe": ("image-classification", "Image Classification"),
    "retrieval": ("image-feature-extraction", "Image Feature Extraction"),
}
METRICS = {"top1": "accuracy", "top5": "accuracy", "accuracy": "accuracy", "mean_per_class": "recall"}
METRICS |= {"mean_average_precision": "mean_average_precision"}
METRICS |= {f"{way}_recall@{k}": "recall" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
WORDS = {
    "zero_shot": "The label whose prompts are nearest to a picture is the prediction.",
    "retrieval": "A text column finds captions by their picture, an image column pictures by their caption.",
    "linear_probe": "A linear classifier is fitted to the features of training pictures.",
    "robustness": "ID avg is the mean of all columns, OOD avg that of all but the first.",
    "compositionality": "Of a true caption and one that is wrong in one word or two, the nearer to the picture is chosen.",
}


def check_own(files: Iterable[ResultFile], weights: dict[str, torch.Tensor]) -> None:
    """Raise a ConfigError for results of other weights, of a part of the pictures, or under a patch mask."""
    hashes: dict[str, str] = {}
    for file in files:
        for record in file.records:
            precision = record.get("precision", "float32")
            if precision not in hashes:
                kind = getattr(torch, precision)
                hashes[precision] = hash_of_weights({k: w.to(kind) if w.is_floating_point() else w for k, w in weights.items()})
            place = f"{file.path}: {record['family']} {record['column']}"
            hint = "move the file out of the run's folder"
            if record["model_hash"] != hashes[precision]:
                fail(f"{place} is of other weights ({record['model_hash']}, the export has {hashes[precision]}): {hint}")
            if mask := mask_of(record):
                fail(f"{place} was measured under the patch mask {mask}, and a card's results are on whole pictures: {hint}")
            if record.get("limit"):
                fail(f"{place} is a trial on the first {record['limit']} pictures: {hint}")


def eval_results(name: str, record: dict[str, Any]) -> list[EvalResult]:
    """The shares of a record, for the `model-index`: the Hub's names, with ours as the names of task and metric."""
    data = {"dataset_type": Path(record["data"]).name, "dataset_config": record["column"], "dataset_split": record["split"]}
    data["dataset_name"] = f"{record['column']}, {record['family'].replace('_', ' ')}"
    task, _ = TASKS[record["family"]]
    return [
        EvalResult(task_type=task, task_name=name, metric_type=METRICS[key], metric_name=key, metric_value=value, **data)
        for key, value in record.items()
        if key in METRICS and isinstance(value, float)
    ]


def notes_on(family: str, source: str, records: Iterable[dict[str, Any]]) -> str:
    """What the table of a family says: in words, then of how many pictures each column is, and what chance would give."""
    parts = [_size_of(r) for r in records if r["family"] == family and (r["data"] if source else "") == source]
    return f"{WORDS[family]} {'; '.join(parts)}.\n"


def _size_of(record: dict[str, Any]) -> str:
    column, pictures = record["column"].replace("_", " "), f"{record['n']:,} pictures"
    if record.get("num_undecodable"):
        pictures += f" ({record['num_undecodable']:,} unreadable ones left out)"
    if record["family"] == "retrieval":
        return f"{column}: {pictures}, {record['num_texts']:,} captions, chance at 1 is {100 / record['num_texts']:.1f}"
    if record["family"] == "compositionality":
        return f"{column}: {pictures}, chance is 50"
    classes = record.get("num_classes")
    has_chance = classes and "mean_average_precision" not in record
    return f"{column}: {pictures}" + (f", {classes} classes, chance is {100 / classes:.1f}" if has_chance else "")


def read_records(run_dir: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and record of each result in a run's folder, once where several files have it."""
    found: list[tuple[str, dict[str, Any]]] = []
    for path in sorted(run_dir.glob("eval*.json")):
        items = json.loads(path.read_text(encoding="utf-8"))["results"].items()
        found += [item for item in items if item not in found]
    return found
