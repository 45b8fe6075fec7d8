"""What a run reports: `metrics.jsonl` always, a tracker if asked for, and the curves of both as a picture."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from matplotlib.figure import Figure

from training.config import ConfigError


def check_tracker(name: str) -> None:
    """Raise a ConfigError where a tracker's package is not installed; Accelerate would leave the tracker out in silence."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    if name not in ("none", *installed):
        raise ConfigError(f"report_to={name!r}: this tracker's package is not installed (pip install {name})")


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl`, on the main process only, and passes numbers on to the tracker."""

    def __init__(self, accelerator: Accelerator, output_dir: Path):
        self.accelerator = accelerator
        self.path = output_dir / "metrics.jsonl"

    def write(self, step: int, **values: Any) -> None:
        """Record values under a step; dots or slashes in names group them in a tracker."""
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, (int, float))}, step=step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_curves(path: Path) -> Figure:
    """Loss, learning rate and kept share over steps, and every evaluation accuracy, from a `metrics.jsonl`."""
    records = read_metrics(path)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    loss_axis, rate_axis, accuracy_axis = figure.subplots(1, 3)
    for axis, names in ((loss_axis, ["loss"]), (rate_axis, ["learning_rate"])):
        for name in names:
            points = [(r["step"], r[name]) for r in records if name in r]
            axis.plot(*zip(*points, strict=True) if points else ([], []), linewidth=1)
            axis.set(title=name.replace("_", " "), xlabel="step")
    accuracies = sorted({key for r in records for key in r if key.endswith(("/top1", "recall@10"))})
    for name in accuracies:
        points = [(r["step"], r[name]) for r in records if name in r]
        accuracy_axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name.removeprefix("eval/"))
    accuracy_axis.set(title="zero-shot accuracy", xlabel="step", ylim=(0, None))
    if accuracies:
        accuracy_axis.legend(fontsize=6)
    for axis in (loss_axis, rate_axis, accuracy_axis):
        axis.grid(alpha=0.3)
    return figure
