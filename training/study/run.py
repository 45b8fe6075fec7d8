"""One run of a study: its options, its training and evaluation in processes of their own, and what it leaves behind."""

import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskclip.distributed import usable_cpus
from training.config import load_config
from training.study.report import BASELINE, least_seconds
from training.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SCALED_OPTIONS = ("max_steps", "warmup_steps", "eval_every", "unmasked_tuning_steps")
PACKAGES = ("hf_maskclip", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Study:
    """What a study's YAML says.

    Args:
        base: options of `training/train.py` that all runs share.
        methods: name -> patch mask, or a mapping of options with the `patch_mask` among them, which win over those of `base`;
            [`baseline`] is among them.
        peers: name -> a random patch mask, whose ratio is the patch dropout of open_clip's model (`peer.py`).
        columns: of the report, name -> the metrics that it is the mean of, such as `zero_shot_pair/top1`.
        headline: the column that is drawn over time; its metrics are of the run's own evaluations.
        rivals: the methods and peers that each other one is compared with, seed by seed.
        budgets: of [`BUDGETS`], with `samples` among them, for other runs are measured by these.
        fewer_seeds: the methods and peers that get no further seeds, and are evaluated at their end only.
        samples_only: such methods and peers that get no other budget either.
        further_seeds: those that all other methods get beside `seeds`.
        baseline: the method whose time others are measured by.
    """

    base: dict[str, Any]
    methods: dict[str, Any]
    seeds: list[int]
    columns: dict[str, list[str]]
    headline: str
    peers: dict[str, Any] = field(default_factory=dict)
    rivals: list[str] = field(default_factory=list)
    budgets: list[str] = field(default_factory=lambda: ["samples", "time"])
    fewer_seeds: list[str] = field(default_factory=list)
    samples_only: list[str] = field(default_factory=list)
    further_seeds: list[int] = field(default_factory=list)
    baseline: str = BASELINE

    @property
    def all_seeds(self) -> list[int]:
        return [*self.seeds, *self.further_seeds]

    @property
    def minor(self) -> set[str]:
        """The methods and peers that get no further seeds."""
        return {*self.fewer_seeds, *self.samples_only}

    @property
    def own_options(self) -> dict[str, dict[str, Any]]:
        """The options of `training/train.py` in which each method and peer differs from the others."""
        given = self.methods | self.peers
        has_more = {name: isinstance(own, dict) and "patch_mask" in own for name, own in given.items()}
        return {name: own if has_more[name] else {"patch_mask": own} for name, own in given.items()}


@dataclass(frozen=True)
class StudyRun:
    """One training of a study, and its files in the study's folder."""

    study: Study
    output_dir: Path
    seed: int
    budget: str
    method: str

    @property
    def name(self) -> Path:
        """Where it lies below the folders of runs and of results."""
        return Path(self.budget.replace(" ", "-"), self.method.replace(" ", "-"), f"seed-{self.seed}")

    @property
    def folder(self) -> Path:
        return self.output_dir / "runs" / self.name

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def result(self) -> Path:
        return (self.output_dir / "results" / self.name).with_suffix(".json")

    def read_result(self) -> dict[str, Any] | None:
        """What it left behind; None where it is not finished."""
        return json.loads(self.result.read_text(encoding="utf-8")) if self.result.exists() else None

    def options(self, ratio: float = 1.0) -> dict[str, Any]:
        """Those of `training/train.py`, the steps scaled by a ratio."""
        given = self.study.base | self.study.own_options[self.method]
        if self.budget == "tokens" or self.method in self.study.minor:  # no curve is drawn of these
            given |= {"eval_every": given["max_steps"]}
        counts = {name: given[name] for name in SCALED_OPTIONS if given.get(name, 0) > 0}
        scaled = {name: max(1, round(ratio * count)) for name, count in counts.items()}
        return given | scaled | {"output_dir": str(self.folder), "seed": self.seed}


def as_arguments(options: dict[str, Any]) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


def typical_seconds(records: list[dict[str, Any]]) -> list[float]:
    """The seconds of each step of a run: the 5 % quantile of its phase. So the steps that something else on the machine held up
    do not count, be they nearly all of them.

    Args:
        records: of all steps, in order.
    """
    of_phase: dict[int, list[float]] = {}
    for record in records:
        of_phase.setdefault(record["phase"], []).append(record["step_seconds"])
    typical = {phase: float(np.quantile(seconds, 0.05)) for phase, seconds in of_phase.items()}
    return [typical[record["phase"]] for record in records]


def learning_curve(records: list[dict[str, Any]], seconds: list[float], batch_size: int) -> list[dict[str, Any]]:
    """The evaluations of a `metrics.jsonl`, each with the seconds of training before it, of those of each step; evaluating does
    not count."""
    points = []
    for record in records:
        if metrics := {key.removeprefix("eval/"): value for key, value in record.items() if key.startswith("eval/")}:
            step = record["step"]
            when = {"step": step, "seconds": round(sum(seconds[:step]), 2), "samples_seen": step * batch_size}
            points.append(when | {"metrics": only_scores(metrics)})
    return points


def only_scores(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: round(value, 6) for key, value in metrics.items() if isinstance(value, float)}


def steps_ratio(run: StudyRun) -> float | None:
    """What a run's steps are scaled by; None where the runs that say so are not finished."""
    if run.budget == "samples":
        return 1.0
    cost = least_seconds if run.budget == "time" else mean_patches
    baseline, own = (cost(finished_seeds(run, method)) for method in (run.study.baseline, run.method))
    if baseline is None or own is None:
        return None
    return baseline / own


def mean_patches(results: list[dict[str, Any]]) -> float | None:
    """The patches that the vision tower encodes of a picture, in the mean of the runs that counted them; None without these."""
    counted = [result["kept_patches"] for result in results if "kept_patches" in result]
    return statistics.mean(counted) if counted else None


def finished_seeds(run: StudyRun, method: str) -> list[dict[str, Any]]:
    """The results of a method at equal samples, of the study's seeds that are finished."""
    of_seeds = (replace(run, method=method, budget="samples", seed=seed).read_result() for seed in run.study.all_seeds)
    return [result for result in of_seeds if result is not None]


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
    program = "training.study.peer" if run.method in run.study.peers else "training.train"
    call([program, *as_arguments(options)], run.log, lock)
    result = result_of(run) | {"wall_seconds": round(time.perf_counter() - start, 1)}
    if run.seed != run.study.seeds[0]:
        shutil.rmtree(run.folder / "export")
    run.result.parent.mkdir(parents=True, exist_ok=True)
    aside = run.result.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.rename(run.result)
    return result


def call(command: list[str], log: Path, lock: Any) -> None:
    """Run a module of the project as a program. It holds the study's lock too, should it outlive the study."""
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
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


def result_of(run: StudyRun) -> dict[str, Any]:
    """All that the report needs to know of a run, and under what it was made."""
    records = read_metrics(run.folder / "metrics.jsonl")
    summary = json.loads((run.folder / "eval.json").read_text(encoding="utf-8"))
    metrics = {f"{name}/{key}": value for name, record in summary["results"].items() for key, value in record.items()}
    steps = [record for record in records if "loss" in record]
    seconds = typical_seconds(steps)
    patches = statistics.mean(record["views"] * record["kept_patches"] for record in steps)  # of a picture
    return {
        "method": run.method,
        "patch_mask": run.study.own_options[run.method]["patch_mask"],
        "options": {key: value for key, value in run.study.own_options[run.method].items() if key != "patch_mask"},
        "seed": run.seed,
        "budget": run.budget,
        "base": run.study.base,
        "steps": summary["steps"],
        "samples_seen": summary["samples_seen"],
        "train_seconds": round(sum(seconds), 1),
        "seconds_per_step": statistics.mean(seconds),
        "kept_patches": round(patches, 3),
        "curve": learning_curve(records, seconds, summary["samples_seen"] // summary["steps"]),
        "metrics": only_scores(metrics),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": machine_of(run),
        "commit": commit(),
    }


def machine_of(run: StudyRun) -> dict[str, Any]:
    """What a run's seconds depend on, here and now."""
    precision = load_config(as_arguments(run.options())).mixed_precision
    return {
        "processor": processor_name(),
        "cpus": usable_cpus(),
        "precision": "float32" if precision == "no" else precision,
    }


def processor_name() -> str:
    info = Path("/proc/cpuinfo")  # Linux, where `platform` knows the architecture only
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str | None:
    """That of the checkout; None where there is none."""
    if not (ROOT / ".git").exists():
        return None
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
