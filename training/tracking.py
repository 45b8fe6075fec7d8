"""What a run reports: `metrics.jsonl` always, a tracker if asked for, and the curves of both as a picture."""

import json
import logging
import math
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import compare_versions
from matplotlib.figure import Figure

from hf_maskclip.errors import ConfigError
from hf_maskclip.phases import Timeline
from training.config import TrainingConfig
from training.saving.folder import read_state

logger = logging.getLogger(__name__)

LINE_SECONDS = 30  # between two lines of a log that is no terminal


def check_tracker(name: str) -> None:
    """Raise a ConfigError where a tracker's package is not installed; Accelerate would leave the tracker out in silence."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    if name not in ("none", *installed):
        raise ConfigError(f"report_to={name!r}: this tracker's package is not installed (pip install {name})")
    if name == "trackio" and compare_versions("accelerate", "<", "1.14"):
        raise ConfigError("report_to='trackio': needs accelerate 1.14, which tells it the steps")


def start_tracker(accelerator: Accelerator, config: TrainingConfig, steps_done: int = 0) -> None:
    """Start or, in a resumed run, continue the tracker's run under the id that the folder's `run.json` has. Nothing is public.

    Args:
        steps_done: of the checkpoint that the run goes on from; TensorBoard forgets what it has of later ones.
    """
    if config.report_to == "none":
        return
    tracker_id = read_state(Path(config.output_dir)).get("tracker_id")
    options = {
        "tensorboard": {"purge_step": steps_done + 1},
        "wandb": {"id": tracker_id, "name": Path(config.output_dir).name, "resume": "allow", "dir": config.output_dir},
        "trackio": {"name": tracker_id, "resume": "allow", "private": True},
    }
    settings = {key: str(value) if isinstance(value, (dict, list)) else value for key, value in asdict(config).items()}
    accelerator.init_trackers("hf_maskclip", config=settings, init_kwargs=options)


class SlowDataWarning:
    """Says once that training waits for its data: where that takes more than 30 % of the time of 50 steps in a row."""

    def __init__(self) -> None:
        self.num_slow_steps = 0

    def watch(self, data_seconds: float, step_seconds: float) -> None:
        self.num_slow_steps = self.num_slow_steps + 1 if data_seconds > 0.3 * step_seconds else 0
        if self.num_slow_steps == 50:
            logger.warning(
                "training waits for its data for more than 30 %% of its time: use more num_workers or faster storage"
            )
            self.num_slow_steps = -math.inf


@dataclass(frozen=True)
class StepResult:
    """What a step gives.

    Attributes:
        loss: the mean over all processes.
        kept_patches: the visible patches of a view of an image of this process, in the mean.
        num_patches: of an image, visible or not.
        views: of an image; the vision tower encodes each.
        text_tokens: of the longest caption of this process, rounded up as the text tower gets it.
        image_size: the side of the pictures, in pixels; None where their sizes differ.
        phase: its number, counted from 1.
        logit_scale: the factor on the cosines that the loss was taken with.
    """

    loss: float
    kept_patches: float
    num_patches: int
    views: int
    text_tokens: int
    image_size: int | None
    phase: int
    logit_scale: float

    @property
    def patches_in_words(self) -> str:
        """What the vision tower encodes of an image."""
        times = f"{self.views} x " if self.views > 1 else ""
        return f"{times}{self.kept_patches:.0f} of {self.num_patches} patches"


class ProgressLines:
    """What a person follows where there is no progress bar: a line at the first step and then every `LINE_SECONDS`.

    Args:
        is_on: whether this process writes it.
    """

    def __init__(self, timeline: Timeline, is_on: bool):
        self.num_steps, self.num_phases, self.is_on = timeline.num_steps, len(timeline.phases), is_on
        self.line_at = -math.inf
        self.steps, self.seconds, self.data_seconds = 0, 0.0, 0.0  # since the last line
        self.samples_before: int | None = None
        self.losses: deque[float] = deque(maxlen=10)

    def say(self, line: str) -> None:
        if self.is_on:
            print(line, file=sys.stderr, flush=True)

    def step(
        self, step: int, samples_seen: int, result: StepResult, learning_rate: float, data_seconds: float, step_seconds: float
    ) -> None:
        """Count a step, and write a line where it is time for one. Rates are means since the last line."""
        self.losses.append(result.loss)
        self.steps += 1
        self.seconds += step_seconds
        self.data_seconds += data_seconds
        if time.monotonic() - self.line_at < LINE_SECONDS:
            return
        self.line_at = time.monotonic()
        speed = ""
        if self.samples_before is not None:  # of the first step most is start-up, which says nothing of the others
            left = timedelta(seconds=round((self.num_steps - step) * self.seconds / self.steps))
            rate = (samples_seen - self.samples_before) / self.seconds
            speed = f", {rate:.1f} pairs/s, {self.data_seconds / self.seconds:.0%} of the time waiting for data, {left} left"
        where = f"step {step} of {self.num_steps}, {samples_seen} pairs"
        size = f", {result.image_size} pixels" if result.image_size else ""
        phase = f", phase {result.phase} of {self.num_phases}{size}" if self.num_phases > 1 else ""
        encoded = f"{result.patches_in_words}, {result.text_tokens} text tokens"
        self.say(f"{where}{phase}, loss {result.loss:.4f}, {encoded}, learning rate {learning_rate:.3g}{speed}")
        self.samples_before, self.steps, self.seconds, self.data_seconds = samples_seen, 0, 0.0, 0.0

    def warn_of_chance(self, pairs: int, chance: float) -> None:
        """Say where the loss ends at that of chance for the pairs of a step: the model tells no pair from another."""
        if self.losses and abs(fmean(self.losses) / chance - 1) < 0.01:
            logger.warning(
                "the loss ends at %.4f, which is chance for %d pairs (%.4f): nothing was learnt; another learning_rate, "
                "more steps or captions that fit their pictures may help",
                fmean(self.losses),
                pairs,
                chance,
            )


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl`, on the main process only, and passes numbers on to the tracker."""

    def __init__(self, accelerator: Accelerator, output_dir: Path):
        self.accelerator = accelerator
        self.path = output_dir / "metrics.jsonl"

    def forget_after(self, step: int) -> None:
        """Remove the records of steps that are to be done again."""
        if self.accelerator.is_main_process and self.path.exists():
            kept = [record for record in read_metrics(self.path) if record["step"] <= step]
            self.path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Record values under a step; dots or slashes in names group them in a tracker."""
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, (int, float))}, step=step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, oldest first."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run can leave half a line


def draw_curves(path: Path) -> Figure:
    """Loss, learning rate and, of a run that was evaluated more than once, zero-shot accuracies over steps.

    Args:
        path: a `metrics.jsonl`.
    """
    records = read_metrics(path)
    counts = Counter(key for record in records for key in record if key.endswith(("/top1", "recall@10")))
    accuracies = sorted(key for key, count in counts.items() if count > 1)
    panels = {"loss": ["loss"], "learning rate": ["learning_rate"]}
    panels |= {"zero-shot accuracy": accuracies} if accuracies else {}
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            marker = "o" if len(points) < 20 else None
            axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, linewidth=1, label=name.removeprefix("eval/"))
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
    if accuracies:
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
