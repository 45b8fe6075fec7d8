"""The report of a study: tables of means and standard errors over seeds, and the headline over seconds of training.

Seconds are those of training steps, without evaluation. A curve is the mean over seeds at equal shares of the run.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import ttest_1samp

BASELINE = "none"  # the method that the others are compared with, where a study names no other
BUDGETS = {"samples": "Equal samples", "tokens": "Equal tokens", "time": "Equal time"}  # their names, and titles
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's; black is the baseline's

EXPLANATION = """\
Mean ± standard error over n seeds, in percent. Relative time is the time of a step, the last steps on whole images included,
over that of `{baseline}`; both are the least of their seeds at equal samples. Seconds are those of steps of this time. Time to
reach: when the mean curve first reaches the final {headline} of `{baseline}`, as a share of the time of `{baseline}`, which has
one budget only and stands in all tables.
"""


def read_results(source: Path) -> list[dict[str, Any]]:
    """The results of finished runs, from a .jsonl with one a line, or from a study's folder with a JSON for each."""
    if source.suffix == ".jsonl":
        return [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(source.rglob("*.json"))]


def write_results(results: list[dict[str, Any]], file: Path) -> None:
    """Gather results in a .jsonl, one a line, in the order in which they are given."""
    file.write_text("".join(f"{json.dumps(result)}\n" for result in results), encoding="utf-8")


def least_seconds(results: Sequence[dict[str, Any]]) -> float | None:
    """The seconds a step of the run that other work held up least, for it only adds to them; None without runs."""
    return min((result["seconds_per_step"] for result in results), default=None)


def machine_in_words(machine: dict[str, Any]) -> str:
    return f"{machine['processor']}, {machine['cpus']} CPUs, {machine['precision']}"


class Curve(NamedTuple):
    """The headline of a method over training: arrays of equal length."""

    seconds: np.ndarray
    mean: np.ndarray
    error: np.ndarray  # the standard error; 0 for one seed


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error (n - 1), which is 0 for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), error


def time_to_reach(curve: Curve, target: float) -> float | None:
    """The seconds at which a curve, linear between its points, first reaches a value; None where it does not."""
    if not (curve.mean >= target).any():
        return None
    after = int(np.argmax(curve.mean >= target))
    if after == 0:
        return float(curve.seconds[0])
    (x0, x1), (y0, y1) = curve.seconds[after - 1 : after + 1], curve.mean[after - 1 : after + 1]
    return float(x0 + (target - y0) / (y1 - y0) * (x1 - x0))


@dataclass
class Report:
    """What the results of finished runs say.

    Args:
        methods: names in the order of the tables; those without results are left out.
        columns: name -> the metrics that it is the mean of.
        headline: the column that is drawn.
        rivals: the methods that each other one is compared with, seed by seed.
        baseline: whose time others are measured by.
    """

    results: list[dict[str, Any]]
    methods: list[str]
    columns: dict[str, list[str]]
    headline: str
    rivals: Sequence[str] = ()
    baseline: str = BASELINE

    def of(self, method: str, budget: str) -> list[dict[str, Any]]:
        """The results of a method, seed by seed. The baseline's are those at equal samples, whatever the budget."""
        budget = "samples" if method == self.baseline else budget
        found = [result for result in self.results if (result["method"], result["budget"]) == (method, budget)]
        return sorted(found, key=lambda result: result["seed"])

    @cached_property
    def budgets(self) -> list[str]:
        return [budget for budget in BUDGETS if any(result["budget"] == budget for result in self.results)]

    def values(self, results: list[dict[str, Any]], column: str) -> list[float]:
        """A column of each result that has all of its metrics."""
        keys = self.columns[column]
        return [statistics.mean(r["metrics"][k] for k in keys) for r in results if set(keys) <= set(r["metrics"])]

    def step_seconds(self, method: str) -> float:
        """The seconds of a step, by [`least_seconds`] of the runs at equal samples; nan without these."""
        least = least_seconds(self.of(method, "samples"))
        return math.nan if least is None else least

    def relative_time(self, method: str) -> float:
        """The seconds of a step over those of the baseline.

        Not seed by seed, for a shared machine can be slower for hours, in which other methods run.
        """
        return self.step_seconds(method) / self.step_seconds(self.baseline)

    def curve(self, method: str, budget: str) -> Curve | None:
        """With the seconds that a run takes whose steps take [`step_seconds`]. None where a method has no run, or no run
        evaluated the headline while it trained."""
        keys, seconds, values, shares = self.columns[self.headline], [], [], None
        for result in self.of(method, budget):
            points = [point for point in result["curve"] if set(keys) <= set(point["metrics"])]
            if not points:
                continue
            own_shares = [point["step"] / result["steps"] for point in points]
            shares = own_shares if shares is None else shares
            pace = self.step_seconds(method) / result["seconds_per_step"]
            seconds.append(np.interp(shares, own_shares, [pace * point["seconds"] for point in points]))
            values.append(np.interp(shares, own_shares, [statistics.mean(p["metrics"][k] for k in keys) for p in points]))
        if not values:
            return None
        columns = [mean_and_error(list(column)) for column in np.transpose(values).tolist()]
        mean, error = np.transpose(columns)
        return Curve(np.mean(seconds, axis=0), mean, error)

    def reach(self, method: str, budget: str) -> float | None:
        """The time to reach the baseline's final headline, as a share of the baseline's time; None where it is not reached."""
        baseline, curve = self.curve(self.baseline, "samples"), self.curve(method, budget)
        if baseline is None or curve is None:
            return None
        seconds = time_to_reach(curve, baseline.mean[-1])
        return None if seconds is None else seconds / baseline.seconds[-1]

    def reach_cell(self, method: str, budget: str) -> str:
        """[`reach`] in words; a dash where runs were not evaluated before their end, which do not say when."""
        curve = self.curve(method, budget)
        if curve is None or len(curve.seconds) == 1:
            return "–"
        reached = self.reach(method, budget)
        return "not reached" if reached is None else f"{reached:.2f}"

    # ------------------------------------------------------------------------------------------------ as text

    def markdown(self) -> str:
        parts = ["# Study\n", EXPLANATION.format(headline=self.headline, baseline=self.baseline)]
        for budget in self.budgets:
            parts.append(f"## {BUDGETS[budget]}\n\n{self.table(budget)}")
            parts += [
                f"Less `{rival}`, in points (95 % interval; seeds ahead):\n\n{self.differences(budget, rival)}"
                for rival in self.rivals
            ]
        parts.append(f"![{self.headline} over seconds of training](accuracy_over_time.png)\n")
        parts.append(self.circumstances())
        return "\n".join(parts)

    def table(self, budget: str) -> str:
        header = ["method", "n", *self.columns, "relative time", "time to reach", "pairs seen", "seconds"]
        rows = [self.row(method, budget, results) for method in self.methods if (results := self.of(method, budget))]
        return markdown_table(header, rows)

    def row(self, method: str, budget: str, results: list[dict[str, Any]]) -> list[str]:
        return [
            method,
            str(len(results)),
            *(cell([100 * value for value in self.values(results, column)], 1) for column in self.columns),
            f"{self.relative_time(method):.2f}",
            self.reach_cell(method, budget),
            f"{statistics.mean(result['samples_seen'] for result in results):,.0f}",
            f"{statistics.mean(result['steps'] for result in results) * self.step_seconds(method):.0f}",
        ]

    def differences(self, budget: str, rival: str) -> str:
        """A table of each method less a rival: [`paired_difference`] over the seeds that both have."""
        rows = []
        for method in self.methods:
            both = {column: self.paired_values(method, rival, budget, column) for column in self.columns}
            if method != rival and (own := both[self.headline][0]):
                rows.append([method, str(len(own)), *(paired_difference(*values) for values in both.values())])
        return markdown_table(["method", "n", *self.columns], rows)

    def paired_values(self, method: str, rival: str, budget: str, column: str) -> list[list[float]]:
        """A column of a method and of a rival, of the seeds that both have."""
        both = [self.of(name, budget) for name in (method, rival)]
        seeds = set.intersection(*({result["seed"] for result in results} for results in both))
        return [self.values([result for result in results if result["seed"] in seeds], column) for results in both]

    def circumstances(self) -> str:
        """What all runs were made under; more than one line of a kind where they differ."""
        base = {f"`{json.dumps(result['base'])}`" for result in self.results}
        machines = {machine_in_words(result["machine"]) for result in self.results}
        versions = {", ".join(f"{name} {number}" for name, number in r["versions"].items()) for r in self.results}
        commits = {f"commit {result['commit']}" for result in self.results if result["commit"]}
        return "".join(f"- {line}\n" for kind in (base, machines, versions, commits) for line in sorted(kind))

    # ---------------------------------------------------------------------------------------------- as a picture

    def figure(self) -> Figure:
        """A panel for each budget; the lines are named in the order in which they end."""
        figure = Figure(figsize=(2.6 + 4.6 * len(self.budgets), 4.4), layout="constrained")
        panels = figure.subplots(1, len(self.budgets), sharey=True, squeeze=False)[0]
        for axes, budget in zip(panels, self.budgets, strict=True):
            self.draw(axes, budget)
        panels[0].set_ylabel(f"{self.headline}, %")
        name_lines(figure, self.methods)
        return figure

    def draw(self, axes: Axes, budget: str) -> None:
        """The headline of each method over seconds; a dotted line at the baseline's last value."""
        for method in self.methods:
            curve = self.curve(method, budget)
            if curve is None:
                continue
            look = self._look(method)
            low, high = 100 * (curve.mean - curve.error), 100 * (curve.mean + curve.error)
            axes.fill_between(curve.seconds, low, high, color=look["color"], alpha=0.12, linewidth=0)
            axes.plot(curve.seconds, 100 * curve.mean, label=method, linewidth=1.6, **look)
            axes.plot(curve.seconds[-1], 100 * curve.mean[-1], "o", markersize=4, color=look["color"], label="_end")
        baseline = self.curve(self.baseline, "samples")
        if baseline is not None:
            axes.axhline(100 * baseline.mean[-1], color="0.35", linestyle=":", linewidth=1, label="_final")
        axes.set(title=BUDGETS[budget], xlabel="seconds of training", xlim=(0, None))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)

    def _look(self, method: str) -> dict[str, str]:
        """Colour and dashes of a method, the same in all panels."""
        if method == self.baseline:
            return {"color": "black", "linestyle": "-"}
        turn, colour = divmod([name for name in self.methods if name != self.baseline].index(method), len(COLOURS))
        return {"color": COLOURS[colour], "linestyle": ("-", "--", ":")[turn % 3]}


def name_lines(figure: Figure, methods: list[str]) -> None:
    """A legend beside the panels, in the order in which the lines of the last panel that has them end."""
    lines: dict[str, Line2D] = {
        line.get_label(): line for axes in figure.axes for line in axes.get_lines() if line.get_label() in methods
    }
    if lines:
        in_order = sorted(lines.values(), key=lambda line: -line.get_ydata()[-1])
        figure.legend(handles=in_order, loc="outside right center", frameon=False, labelcolor="linecolor", fontsize=9)


def paired_difference(own: list[float], other: list[float]) -> str:
    """The mean difference of paired shares in points. Two pairs or more have the 95 % interval of Student's t, and in how many
    of them `own` is ahead."""
    if len(own) != len(other) or not own:
        return "–"
    differences = 100 * (np.array(own) - np.array(other))
    if np.ptp(differences) < 1e-6:  # one seed, or the same difference in all but for rounding: no interval
        return f"{differences.mean():+.1f}"
    low, high = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    ahead = int((differences > 0).sum())
    return f"{differences.mean():+.1f} ({low:+.1f} to {high:+.1f}; {ahead} of {len(differences)})"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    return "".join(f"{line}\n" for line in (_line(header), "|---" * len(header) + "|", *map(_line, rows)))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(values: list[float], digits: int) -> str:
    """Mean ± standard error; a dash where there is no value."""
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")
