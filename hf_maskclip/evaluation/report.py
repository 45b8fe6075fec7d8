"""The papers' tables with measured results beside the published rows, in Markdown, and the mean of each family as bars."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from matplotlib.figure import Figure

from ..data.scene_sets import COMPOSITIONALITY_KINDS
from ..data.sources import GENERATED
from ..errors import fail
from ..models.patch_mask_registry import ratio_options
from .compositionality import average_by_kind
from .report_files import ResultFile, names_of_models

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
ROUNDING = 0.11  # of a mean of columns with one digit, itself with one digit
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
        as_tuples = {method: _as_tuples(row) for method, row in rows.items()}
        return {method: row for method, row in as_tuples.items() if not measured.isdisjoint(row)}

    def markdown(self) -> str:
        published = self.published_rows()
        # An average is over the same columns for all methods: the paper's, or else all that were measured.
        wanted = {c for row in (published or self.rows).values() for c in row} - set(AVERAGE_COLUMNS)
        rows = {f"{method} (published)": without_averages(row) for method, row in published.items()} | self.rows
        rows = {method: row | averages(self.family, row, wanted) for method, row in rows.items()}
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines = [["method", *columns], *([name, *_cells(row, columns)] for name, row in rows.items())]
        title = FAMILIES[self.family].title + (f", {self.source}" if self.source else "")
        others = "; ".join(other_averages(self.family, published))
        note = f"\nAverages are of the columns here, in published rows too; the paper prints: {others}.\n" if others else ""
        return f"## {title}\n\n{_pipe_table(lines)}{note}"

    def other_settings(self) -> str:
        """What papers print of runs on other data, with another model or of another length, in columns that were measured.

        It stands in a table of its own, which says which of its rows compare with the published ones; empty where there is
        none.
        """
        groups = [group for group in PUBLISHED["other_settings"] if self.family in group and not self.source]
        measured = {column for row in self.rows.values() for column in row}
        printed = dict.fromkeys(column for group in groups for row in group[self.family].values() for column in row)
        columns = [column for column in printed if column in measured]
        if not columns:
            return ""
        usual = PUBLISHED["setting"]
        lines = [["method", *usual, "compares with them", *columns, "source"]]
        for group in groups:
            is_same = all(group[key] == usual[key] for key in ("data", "model"))
            about = [*(group[key] for key in usual), "in data and model" if is_same else "no"]
            rows = group[self.family].items()
            lines += [[method, *about, *_cells(_as_tuples(row), columns), group["source"]] for method, row in rows]
        note = f"Published in other settings. The published rows above are of {', '.join(usual.values())}."
        return f"\n{note}\n\n{_pipe_table(lines)}"

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


def without_averages(row: Row) -> Row:
    return {column: value for column, value in row.items() if column not in AVERAGE_COLUMNS}


def other_averages(family: str, published: dict[str, Row]) -> list[str]:
    """The paper's averages that do not follow from its own columns, which are printed with one digit."""
    found = []
    for method, row in published.items():
        single = without_averages(row)
        for column, (value, *_) in averages(family, single, set(single)).items():
            if column in row and abs(value - row[column][0]) > ROUNDING:
                found.append(f"{method} {column} {row[column][0]:.1f}")
    return found


def averages(family: str, row: Row, columns: set[str]) -> Row:
    """The averages that the papers' tables have, over the columns; none where the row lacks one of these."""
    if not columns <= set(row):
        return {}
    values = {column: row[column][0] for column in row if column in columns}
    return {name: (value,) for name, value in FAMILIES[family].averages(values).items()}


def make_tables(files: Iterable[ResultFile], name: str = "") -> list[Table]:
    """The tables of files; a model is named after the folder of its file, and after a mask, or a trial's limit, too.

    Args:
        name: of the one model that all files are of.

    Raises:
        ConfigError: a record is none of results, or two say different things of one model and column.
    """
    tables = {(family, source): Table(family, source) for family in FAMILIES for source in ("", *GENERATED)}
    files = list(files)
    names = names_of_models(files)
    for file in files:
        for family, source, condition, values in _cells_of(file):
            method = (name or names[file.path]) + condition
            row = tables[family, source].rows.setdefault(method, {})
            for column, value in values.items():
                if row.setdefault(column, value) != value:
                    fail(f"{file.path}: another file has another result for {family} {column} of {method}")
    return [table for table in tables.values() if table.rows]


def _cells_of(file: ResultFile) -> list[tuple[str, str, str, Row]]:
    """Family, generated source, condition and columns of each record of a file."""
    try:
        cells = [
            (
                record["family"],
                record["data"] if record["data"] in GENERATED else "",
                condition_of(record),
                FAMILIES[record["family"]].cells(record),
            )
            for record in file.records
        ]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        fail(f"{file.path}: is no file of results (of hf-maskclip evaluate, eval.json of a run, or of clip_benchmark)")
    for family, _, _, row in cells:
        if wrong := [column for column, values in row.items() if not all(map(math.isfinite, values))]:
            fail(f"{file.path}: {family} {wrong[0]} is no number")
    return cells


def condition_of(record: dict[str, Any]) -> str:
    """What sets a result apart from one on all pictures, as they are; empty of such a one."""
    mask, limit = mask_of(record), record.get("limit")
    return (f", under {mask}" if mask else "") + (f", first {limit:,}" if limit else "")


def mask_of(record: dict[str, Any]) -> str:
    """The patch mask that a result was measured under, with its ratios, as `pgs (0.3 to 0.5)`; empty of whole pictures."""
    mask = record.get("patch_mask") or {"name": "none"}
    if mask["name"] == "none":
        return ""
    ratios = sorted({mask[option] for option in ratio_options(mask)})
    if len(ratios) > 1:
        return f"{mask['name']} ({ratios[0]} to {ratios[-1]})"
    return f"{mask['name']} at {ratios[0]}" if ratios else mask["name"]


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


def _as_tuples(row: dict[str, float | list[float | None]]) -> Row:
    """A published row; what a paper does not print is not a number."""
    lists = {column: value if isinstance(value, list) else [value] for column, value in row.items()}
    return {column: tuple(math.nan if value is None else value for value in values) for column, values in lists.items()}


def _cells(row: Row, columns: list[str]) -> list[str]:
    """One for each column. What is not known is a dash."""
    cells = [row.get(column, (math.nan,)) for column in columns]
    return ["/".join("–" if math.isnan(value) else f"{value:.1f}" for value in cell) for cell in cells]


def _pipe_table(lines: list[list[str]]) -> str:
    """A table in Markdown of a header and rows."""
    header, *rows = [f"| {' | '.join(line)} |\n" for line in lines]
    return header + "|---" * len(lines[0]) + "|\n" + "".join(rows)
