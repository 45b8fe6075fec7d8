"""Evaluating a model: the tasks of a suite or evaluations of one's own, one after the other, with a record for each."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import AutoImageProcessor, PreTrainedModel, ProcessorMixin

from ..distributed import usable_cpus
from ..dual_encoders import load_dual_encoder, load_processor
from ..errors import as_config_error, fail
from ..model_folder import find_model
from ..models.patch_mask_registry import find_patch_mask, resolve_patch_mask
from .encoder import Encoder, Work
from .results_file import ResultsFile
from .suites import choose_tasks, open_tasks, suite_of, tasks_of_suite
from .tasks import Evaluation

Record = dict[str, Any]


def evaluate(
    model: str | os.PathLike | PreTrainedModel | Encoder,
    tasks: Sequence[str | Evaluation] = (),
    *,
    suite: str = "",
    data_root: str | os.PathLike = "",
    processor: ProcessorMixin | None = None,
    limit: int | None = None,
    output: str | os.PathLike = "",
    details: str | os.PathLike = "",
) -> dict[str, Record]:
    """Evaluate a dual encoder, and return the record of each result by its name.

    Args:
        model: a folder or Hub id; a model, with its `processor`; or an [`Encoder`], whose batch size, mask and cache are taken.
        tasks: names of tasks or families, such as `"zero_shot_cars"` and `"retrieval"`, of one suite; or evaluations of your
            own data, of [`find_evaluations`]. Empty: all of `suite`.
        suite: `"scenes"`, which needs no data, or `"paper"`; where it is empty, the one that has the tasks.
        data_root: the folder of the papers' data sets. What is missing there is printed, and left out unless it is named.
        limit: take the first pictures of each set only, as a trial; records say so.
        output: a JSON file of results, to which each is added when it is there. Those that it has are not computed again.
        details: a folder for `<name>.jsonl`, each picture's prediction, and `<name>.classes.jsonl`, each class's result.

    Raises:
        ConfigError: a model, a name or data that cannot be used.

    Example:

        evaluate("runs/quickstart/export", ["zero_shot_colour", "retrieval"], suite="scenes")
        evaluate(model, find_evaluations("photos", Request("zero_shot_classification")), processor=processor)
    """
    encoder = _encoder_of(model, processor, limit)
    evaluations = chosen_evaluations(encoder, tasks, suite, str(data_root))
    file = ResultsFile(output, {"model": _name_of(model), "suite": suite or None}) if output else None
    return {name: record for name, record, _ in run_into_file(encoder, evaluations, file, details)}


def chosen_evaluations(
    encoder: Encoder, tasks: Sequence[str | Evaluation], suite: str = "", data_root: str = ""
) -> list[Evaluation]:
    """The evaluations that [`evaluate`] runs. All are opened first; what they read is looked through when its turn comes."""
    own = [task for task in tasks if isinstance(task, Evaluation)]
    names = [task for task in tasks if isinstance(task, str)]
    if not suite and not names:
        return own if own else fail("tasks: name some, or a suite")
    of_suite = tasks_of_suite(suite or suite_of(names), encoder.image_size, data_root)
    return [*own, *open_tasks(choose_tasks(of_suite, names), names)]


def run_into_file(
    encoder: Encoder, evaluations: Iterable[Evaluation], file: ResultsFile | None, details: str | os.PathLike = ""
) -> Iterator[tuple[str, Record, bool]]:
    """The name and the record of each result, and whether it is new. New ones are in the file before they are given.

    Args:
        details: a folder, as [`evaluate`] says.

    Raises:
        ConfigError: the file has results of other weights, data or options.
    """
    if file:
        file.check_model(encoder.model_hash)
    finished = file.finished if file else None
    is_main = PartialState().is_main_process
    for name, record in run_evaluations(encoder, evaluations, finished, Path(details) if details else None):
        is_new = file is None or record is not file.results.get(name)
        if file and is_new and is_main:
            file.add(name, record)
        yield name, record, is_new


def run_evaluations(
    encoder: Encoder,
    evaluations: Iterable[Evaluation],
    finished: Callable[[str, Record], Record | None] | None = None,
    details: Path | None = None,
) -> Iterator[tuple[str, Record]]:
    """The name and the record of each result, as soon as it is there.

    Args:
        finished: from a name, and what its record says of data and options, to a record that need not be computed again.
        details: a folder, as [`evaluate`] says.
    """
    for evaluation in evaluations:
        name = evaluation.name
        about = {"family": evaluation.family, "column": evaluation.column} | evaluation.about | encoder.describe()
        passing = {"versions", "model_family", "texts", "batch_size"}  # what follows from the model, or changes nothing
        expected = {key: value for key, value in about.items() if key not in passing}
        record = finished(name, expected) if finished else None
        if record is None or (details and not (details / f"{name}.jsonl").is_file()):
            record = _run(evaluation, encoder, details) | about
        yield name, record


def _run(evaluation: Evaluation, encoder: Encoder, details: Path | None) -> Record:
    """The metrics, with the speed of what was encoded for them. Features that were there before have none."""
    if encoder.limit is None:
        evaluation.check()
    before = encoder.work
    record = evaluation.run(encoder, details=True) if details else evaluation.run(encoder)
    found = record.pop("details", None)
    if details and PartialState().is_main_process:
        _write_details(found, details, evaluation.name)
    return record | {"speed": _speed(before, encoder.work), "hardware": _hardware(encoder)}


def _speed(before: Work, after: Work) -> dict[str, float] | None:
    """Of the pictures that were encoded in between, with the mean over them of the share of patches that was encoded."""
    pictures, seconds = after.pictures - before.pictures, after.seconds - before.seconds
    if not pictures:
        return None
    kept_share = (after.kept_shares - before.kept_shares) / pictures
    return {"images": pictures, "seconds": seconds, "images_per_second": pictures / seconds, "kept_share": kept_share}


def _write_details(found: dict[str, list[dict[str, Any]]], folder: Path, name: str) -> None:
    """Lines of JSON: the predictions last, for their file says that both are whole."""
    files = {"per_class": f"{name}.classes.jsonl", "predictions": f"{name}.jsonl"}
    with as_config_error("details", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for part, file in files.items():
            if part in found:
                lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found[part])
                unfinished = folder / f"{file}.unfinished"
                unfinished.write_text(lines, encoding="utf-8")
                unfinished.replace(folder / file)


def _hardware(encoder: Encoder) -> str:
    device = encoder.model.device
    kind = f"{usable_cpus()} CPUs" if device.type == "cpu" else device.type
    processes = PartialState().num_processes
    return kind if processes == 1 else f"{processes} processes, {kind}"


def _encoder_of(
    model: str | os.PathLike | PreTrainedModel | Encoder, processor: ProcessorMixin | None, limit: int | None
) -> Encoder:
    if isinstance(model, Encoder):
        if processor is not None or limit is not None:
            fail("evaluate: an Encoder has its own processor and limit; give them to it")
        return model
    if isinstance(model, torch.nn.Module):
        if processor is None:
            fail("evaluate: a model needs its processor, such as AutoProcessor.from_pretrained(folder)")
        return Encoder(model, processor, limit=limit)
    return load_encoder(str(model), limit=limit)


def read_patch_mask(text: str) -> dict[str, Any]:
    """All options of the mask that a name or `{name: ...}` is of; `""` is none. Raises ConfigError where it is of no mask."""
    with as_config_error("patch_mask", text):
        return resolve_patch_mask(yaml.safe_load(text or "none"))


def load_encoder(
    model: str, *, patch_mask: str = "", precision: str = "float32", image_backend: str = "pil", **options: Any
) -> Encoder:
    """An [`Encoder`] of a folder of a model or a run, or of a Hub id, on the device of this process.

    Args:
        patch_mask: a name or `{name: ...}`, by which pictures are encoded; `""`: whole pictures.
        precision: `float32` or `bfloat16`.
        image_backend: `pil`, whose pixels are open_clip's, or `torchvision`.
        options: of the Encoder.

    Raises:
        ConfigError: it cannot be loaded.
    """
    folder = find_model(model)
    mask = read_patch_mask(patch_mask)
    loaded = load_dual_encoder(folder, mask, dtype=getattr(torch, precision))
    processor = load_processor(folder)
    with as_config_error("model", folder):
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend=image_backend)
    masks = not find_patch_mask(mask["name"]).keeps_all
    return Encoder(loaded.to(PartialState().device), processor, apply_patch_mask=masks, **options)


def _name_of(model: str | os.PathLike | PreTrainedModel | Encoder) -> str:
    if isinstance(model, Encoder):
        return _name_of(model.model)
    return (model.name_or_path or type(model).__name__) if isinstance(model, torch.nn.Module) else str(model)
