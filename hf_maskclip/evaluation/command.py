"""`hf-maskclip evaluate`: evaluate a dual encoder, of a folder or Hub id, on one data set or a suite of them."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..distributed import use_share_of_cpus
from ..errors import fail
from ..options import SUITES, TASKS
from .curve import Masks, check_file, masks_of, points_of, run_curve, show_curve
from .datasets.find import Request, find_evaluations
from .datasets.pairs import PairKeys
from .encoder import Encoder
from .results_file import ResultsFile
from .runner import Record, chosen_evaluations, load_encoder, run_into_file
from .suites import tasks_of_suite
from .tasks import Evaluation


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Run the evaluations that the options name, and return what is in the output file.

    The file has one record for each result, is written anew after each, and is what `hf-maskclip report` reads. Where it is
    there already, results of the same weights, data and options are not computed again, and all others in it stay.

    Raises:
        ConfigError: an option, or the data that it names, cannot be used.
    """
    check_options(options)
    masks = masks_of(options.patch_mask, options.mask_ratio) if options.mask_ratio else {}
    about = {"model": options.model, "suite": options.suite or None}
    file = ResultsFile(options.output, about, skip_existing=options.skip_existing)
    if masks:
        check_file(file, masks)
    state = start_processes()
    encoder = load_encoder(
        options.model,
        patch_mask=options.patch_mask,
        precision=options.precision,
        image_backend=options.image_backend,
        batch_size=options.batch_size,
        cache_dir=options.feature_cache,
        show_progress=sys.stderr.isatty(),
        limit=options.limit,
    )
    found, are_new = {}, set()
    try:
        evaluations = evaluations_of(options, encoder)
        for name, record, is_new in _run(encoder, evaluations, masks, file, options.details):
            found[name] = record
            are_new.add(is_new)
            if state.is_main_process:
                print(f"{name}: {numbers_of(record)}{'' if is_new else ', as it stands in the output file'}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the results in {file.path}", file=sys.stderr)
        raise SystemExit(130) from None
    if masks and state.is_main_process:
        show_curve(points_of(found, evaluations, masks), masks, file, is_continued=len(are_new) > 1)
    return file.summary


def _run(
    encoder: Encoder, evaluations: list[Evaluation], masks: Masks, file: ResultsFile, details: str
) -> Iterator[tuple[str, Record, bool]]:
    if masks:
        return run_curve(encoder, evaluations, masks, file, details)
    return run_into_file(encoder, evaluations, file, details)


def list_tasks() -> str:
    """The tasks of each suite as a table: what `--tasks` takes."""
    tasks = [(suite, task) for suite in SUITES for task in tasks_of_suite(suite)]
    lines = [f"{suite:8}{task.family:20}{task.name:36}{task.data}" for suite, task in tasks]
    return "\n".join([f"{'suite':8}{'family':20}{'task':36}data", *lines])


def check_options(options: argparse.Namespace) -> None:
    """Raise a ConfigError for options that do not go together."""
    if not (options.model and options.output):
        fail("give --model and --output")
    if bool(options.suite or options.tasks) == bool(options.data):
        fail("give either --suite or --tasks, or --data with its --task")
    if options.data and not options.task:
        fail(f"--data {options.data}: give its --task, one of {', '.join(TASKS)}")
    if options.suite == "paper" and not Path(options.data_root).is_dir():
        fail(f"--data_root {options.data_root!r}: is no folder; --suite paper reads its data sets there")
    for name in ("batch_size", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            fail(f"--{name} {value}: must be at least 1")


def start_processes() -> PartialState:
    """The processes of `accelerate launch`, on a CPU with its cores shared among them."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.device.type == "cpu":
        use_share_of_cpus()
    return state


def evaluations_of(options: argparse.Namespace, encoder: Encoder) -> list[Evaluation]:
    if not options.data:
        return chosen_evaluations(encoder, options.tasks, options.suite or "", options.data_root)
    request = Request(
        options.task,
        options.split,
        encoder.image_size,
        PairKeys(options.image_key, options.caption_key),
        options.class_names,
        options.templates,
        options.probe,
        is_checked=options.limit is None,
    )
    return find_evaluations(options.data, request)


def numbers_of(record: dict[str, Any]) -> str:
    """Its metrics as one line, in percent with their standard errors, counts as they are, and what was left out."""
    metrics = {key: value for key, value in record.items() if isinstance(value, float) and value <= 1}
    errors = {key: f" ± {100 * error:.1f}" for key, error in record.get("standard_errors", {}).items()}
    shares = ", ".join(f"{key} {value:.1%}{errors.get(key, '')}" for key, value in metrics.items())
    unreadable = {"": record.get("num_undecodable"), "training ": record.get("num_train_undecodable")}
    left_out = "".join(f", {count} unreadable {kind}pictures left out" for kind, count in unreadable.items() if count)
    trial = f", a trial on the first {record['limit']}" if record.get("limit") else ""
    return f"{shares or 'too few pictures for a metric'} (n = {record['n']}{left_out}{trial})"
