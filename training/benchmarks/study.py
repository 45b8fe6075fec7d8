"""Compare patch masks that are trained alike: methods x seeds x budgets, each run a call of `training/train.py`, one at a time.

    python training/benchmarks/study.py training/benchmarks/study-scenes.yaml --output_dir runs/study-scenes
    python training/benchmarks/study.py training/benchmarks/study-scenes.yaml --output_dir runs/study-scenes --report_only

The budget `samples` gives each method the steps of `base`. The budget `time` gives it as many as take the time that the method
`none` took: the steps of `base` times the seconds a step of `none`, over those of the method, of the same seed; warm-up,
evaluations and the last steps on whole images keep their share of the run. Runs go seed by seed, so that what is finished can
be compared. A finished run is a JSON in `results/` and is never run again; a run that was interrupted begins anew, so that its
time is that of one piece. SIGTERM and Ctrl-C end the study, and the same command goes on. The report is written after each run.
"""

import argparse
import fcntl
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__":  # run as a script, it finds its package, and not itself or its siblings in the place of others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training.benchmarks.study_report import BASELINE, BUDGETS, Report, read_results
from training.config import load_config
from training.errors import ConfigError, fail
from training.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[2]
OWN_OPTIONS = ("output_dir", "patch_mask", "seed", "samples_seen", "log_every", "checkpoint_every", "resume")
SCALED_OPTIONS = ("max_steps", "warmup_steps", "eval_every", "unmasked_tuning_steps")
PACKAGES = ("hf_maskclip", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Study:
    """What a study's YAML says.

    Args:
        base: options of `training/train.py` that all runs share.
        methods: name -> patch mask; `none` is what the others are compared with.
        peers: name -> a random patch mask, whose ratio is the patch dropout of open_clip's model (`study_peer.py`).
        columns: of the report, name -> the metrics that it is the mean of, such as `zero_shot_pair/top1`.
        headline: the column that is drawn over time; its metrics are of the run's own evaluations.
        suite: of `training/evaluate.py`, on the final model; empty: the run's own evaluations only.
    """

    base: dict[str, Any]
    methods: dict[str, Any]
    seeds: list[int]
    columns: dict[str, list[str]]
    headline: str
    peers: dict[str, Any] = field(default_factory=dict)
    suite: str = ""
    budgets: tuple[str, ...] = BUDGETS

    @property
    def masks(self) -> dict[str, Any]:
        return self.methods | self.peers


@dataclass(frozen=True)
class StudyRun:
    """One training of a study, and its places in the study's folder."""

    study: Study
    output_dir: Path
    seed: int
    budget: str
    method: str

    @property
    def place(self) -> Path:
        return Path(self.budget, self.method.replace(" ", "-"), f"seed-{self.seed}")

    @property
    def folder(self) -> Path:
        return self.output_dir / "runs" / self.place

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def result(self) -> Path:
        return (self.output_dir / "results" / self.place).with_suffix(".json")

    def options(self, time_ratio: float = 1.0) -> dict[str, Any]:
        """Those of `training/train.py`, the steps scaled by a ratio."""
        scaled = {name: self.study.base[name] for name in SCALED_OPTIONS if self.study.base.get(name, 0) > 0}
        scaled = {name: max(1, round(time_ratio * count)) for name, count in scaled.items()}
        own = {"output_dir": str(self.folder), "patch_mask": self.study.masks[self.method], "seed": self.seed}
        return self.study.base | scaled | own


def read_study(path: Path) -> Study:
    """Raises ConfigError where the file is no study, or a run of it could not start for its options."""
    if not path.is_file():
        fail(f"study {str(path)!r}: no such file")
    values = yaml.safe_load(path.read_text())
    known = [item.name for item in fields(Study)]
    needed = known[: known.index("peers")]
    if not isinstance(values, dict) or not set(needed) <= set(values) <= set(known):
        fail(f"study {str(path)!r}: must have {', '.join(needed)}, and may have {', '.join(known[len(needed) :])}")
    study = Study(**values)
    if taken := set(OWN_OPTIONS) & set(study.base):
        fail(f"{path}: base has {', '.join(sorted(taken))}, which the study sets by itself")
    if not study.base.get("max_steps"):
        fail(f"{path}: base has no max_steps, the budget of a run")
    if BASELINE not in study.methods:
        fail(f"{path}: methods has no {BASELINE!r}, with which the others are compared")
    if wrong := [name for name in study.masks if "/" in name]:
        fail(f"{path}: method {wrong[0]!r}: a name must have no slash")
    if wrong := [budget for budget in study.budgets if budget not in BUDGETS]:
        fail(f"{path}: budget {wrong[0]!r}: must be one of {', '.join(BUDGETS)}")
    if study.headline not in study.columns:
        fail(f"{path}: headline {study.headline!r}: must be one of the columns {', '.join(study.columns)}")
    for run in runs_of(study, Path("runs")):
        load_config(as_arguments(run.options()))
    return study


def runs_of(study: Study, output_dir: Path) -> list[StudyRun]:
    """All runs in their order: seed by seed, equal samples before the equal times that these give."""
    return [
        StudyRun(study, output_dir, seed, budget, method)
        for seed in study.seeds
        for budget in BUDGETS
        if budget in study.budgets
        for method in study.masks
        if budget == "samples" or method != BASELINE  # whose equal time is that of its equal samples
    ]


def as_arguments(options: dict[str, Any]) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


# ---------------------------------------------------------------------------------------------------------- one run


def seconds_per_step(records: list[dict[str, Any]], tuning_steps: int) -> float:
    """The mean over the steps of a run: the median of its masked steps and that of its last steps, on whole images, in their
    shares. So a step that something else on the machine held up does not count, and both kinds of step do.

    Args:
        records: of all steps of a run.
    """
    seconds = [record["step_seconds"] for record in records]
    first, last = seconds[: len(seconds) - tuning_steps], seconds[len(seconds) - tuning_steps :]
    return sum(len(part) * statistics.median(part) for part in (first, last) if part) / len(seconds)


def learning_curve(records: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    """The evaluations of a `metrics.jsonl`, each with the seconds of training before it; evaluating does not count."""
    points, seconds = [], 0.0
    for record in records:
        seconds += record.get("step_seconds", 0.0)
        if metrics := {key.removeprefix("eval/"): value for key, value in record.items() if key.startswith("eval/")}:
            place = {"step": record["step"], "seconds": seconds, "samples_seen": record["step"] * batch_size}
            points.append(place | {"metrics": only_scores(metrics)})
    return points


def only_scores(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: round(value, 6) for key, value in metrics.items() if isinstance(value, float)}


def time_ratio(run: StudyRun) -> float | None:
    """What a run's steps are scaled by; None where the runs that say so are not finished."""
    if run.budget == "samples":
        return 1.0
    finished = [StudyRun(run.study, run.output_dir, run.seed, "samples", method).result for method in (BASELINE, run.method)]
    if not all(path.exists() for path in finished):
        return None
    baseline, own = (json.loads(path.read_text())["seconds_per_step"] for path in finished)
    return baseline / own


def carry_out(run: StudyRun, ratio: float, lock: Any) -> dict[str, Any]:
    """Train and evaluate in processes of their own, which leave no state and no memory behind; write and return the result.

    Raises:
        subprocess.CalledProcessError: one of these failed.
    """
    start = time.perf_counter()
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    run.log.unlink(missing_ok=True)
    options = run.options(ratio)
    program = "training/benchmarks/study_peer.py" if run.method in run.study.peers else "training/train.py"
    call([program, *as_arguments(options)], run.log, lock)
    if run.study.suite:
        places = ["--model", str(run.folder / "export"), "--output", str(run.folder / f"eval_{run.study.suite}.json")]
        call(["training/evaluate.py", "--suite", run.study.suite, *places], run.log, lock)
    result = result_of(run, options) | {"wall_seconds": round(time.perf_counter() - start, 1)}
    if run.seed != run.study.seeds[0]:
        shutil.rmtree(run.folder / "export")
    run.result.parent.mkdir(parents=True, exist_ok=True)
    aside = run.result.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.rename(run.result)
    return result


def call(command: list[str], log: Path, lock: Any) -> None:
    """Run one of the project's programs. It holds the study's lock too, should it outlive the study."""
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / command[0]), *command[1:]],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it ends with its data workers, and Ctrl-C reaches the study alone
            pass_fds=[lock.fileno()],
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code:
        raise subprocess.CalledProcessError(code, command)


def result_of(run: StudyRun, options: dict[str, Any]) -> dict[str, Any]:
    """All that the report needs to know of a run, and under what it was made."""
    records = read_metrics(run.folder / "metrics.jsonl")
    summary = json.loads((run.folder / "eval.json").read_text())
    evaluations = summary["results"]
    if run.study.suite:
        evaluations |= json.loads((run.folder / f"eval_{run.study.suite}.json").read_text())["results"]
    metrics = {f"{name}/{key}": value for name, record in evaluations.items() for key, value in record.items()}
    tuning_steps = options.get("unmasked_tuning_steps", 0)
    return {
        "method": run.method,
        "patch_mask": run.study.masks[run.method],
        "seed": run.seed,
        "budget": run.budget,
        "base": run.study.base,
        "steps": summary["steps"],
        "samples_seen": summary["samples_seen"],
        "train_seconds": summary["train_seconds"],
        "seconds_per_step": seconds_per_step([record for record in records if "loss" in record], tuning_steps),
        "curve": learning_curve(records, summary["samples_seen"] // summary["steps"]),
        "metrics": only_scores(metrics),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": {"processor": processor_name(), "threads": os.cpu_count()},
        "commit": commit(),
    }


def processor_name() -> str:
    info = Path("/proc/cpuinfo")  # Linux, where `platform` knows the architecture only
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str | None:
    """That of the checkout; None where there is none."""
    if not (ROOT / ".git").exists():
        return None
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or None


# ---------------------------------------------------------------------------------------------------------- all runs


@contextmanager
def locked(output_dir: Path) -> Iterator[Any]:
    """Hold a study's folder. Raises ConfigError where another study does, or a run that it left behind."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "study.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"output_dir={str(output_dir)!r}: another study, or a run that it left behind, is at work there")
        yield lock


def check_finished(runs: list[StudyRun]) -> None:
    """Raise ConfigError where a finished run is one of other options than the study has now."""
    for run in runs:
        if run.result.exists():
            result = json.loads(run.result.read_text())
            if (result["base"], result["patch_mask"]) != (run.study.base, run.study.masks[run.method]):
                fail(f"{run.result}: was made with other options than the study has; give another --output_dir, or remove it")


def run_all(runs: list[StudyRun], report: "ReportFiles", lock: Any) -> int:
    """Carry out what is not finished. Returns how many runs failed or had to be left out; the others go on without them."""
    num_failed = 0
    for number, run in enumerate(runs, start=1):
        if run.result.exists():
            continue
        name = f"[{number}/{len(runs)}] {run.method}, seed {run.seed}, equal {run.budget}"
        ratio = time_ratio(run)
        if ratio is None:
            print(f"{name}: left out, the run with equal samples of it or of {BASELINE} failed", flush=True)
            num_failed += 1
            continue
        try:
            result = carry_out(run, ratio, lock)
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error.cmd[0]} ended with {error.returncode}, see {run.log}", flush=True)
            num_failed += 1
            continue
        results = report.write()
        left = sum(not other.result.exists() for other in runs[number:])
        hours = left * statistics.mean(other["wall_seconds"] for other in results) / 3600
        value = statistics.mean(result["metrics"][key] for key in run.study.columns[run.study.headline])
        took = f"{result['steps']} steps in {result['train_seconds']:.0f} s, {result['wall_seconds']:.0f} s with evaluation"
        print(f"{name}: {took}; {run.study.headline} {value:.1%}; {left} runs, about {hours:.1f} h left", flush=True)
    return num_failed


@dataclass
class ReportFiles:
    """`report.md` and `accuracy_over_time.png` of a study's folder."""

    study: Study
    output_dir: Path

    def write(self) -> list[dict[str, Any]]:
        """From whatever is finished, which is returned."""
        results = read_results(self.output_dir / "results")
        if results:
            report = Report(results, list(self.study.masks), self.study.columns, self.study.headline)
            (self.output_dir / "report.md").write_text(report.markdown())
            report.figure().savefig(self.output_dir / "accuracy_over_time.png", dpi=150)
        return results


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code: 0, 1 where runs failed, 2 after a line that says what cannot be used, or 130."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file, such as training/benchmarks/study-scenes.yaml")
    parser.add_argument("--output_dir", type=Path, required=True, help="where runs, results and the report go")
    parser.add_argument("--report_only", action="store_true", help="write the report of what is finished, and run nothing")
    options = parser.parse_args(arguments)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        study = read_study(options.study)
        report = ReportFiles(study, options.output_dir)
        if options.report_only:
            print(f"{len(report.write())} finished runs, {options.output_dir}/report.md")
            return 0
        runs = runs_of(study, options.output_dir)
        with locked(options.output_dir) as lock:
            check_finished(runs)
            num_failed = run_all(runs, report, lock)
            report.write()
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
