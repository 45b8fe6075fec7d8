"""The papers' tables with measured results beside the published rows, in Markdown, and the mean of each family as bars."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..data.scene_sets import COMPOSITIONALITY_KINDS
from ..data.sources import GENERATED
from ..errors import fail
from .compositionality import average_by_kind

Row = dict[str, tuple[float, ...]]  # column: percent; of retrieval, recall at 1, 5 and 10
PUBLISHED = json.loads(files(__package__).joinpath("paper_results.json").read_text(encoding="utf-8"))


def only_metric(record: dict[str, Any]) -> Row:
    """The column of a record, in percent."""
    metric = next(name for name in ("mean_average_precision", "accuracy", "top1") if name in record)
    return {record["column"]: (100 * record[metric],)}


def recalls(record: dict[str, Any]) -> Row:
    """The two columns of a record of retrieval, in percent: the papers name what is retrieved."""
    ways = {"text": "image_to_text", "image": "text_to_image"}
    found = {way: [record.get(f"{name}_recall@{k}") for k in (1, 5, 10)] for way, name in ways.items()}
    return {f"{way} {record['column']}": tuple(100 * v for v in values if v is not None) for way, values in found.items()}


def no_average(values: dict[str, float]) -> dict[str, float]:
    return {}


def mean_of_all(values: dict[str, float]) -> dict[str, float]:
    return {"Average": sum(values.values()) / len(values)}


def mean_of_robustness(values: dict[str, float]) -> dict[str, float]:
    """The means over all data sets, and over the variants of the one that they vary: ImageNet-1K, or plain scenes."""
    origins = [name for name in values if name in ("ImageNet-1K", "plain")]
    variants = [value for name, value in values.items() if name not in origins]
    if not origins or not variants:
        return {}
    return {"ID avg": sum(values.values()) / len(values), "OOD avg": sum(variants) / len(variants)}


def means_of_kinds(values: dict[str, float]) -> dict[str, float]:
    """The means over what false captions are wrong about, where all kinds were measured."""
    if set(values) != set(COMPOSITIONALITY_KINDS):
        return {}
    return {f"avg {name}": value for name, value in average_by_kind(values).items() if name != "mean"}


@dataclass(frozen=True)
class Family:
    """A family of the papers' tables: its title, the columns that a record fills, and the averages over columns."""

    title: str
    cells: Callable[[dict[str, Any]], Row] = only_metric
    averages: Callable[[dict[str, float]], dict[str, float]] = no_average


FAMILIES = {
    "zero_shot": Family(
        "Zero-shot classification, top-1 (mean average precision where pictures have several classes)", averages=mean_of_all
    ),
    "retrieval": Family("Zero-shot retrieval, recall at 1/5/10", cells=recalls),
    "linear_probe": Family("Linear probe, top-1"),
    "robustness": Family("Robustness, zero-shot top-1", averages=mean_of_robustness),
    "compositionality": Family("Compositionality, accuracy (chance is 50)", averages=means_of_kinds),
}
AVERAGE_COLUMNS = ("Average", "ID avg", "OOD avg", "avg object", "avg attribute", "avg relation")


@dataclass
class Table:
    """A family's results on a generated source, or on everything else: rows by the name of the model."""

    family: str
    source: str  # the generated source; empty for everything else
    rows: dict[str, Row] = field(default_factory=dict)

    def published_rows(self) -> dict[str, Row]:
        """Those of the paper, where any of its columns was measured."""
        rows = {} if self.source else PUBLISHED[self.family]
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
        title = FAMILIES[self.family].title + (f", {self.source}" if self.source else "")
        return f"## {title}\n\n" + "\n".join(lines) + "\n"

    def means(self) -> tuple[dict[str, float], str]:
        """For each method the mean over the columns that all have, of retrieval of recall at 1, and what it is over.

        Published rows go where they have no column in common with all that were measured; where these have none either, each
        is over its own.
        """
        published = {f"{method} (published)": row for method, row in self.published_rows().items()}
        every = {c for row in self.rows.values() for c in row} - set(AVERAGE_COLUMNS)
        for rows, without in ((self.rows | published, ""), (self.rows, ", papers left out" if published else "")):
            if common := set.intersection(*map(set, rows.values())) - set(AVERAGE_COLUMNS):
                return {m: _mean(row, common) for m, row in rows.items()}, _over(common, every) + without
        own = {method: set(row) - set(AVERAGE_COLUMNS) for method, row in self.rows.items()}
        means = {method: _mean(self.rows[method], columns) for method, columns in own.items() if columns}
        counts = ", ".join(f"{method} {len(columns)}" for method, columns in own.items())
        return means, f"no set in common,\neach over its own ({counts})"


def _mean(row: Row, columns: set[str]) -> float:
    return sum(row[column][0] for column in columns) / len(columns)


def _over(common: set[str], every: set[str]) -> str:
    left_out = sorted(every - common)
    if not left_out:
        return f"over {len(common)}"
    shown = ", ".join(left_out[:3]) + (f" and {len(left_out) - 3} more" if len(left_out) > 3 else "")
    return f"over {len(common)} of {len(every)},\nwithout {shown}"


def averages(family: str, row: Row, columns: set[str]) -> Row:
    """The averages that the papers' tables have, over the columns; none where the row lacks one of these."""
    if not columns <= set(row):
        return {}
    values = {column: row[column][0] for column in row if column in columns}
    return {name: (value,) for name, value in FAMILIES[family].averages(values).items()}


def read_results(paths: Iterable[Path]) -> list[Table]:
    """The tables of files of `hf-maskclip evaluate` and of runs' `eval.json`; a model is named after the folder of its file.

    Raises:
        ConfigError: a file is none of these, or two say different things of one model and column.
    """
    tables = {(family, source): Table(family, source) for family in FAMILIES for source in ("", *GENERATED)}
    paths = list(paths)
    names = _names_of_models(paths)
    for path in paths:
        method = names[path]
        for family, source, values in _cells_of_file(path):
            row = tables[family, source].rows.setdefault(method, {})
            for column, value in values.items():
                if row.setdefault(column, value) != value:
                    fail(f"{path}: another file has another result for {family} {column} of {method}")
    return [table for table in tables.values() if table.rows]


def _names_of_models(paths: list[Path]) -> dict[Path, str]:
    """The name of each file's model: that of its folder, with the model's own where the folder has results of several."""
    models = {path: _model_of_file(path) for path in paths}
    names = {}
    for path, (weights, model) in models.items():
        folder = path.resolve().parent
        beside = {other for file, (other, _) in models.items() if file.resolve().parent == folder and other}
        own = f"{model or path.stem} {weights[:8]}" if any(m == model and w != weights for w, m in models.values()) else model
        names[path] = f"{folder.name}, {own or path.stem}" if len(beside) > 1 else folder.name
    return names


def _model_of_file(path: Path) -> tuple[str, str]:
    """What tells a file's weights apart, and what it calls its model; empty where it says nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        hashes = {record["model_hash"] for record in content["results"].values() if record.get("model_hash")}
        model = str(content.get("model") or "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", ""  # said where its records are read
    return " ".join(sorted(hashes)) or model, model


def _cells_of_file(path: Path) -> list[tuple[str, str, Row]]:
    """Family, generated source and columns of each record of a file."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["results"].values()
        sources = [record["data"] if record["data"] in GENERATED else "" for record in records]
        cells = [(r["family"], s, FAMILIES[r["family"]].cells(r)) for r, s in zip(records, sources, strict=True)]
    except OSError as error:
        fail(f"{path}: cannot be read ({error})")
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        fail(f"{path}: is no file of results (of hf-maskclip evaluate, or eval.json of a run)")
    for family, _, row in cells:
        if wrong := [column for column, values in row.items() if not all(map(math.isfinite, values))]:
            fail(f"{path}: {family} {wrong[0]} is no number")
    return cells


def draw_report(tables: list[Table]) -> Figure:
    """The mean of each family, a group of bars for each family and a bar for each method."""
    found = {(table.family, table.source): table.means() for table in tables}
    means = {key: values for key, (values, _) in found.items()}
    methods = list(dict.fromkeys(method for values in means.values() for method in values))
    figure = Figure(figsize=(3.5 + 2.4 * len(means), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = min(0.3, 0.8 / max(1, len(methods)))
    for number, method in enumerate(methods):
        heights = [values.get(method, float("nan")) for values in means.values()]
        positions = [group + (number - (len(methods) - 1) / 2) * width for group in range(len(means))]
        bars = axes.bar(positions, heights, width, label=method)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    labels = [
        family.replace("_", " ").capitalize() + (f"\n{source}" if source else "") + f"\n{over}"
        for (family, source), (_, over) in found.items()
    ]
    axes.set_xticks(range(len(means)), labels, fontsize=8)
    axes.set_ylabel("mean over the data sets, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def _as_tuple(value: float | list[float]) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list) else (value,)
