"""The papers' tables with measured results beside the published rows, in Markdown, and the mean of each family as bars."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .compositionality import KINDS, average_by_kind
from .robustness import average_robustness

Row = dict[str, tuple[float, ...]]  # column: percent; of retrieval, recall at 1, 5 and 10

TITLES = {
    "zero_shot": "Zero-shot classification, top-1 (mean average precision where pictures have several classes)",
    "retrieval": "Zero-shot retrieval, recall at 1/5/10",
    "linear_probe": "Linear probe, top-1",
    "robustness": "Robustness, zero-shot top-1",
    "compositionality": "Compositionality, accuracy (chance is 50)",
}
PUBLISHED = json.loads(files(__package__).joinpath("paper_results.json").read_text())


@dataclass
class Table:
    """A family's results on the scenes, or on everything else: rows by the name of the model."""

    family: str
    on_scenes: bool
    rows: dict[str, Row] = field(default_factory=dict)

    def published_rows(self) -> dict[str, Row]:
        """Those of the paper, where any of its columns was measured."""
        rows = {} if self.on_scenes else PUBLISHED[self.family]
        measured = {column for row in self.rows.values() for column in row}
        as_tuples = {method: {c: _as_tuple(value) for c, value in row.items()} for method, row in rows.items()}
        return {method: row for method, row in as_tuples.items() if not measured.isdisjoint(row)}

    def markdown(self) -> str:
        published = self.published_rows()
        # An average is over the same columns for all methods: the paper's, or else all that were measured.
        wanted = {c for row in (published or self.rows).values() for c in row} - set(AVERAGE_COLUMNS)
        measured = {method: row | averages(self.family, row, wanted) for method, row in self.rows.items()}
        columns = list(dict.fromkeys(column for row in (*published.values(), *measured.values()) for column in row))
        lines = [f"| {' | '.join(['method', *columns])} |", "|---" * (len(columns) + 1) + "|"]
        for name, row in [(f"{method} (published)", row) for method, row in published.items()] + list(measured.items()):
            cells = ["/".join(f"{value:.1f}" for value in row[column]) if column in row else "–" for column in columns]
            lines.append(f"| {' | '.join([name, *cells])} |")
        title = TITLES[self.family] + (", scenes" if self.on_scenes else "")
        return f"## {title}\n\n" + "\n".join(lines) + "\n"

    def means(self) -> dict[str, float]:
        """For each method the mean over the columns that all methods have, of retrieval of recall at 1; {} where none is."""
        rows = self.rows | {f"{method} (published)": row for method, row in self.published_rows().items()}
        common = set.intersection(*map(set, rows.values())) - set(AVERAGE_COLUMNS)
        return {method: sum(row[c][0] for c in common) / len(common) for method, row in rows.items()} if common else {}


AVERAGE_COLUMNS = ("Average", "ID avg", "OOD avg", "avg object", "avg attribute", "avg relation")


def read_results(paths: Iterable[Path]) -> list[Table]:
    """The tables of files of `training/evaluate.py` and of runs' `eval.json`; a model is named after the folder of its file.

    Raises:
        ValueError: a file is none of these, or two say different things of one model and column.
    """
    tables = {(family, scenes): Table(family, scenes) for family in TITLES for scenes in (False, True)}
    for path in paths:
        try:
            records = json.loads(path.read_text())["results"].values()
            cells = [(record["family"], record["data"] == "scenes", _cells(record)) for record in records]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: is no file of results (of training/evaluate.py, or eval.json of a run)") from None
        method = path.resolve().parent.name
        for family, on_scenes, values in cells:
            row = tables[family, on_scenes].rows.setdefault(method, {})
            for column, value in values.items():
                if row.setdefault(column, value) != value:
                    raise ValueError(f"{path}: another file has another result for {family} {column} of {method}")
    return [table for table in tables.values() if table.rows]


def _cells(record: dict[str, Any]) -> Row:
    """The columns that a record fills, in percent."""
    column = record["column"]
    if record["family"] == "retrieval":
        ways = {"text": "image_to_text", "image": "text_to_image"}  # the papers name what is retrieved
        recalls = {way: [record.get(f"{name}_recall@{k}") for k in (1, 5, 10)] for way, name in ways.items()}
        return {f"{way} {column}": tuple(100 * v for v in values if v is not None) for way, values in recalls.items()}
    metric = next(name for name in ("mean_average_precision", "accuracy", "top1") if name in record)
    return {column: (100 * record[metric],)}


def averages(family: str, row: Row, columns: set[str]) -> Row:
    """The averages that the papers' tables have, over the columns; none where the row lacks one of these."""
    if not columns <= set(row):
        return {}
    values = {column: row[column][0] for column in row if column in columns}
    found: dict[str, float] = {}
    if family == "zero_shot":
        found = {"Average": sum(values.values()) / len(values)}
    elif family == "robustness" and (origin := {"ImageNet-1K", "plain"} & set(values)) and len(values) > 1:
        by_name = average_robustness(values, origin.pop())
        found = {"ID avg": by_name["id_average"], "OOD avg": by_name["ood_average"]}
    elif family == "compositionality" and set(values) == {kind for kinds in KINDS.values() for kind in kinds}:
        found = {f"avg {name}": value for name, value in average_by_kind(values).items() if name != "mean"}
    return {name: (value,) for name, value in found.items()}


def draw_report(tables: list[Table]) -> Figure:
    """The mean of each family, a group of bars for each family and a bar for each method."""
    means = {(table.family, table.on_scenes): table.means() for table in tables}
    means = {place: values for place, values in means.items() if values}
    methods = list(dict.fromkeys(method for values in means.values() for method in values))
    figure = Figure(figsize=(1.5 + 2.2 * len(means), 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(methods))
    for number, method in enumerate(methods):
        heights = [values.get(method, float("nan")) for values in means.values()]
        places = [group + (number - (len(methods) - 1) / 2) * width for group in range(len(means))]
        bars = axes.bar(places, heights, width, label=method)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    labels = [family.replace("_", " ").capitalize() + ("\nscenes" if on_scenes else "") for family, on_scenes in means]
    axes.set_xticks(range(len(means)), labels)
    axes.set_ylabel("mean over the data sets, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _as_tuple(value: float | list[float]) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list) else (value,)
