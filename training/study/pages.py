"""What the pages say of the studies, written from their runs' results: the tables of README.md and docs/study.md, a figure.

    python -m training.study.pages

The results are docs/study/<name>.jsonl, which have the lines of the `results.jsonl` that a study leaves in its output folder. A
page has each table between two comments with its name. Only these and docs/study.png are written.
"""

import re
import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path

from matplotlib.figure import Figure

from training.study import quickstart
from training.study.report import (
    BUDGETS,
    Report,
    cell,
    markdown_table,
    name_lines,
    paired_difference,
    read_results,
)
from training.study.run import ROOT, Study
from training.study.study import read_study

RESULTS = ROOT / "docs" / "study"
PAGES = ("README.md", "docs/study.md")
HEADLINE = "R@10"  # what the headlines of all sets are called in tables of more than one
# What is added to CLIP-PGS: the method with it, and the one without.
ADDITIONS = {
    "edges, to transport": ("pgs 0.3", "pgs 0.3 transport only"),
    "edges alone": ("pgs 0.3 edges only", "pgs 0.3 neither"),
    "transport, to edges": ("pgs 0.3", "pgs 0.3 edges only"),
    "transport alone": ("pgs 0.3 transport only", "pgs 0.3 neither"),
}
TITLES = {"scenes": "drawn scenes", "pairs": "clip art and emoji"}
# The control of each idea: it has the same tokens, and lacks what the idea says.
CONTROLS = {
    "edges drawn": "edges at random",
    "leverage 0.5": "random 0.5",
    "pgs 0.75": "random 0.75",
    "leverage 0.75": "pgs 0.75",
    "pgs falling": "pgs 0.5625, a fifth whole",
    "pgs growing": "pgs falling",
    "random falling": "random 0.5",
    "leverage falling": "leverage 0.5",
    "batch budget": "batch budget shuffled",
    "pgs 0.75, complementary": "random 0.75, two views",
    "coarse": "coarse at random",
    "summary": "summary at random",
}


@cache
def read_kept(name: str) -> Study:
    """A study whose YAML is beside this file."""
    return read_study(Path(__file__).with_name(f"{name}.yaml"))


def read_report(name: str) -> Report:
    """The finished runs of a study, by its YAML beside this file."""
    study = read_kept(name)
    results = read_results(RESULTS / f"{name}.jsonl")
    finished = {result["method"] for result in results}
    methods = [name for name in study.own_options if name in finished]
    return Report(results, methods, study.columns, study.headline, study.rivals, study.baseline)


def with_rows(reports: dict[str, Report], minor: bool) -> dict[str, Report]:
    """The reports of studies with the methods that have all seeds alone, or with those of fewer."""
    chosen = {}
    for name, report in reports.items():
        study = read_kept(name)
        chosen[name] = replace(report, methods=[method for method in report.methods if (method in study.minor) == minor])
    return chosen


def short_table(reports: dict[str, Report]) -> str:
    """The README's: time of a step, and on each set the headline at equal time, and when the unmasked model is reached."""
    header = ["mask", "time of a step"]
    for name in reports:
        header += [f"{TITLES[name]}, equal time", "reached at"]
    return markdown_table(header, [_short_row(reports, method) for method in _on_all_sets(reports, "time")])


def _short_row(reports: dict[str, Report], method: str) -> list[str]:
    cells = [f"`{method}`", _mean_time(reports, method)]
    for report in reports.values():
        values = report.values(report.of(method, "time"), report.headline)
        cells += [cell([100 * value for value in values], 1), report.reach_cell(method, "time")]
    return cells


def _on_all_sets(reports: dict[str, Report], budget: str) -> list[str]:
    """The methods that have runs of a budget on all sets; the baseline has them of each."""
    methods = next(iter(reports.values())).methods
    return [method for method in methods if all(report.of(method, budget) for report in reports.values())]


def _mean_time(reports: dict[str, Report], method: str) -> str:
    """The relative time of a method, in the mean of all sets."""
    return f"{statistics.mean(report.relative_time(method) for report in reports.values()):.2f}"


def comparison_table(reports: dict[str, Report], budget: str, controls: dict[str, str] | None = None) -> str:
    """On each set, the headline of each method that all sets have, and its paired differences to its rivals and its control."""
    header, rows = ["method", "time"], []
    for name, report in reports.items():
        header += [f"{TITLES[name]}: {HEADLINE} (seeds)", *(f"less `{rival}`" for rival in report.rivals)]
        header += ["less its control"] if controls else []
    for method in _on_all_sets(reports, budget):
        rows.append([f"`{method}`", _mean_time(reports, method)])
        for report in reports.values():
            own = report.values(report.of(method, budget), report.headline)
            rows[-1].append(f"{cell([100 * value for value in own], 1)} ({len(own)})")
            for rival in [*report.rivals, *([controls.get(method)] if controls else [])]:
                apart = rival not in (None, method)
                values = report.paired_values(method, rival, budget, report.headline) if apart else ([], [])
                rows[-1].append(paired_difference(*values))
    return markdown_table(header, rows)


def comparison_tables(name: str, reports: dict[str, Report], controls: dict[str, str] | None = None) -> dict[str, str]:
    """A [`comparison_table`] for each budget that all sets have runs of."""
    budgets = [budget for budget in BUDGETS if all(budget in report.budgets for report in reports.values())]
    return {f"{name}, {BUDGETS[budget].lower()}": comparison_table(reports, budget, controls) for budget in budgets}


def peers_table(reports: dict[str, Report]) -> str:
    """The headline of each method less the baseline's, on each set, and over the seeds of all sets together."""
    first, rows = next(iter(reports.values())), []
    for method in (name for name in first.methods if name != first.baseline):
        values = [  # of each set, those of the method and of the baseline
            report.paired_values(method, report.baseline, "samples", report.headline) for report in reports.values()
        ]
        together = [sum(side, []) for side in zip(*values, strict=True)]
        rows.append([f"`{method}`", *(paired_difference(*pair) for pair in [*values, together])])
    return markdown_table([f"less `{first.baseline}`", *reports, "together"], rows)


def additions_table(ablation: Report) -> str:
    """What edges and transport add at equal samples, seed by seed."""
    rows = [
        [name, *(paired_difference(*ablation.paired_values(*methods, "samples", column)) for column in ablation.columns)]
        for name, methods in ADDITIONS.items()
    ]
    return markdown_table(["added", *ablation.columns], rows)


def precisions_table(reports: dict[str, tuple[Report, Report]]) -> str:
    """The headline in bf16 and in float32, at equal samples, of the methods that two reports of a set share, seed by seed."""
    rows = []
    for name, (first, second) in reports.items():
        for method in (method for method in first.methods if method in second.methods):
            results = [*first.of(method, "samples"), *second.of(method, "samples")]
            by_precision = replace(first, results=[result | {"method": result["machine"]["precision"]} for result in results])
            values = by_precision.paired_values("float32", "bf16", "samples", first.headline)
            scores = (cell([100 * value for value in side], 1) for side in values)
            rows.append([TITLES[name], f"`{method}`", *scores, paired_difference(*values)])
    return markdown_table(["set", "method", "float32", "bf16", "float32 less bf16"], rows)


def initialization_table() -> str:
    """Two runs on scenes that differ in their initial weights, evaluated while they trained. No study makes them."""
    columns = read_kept("scenes").columns
    names = ("zero-shot colour", "zero-shot pair", "retrieval R@10")
    rows = []
    for result in read_results(RESULTS / "initial_weights.jsonl"):
        for point in result["curve"]:
            scores = [f"{100 * statistics.mean(point['metrics'][key] for key in columns[name]):.1f}" for name in names]
            rows.append([result["initial_weights"], f"{point['samples_seen']:,}", *scores])
    return markdown_table(["initial weights", "pairs seen", *names], rows)


def tables(scenes: Report, pairs: Report) -> dict[str, str]:
    """The tables of all pages by their names."""
    both = {"scenes": scenes, "pairs": pairs}
    major = with_rows(both, minor=False)
    found = {"in short": short_table(major)} | comparison_tables("summary", major)
    found |= comparison_tables("other rows", with_rows(both, minor=True))
    found["initial weights"] = initialization_table()
    found["quickstart"] = quickstart.table()
    ideas = {name: read_report(f"ideas_{name}") for name in TITLES}
    found |= comparison_tables("ideas", ideas, CONTROLS)
    peers = {"public pairs": read_report("peer"), "sample data": read_report("peer_sample")}
    found |= {f"peer, {name}": report.table("samples") for name, report in peers.items()}
    found["peer, differences"] = peers_table(peers)
    found |= comparison_tables("larger", {"scenes": read_report("larger")})
    parts = read_report("ablation")
    found |= {"ablation": parts.table("samples"), "additions": additions_table(parts)}
    found["precisions"] = precisions_table({"scenes": (scenes, parts), "pairs": (pairs, read_report("pairs_float32"))})
    for name, report in both.items():
        found |= {f"{name}, {BUDGETS[budget].lower()}": report.table(budget) for budget in report.budgets}
        found[f"{name}, circumstances"] = report.circumstances()
    return found


def fill(page: str, tables: dict[str, str]) -> str:
    """A page with each table between its comments. Raises KeyError for comments whose table there is none of."""
    return re.sub(
        r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{tables[found[2]]}{found[3]}",
        page,
        flags=re.DOTALL,
    )


def figure(scenes: Report, pairs: Report) -> Figure:
    """The headline over seconds of training, at equal time, a panel for each study, of the methods that have all seeds."""
    drawn = Figure(figsize=(11.5, 4.2), layout="constrained")
    panels = drawn.subplots(1, 2)
    reports = with_rows({"scenes": scenes, "pairs": pairs}, minor=False)
    methods = _on_all_sets(reports, "time")
    for axes, (name, report) in zip(panels, reports.items(), strict=True):
        replace(report, methods=methods).draw(axes, "time")
        axes.set(title=TITLES[name], ylabel=f"{report.headline}, %")
    name_lines(drawn, methods)
    return drawn


def main() -> None:
    scenes, pairs = read_report("scenes"), read_report("pairs")
    found = tables(scenes, pairs)
    for name in PAGES:
        page = ROOT / name
        page.write_text(fill(page.read_text(encoding="utf-8"), found))
    figure(scenes, pairs).savefig(ROOT / "docs" / "study.png", dpi=130)
    for name, report in (("scenes", scenes), ("pairs", pairs)):
        seconds = statistics.mean(result["wall_seconds"] for result in report.results)
        print(f"{name}: {len(report.results)} runs of {seconds:.0f} s with evaluation, in the mean")


if __name__ == "__main__":
    main()
