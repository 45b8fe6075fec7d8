"""Compare patch masks that are trained alike: methods x seeds x budgets, each run a call of `training/train.py`, one at a time.

    python -m training.study training/study/scenes.yaml --output_dir runs/study-scenes
    python -m training.study training/study/scenes.yaml --output_dir runs/study-scenes --report_only

The budget `samples` gives each method the steps of `base`. The budget `time` gives it as many as take the time that the study's
baseline took, which is the method `none` where it names no other: the steps of `base` times the seconds a step of the baseline,
over those of the method, each the least of its seeds. The budget `tokens`, where a study asks for it, gives it the steps
that encode as many patches as the baseline's. Warm-up, evaluations and the last steps on whole images keep their share.

Runs of `samples` go first, so that all seeds have the same time, and seed by seed, so that what is finished can be compared. A
finished run is a JSON in `results/` and is never run again. One that was interrupted begins anew, for a time of one piece.
SIGTERM and Ctrl-C end the study, and the same command goes on. After each run the report is written, and `results.jsonl`, which
gathers what is finished.
"""

import argparse
import fcntl
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from hf_maskclip.errors import ConfigError, fail
from hf_maskclip.models.patch_mask_registry import resolve_patch_mask
from training.config import load_config
from training.study.report import BUDGETS, Report, read_results, write_results
from training.study.run import Study, StudyRun, as_arguments, carry_out, machine_of, steps_ratio

OWN_OPTIONS = ("output_dir", "patch_mask", "seed", "samples_seen", "log_every", "checkpoint_every", "resume")


def read_study(path: Path) -> Study:
    """Raises ConfigError where the file is no study, or a run of it could not start for its options."""
    if not path.is_file():
        fail(f"study {str(path)!r}: no such file")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = [item.name for item in fields(Study)]
    needed = known[: known.index("peers")]
    if not isinstance(values, dict) or not set(needed) <= set(values) <= set(known):
        fail(f"study {str(path)!r}: must have {', '.join(needed)}, and may have {', '.join(known[len(needed) :])}")
    study = Study(**values)
    kinds = {name: dict for name in ("base", "methods", "columns", "peers")}
    kinds |= {name: list for name in ("seeds", "rivals", "budgets", "fewer_seeds", "samples_only", "further_seeds")}
    for name, kind in kinds.items():
        if not isinstance(value := getattr(study, name), kind):
            fail(f"{path}: {name} {value!r}: must be a {'mapping' if kind is dict else 'list'}")
    if taken := set(OWN_OPTIONS) & set(study.base):
        fail(f"{path}: base has {', '.join(sorted(taken))}, which the study sets by itself")
    if not study.base.get("max_steps"):
        fail(f"{path}: base has no max_steps, the budget of a run")
    if taken := {key for own in study.own_options.values() for key in own} & {*OWN_OPTIONS, "max_steps"} - {"patch_mask"}:
        fail(f"{path}: a method has {', '.join(sorted(taken))}, which the study sets by itself, or is the same for all")
    if study.baseline not in list(study.methods):
        fail(f"{path}: methods has no {study.baseline!r}, with which the others are compared")
    if wrong := [name for name in study.own_options if "/" in name]:
        fail(f"{path}: method {wrong[0]!r}: a name must have no slash")
    if not {"samples"} <= set(study.budgets) <= set(BUDGETS):
        fail(f"{path}: budgets {study.budgets!r}: must have samples, and may have {', '.join(list(BUDGETS)[1:])}")
    for name, given in (("fewer_seeds", study.fewer_seeds), ("samples_only", study.samples_only), ("rivals", study.rivals)):
        if wrong := [method for method in given if method not in study.own_options]:
            fail(f"{path}: {name} {wrong[0]!r}: must be among the methods and peers")
    if study.headline not in study.columns:
        fail(f"{path}: headline {study.headline!r}: must be one of the columns {', '.join(study.columns)}")
    for run in runs_of(study, Path("runs")):
        load_config(as_arguments(run.options()))
    return study


def runs_of(study: Study, output_dir: Path) -> list[StudyRun]:
    """All runs in their order: equal samples before the equal times that all of these give, and seed by seed."""
    return [
        StudyRun(study, output_dir, seed, budget, method)
        for budget in BUDGETS
        if budget in study.budgets
        for seed in study.all_seeds
        for method in study.own_options
        if budget == "samples" or method not in (study.baseline, *study.samples_only)  # the baseline's equal time is its own
        if seed in study.seeds or method not in study.minor
    ]


@contextmanager
def locked(output_dir: Path) -> Iterator[Any]:
    """Hold a study's folder. Raises ConfigError where another study does, or a run that it left behind."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "study.lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"output_dir={str(output_dir)!r}: another study, or a run that it left behind, is at work there")
        yield lock


def check_finished(runs: list[StudyRun]) -> None:
    """Raise ConfigError where a finished run has other options than the study has now, or columns that are not its."""
    for run in runs:
        if result := run.read_result():
            own = run.study.own_options[run.method]
            there = result.get("options", {}) | {"patch_mask": resolve_patch_mask(result["patch_mask"])}
            if result["base"] != run.study.base or there != own | {"patch_mask": resolve_patch_mask(own["patch_mask"])}:
                fail(f"{run.result}: was made with other options than the study has; give another --output_dir, or remove it")
            check_columns(run.study, result)


def check_machines(runs: list[StudyRun]) -> None:
    """Raise ConfigError where runs of equal time are left, and those of equal samples are of two machines, or would be.

    Equal times follow the seconds of equal samples. So they may be trained on another machine, with the steps of the first.
    """
    if all(run.result.exists() for run in runs if run.budget == "time"):
        return
    of_samples = (run for run in runs if run.budget == "samples")
    machines = [result["machine"] if (result := run.read_result()) else machine_of(run) for run in of_samples]
    found = {f"{machine['processor']}, {machine['cpus']} CPUs" for machine in machines}
    if len(found) > 1:
        two = " and of ".join(sorted(found))
        fail(f"{runs[0].output_dir}: its equal samples would be of {two}, so that no time is equal; give another --output_dir")


def check_columns(study: Study, result: dict[str, Any]) -> None:
    """Raise ConfigError for a metric that runs do not have; the headline's are needed while they train."""
    for column, keys in study.columns.items():
        known = result["curve"][-1]["metrics"] if column == study.headline and result["curve"] else result["metrics"]
        if absent := [key for key in keys if key not in known]:
            fail(f"column {column!r}: {absent[0]!r} is no metric of the runs, which are {', '.join(sorted(known))}")


def write_report(study: Study, output_dir: Path) -> list[dict[str, Any]]:
    """Write `results.jsonl`, `report.md` and `accuracy_over_time.png` from whatever is finished, which is returned."""
    results = read_results(output_dir / "results")
    if results:
        write_results(results, output_dir / "results.jsonl")
        report = Report(results, list(study.own_options), study.columns, study.headline, study.rivals, study.baseline)
        (output_dir / "report.md").write_text(report.markdown(), encoding="utf-8")
        report.figure().savefig(output_dir / "accuracy_over_time.png", dpi=150)
    return results


def run_all(runs: list[StudyRun], lock: Any) -> int:
    """Carry out what is not finished. Returns how many runs failed or had to be left out; the others go on without them."""
    num_failed = 0
    for number, run in enumerate(runs, start=1):
        if run.result.exists():
            continue
        name = f"[{number}/{len(runs)}] {run.method}, seed {run.seed}, {BUDGETS[run.budget].lower()}"
        ratio = steps_ratio(run)
        if ratio is None:
            print(f"{name}: left out, the run with equal samples of it or of {run.study.baseline} failed", flush=True)
            num_failed += 1
            continue
        try:
            result = carry_out(run, ratio, lock)
            check_columns(run.study, result)
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error.cmd[0]} ended with {error.returncode}, see {run.log}", flush=True)
            num_failed += 1
            continue
        results = write_report(run.study, run.output_dir)
        left = sum(not other.result.exists() for other in runs[number:])
        hours = left * statistics.mean(other["wall_seconds"] for other in results) / 3600
        value = statistics.mean(result["metrics"][key] for key in run.study.columns[run.study.headline])
        took = f"{result['steps']} steps in {result['train_seconds']:.0f} s, {result['wall_seconds']:.0f} s with evaluation"
        print(f"{name}: {took}; {run.study.headline} {value:.1%}; {left} runs, about {hours:.1f} h left", flush=True)
    return num_failed


def program(arguments: list[str]) -> int:
    """The command line; returns the exit code: 0, 1 where runs failed, 2 after a line that says what cannot be used, or 130."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file, such as training/study/scenes.yaml")
    parser.add_argument("--output_dir", type=Path, required=True, help="where runs, results and the report go")
    parser.add_argument("--report_only", action="store_true", help="write the report of what is finished, and run nothing")
    options = parser.parse_args(arguments)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        study = read_study(options.study)
        if options.report_only:
            num_finished = len(write_report(study, options.output_dir))
            print(f"{num_finished} finished runs" + (f": {options.output_dir}/report.md" if num_finished else ", no report"))
            return 0
        runs = runs_of(study, options.output_dir)
        with locked(options.output_dir) as lock:
            check_finished(runs)
            check_machines(runs)
            num_failed = run_all(runs, lock)
            write_report(study, options.output_dir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ended before its end; the same command goes on from the last finished run", flush=True)
        return 130
    finally:
        signal.signal(signal.SIGTERM, former)
    print(f"{len(runs) - num_failed} of {len(runs)} runs are finished: {options.output_dir}/report.md")
    return 1 if num_failed else 0
