"""The files that a report is made of, each read once: of `hf-maskclip evaluate`, runs' `eval.json`, and clip_benchmark's."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.scene_sets import COMPOSITIONALITY_KINDS
from ..errors import fail
from .datasets.papers import LINEAR_PROBE, RETRIEVAL, ROBUSTNESS, ZERO_SHOT
from .datasets.sugar_crepe import file_name

CLIP_BENCHMARK = ("dataset", "model", "pretrained", "task", "metrics")  # the keys of its files
RANKS = [1, 5, 10]  # at which the tables have recall
# Of each of its tasks: the families that a data set may be of, ours for its metrics, and the columns by its names.
_COMPOSITIONALITY = {kind: f"sugar_crepe-{file_name(kind).removesuffix('.json')}" for kind in COMPOSITIONALITY_KINDS}
_RECALLS = {
    f"{theirs}_retrieval_recall@{k}": f"{ours}_recall@{k}"
    for theirs, ours in (("text", "image_to_text"), ("image", "text_to_image"))
    for k in RANKS
}
_TASKS: dict[str, tuple[dict[str, dict[str, str]], dict[str, str]]] = {
    "zeroshot_classification": (
        {"zero_shot": ZERO_SHOT, "robustness": ROBUSTNESS},
        {"acc1": "top1", "acc5": "top5", "mean_average_precision": "mean_average_precision"},
    ),
    "zeroshot_retrieval": ({"retrieval": RETRIEVAL}, _RECALLS),
    "linear_probe": ({"linear_probe": LINEAR_PROBE}, {"lp_acc1": "top1", "lp_acc5": "top5"}),
    "image_caption_selection": ({"compositionality": _COMPOSITIONALITY}, {"text_acc": "accuracy"}),
}


@dataclass(frozen=True)
class ResultFile:
    """A file of results.

    Attributes:
        model: what it calls its model; empty where it does not say.
        weights: what tells its weights apart; empty where it does not say.
        records: of the results, in our form.
        is_ours: else it is clip_benchmark's, whose folder says nothing of its model.
        left_out: why its result is in no table.
    """

    path: Path
    model: str
    weights: str
    records: list[dict[str, Any]]
    is_ours: bool = True
    left_out: str = ""


def read_result_file(path: Path) -> ResultFile:
    """Read one file. Raises ConfigError where it is none of results."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and all(key in content for key in CLIP_BENCHMARK):
            return _of_clip_benchmark(path, content)
        records = list(content["results"].values())
        hashes = {record["model_hash"] for record in records if record.get("model_hash")}
    except OSError as error:
        fail(f"{path}: cannot be read ({error})")
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f"{path}: is no file of results (of hf-maskclip evaluate, eval.json of a run, or of clip_benchmark)")
    model = str(content.get("model") or "")
    return ResultFile(path, model, " ".join(sorted(hashes)) or model, records)


def _of_clip_benchmark(path: Path, content: dict[str, Any]) -> ResultFile:
    """A file of `clip_benchmark eval`: one result of one model on one data set."""
    model = " ".join(part for part in (content["model"], content["pretrained"]) if part)
    name = str(content["dataset"]).removeprefix("wds/").removeprefix("wds_").replace("/", "-")
    families, metrics = _TASKS.get(content["task"], ({}, {}))
    columns = {
        family: column
        for family, names in families.items()
        for column, theirs in names.items()
        if name.removeprefix("vtab-") == theirs.removeprefix("vtab-")
    }
    found = {ours: content["metrics"][theirs] for theirs, ours in metrics.items() if theirs in content["metrics"]}
    reason = _why_not(content, columns, found)
    about = {"data": content["dataset"], "task": content["task"]}
    records = [found | about | {"family": family, "column": column} for family, column in columns.items()]
    return ResultFile(path, model, model, [] if reason else records, is_ours=False, left_out=reason)


def _why_not(content: dict[str, Any], columns: dict[str, str], found: dict[str, float]) -> str:
    """Why a result of clip_benchmark is none of the tables'; empty where it is one."""
    what = f"{content['task']} on {content['dataset']}"
    if not columns:
        return f"{what}: is in no table here"
    if content.get("language", "en") != "en":
        return f"{what}: in the language {content['language']!r}, the tables are English"
    if content["metrics"].get("fewshot_k", -1) != -1:
        return f"{what}: of {content['metrics']['fewshot_k']} pictures a class, the table is of all"
    recalls = [k for k in RANKS if f"image_to_text_recall@{k}" in found]
    if "retrieval" in columns and (not recalls or recalls != RANKS[: len(recalls)]):
        return f"{what}: without recall at 1, or at 5 before 10, which clip_benchmark gives with --recall_k 1 5 10"
    return "" if found else f"{what}: has none of the metrics of the table"


def names_of_models(files: Iterable[ResultFile]) -> dict[Path, str]:
    """The name of each file's model: that of its folder, with the model's own where the folder has results of several."""
    files = list(files)
    ours = [file for file in files if file.is_ours]
    names = {file.path: file.model for file in files if not file.is_ours}
    for file in ours:
        folder = file.path.resolve().parent
        beside = {other.weights for other in ours if other.path.resolve().parent == folder and other.weights}
        is_shared = any(other.model == file.model and other.weights != file.weights for other in ours)
        own = f"{file.model or file.path.stem} {file.weights[:8]}" if is_shared else file.model
        names[file.path] = f"{folder.name}, {own or file.path.stem}" if len(beside) > 1 else folder.name
    return names
