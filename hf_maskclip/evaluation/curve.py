"""The curve of a patch mask: quality beside images a second, of whole pictures and at each mask ratio."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..errors import as_config_error, fail
from ..models.patch_mask_registry import ratio_options, set_mask_ratios
from .encoder import Encoder
from .report import FAMILIES
from .results_file import ResultsFile
from .runner import Record, read_patch_mask, run_into_file
from .tasks import Evaluation

WHOLE = "whole"
NOTE = """Families are means over their tasks, in %: of top-1, mean average precision, accuracy, or recall at 1 both ways.
Brackets have the difference to whole pictures. The time is that of decoding, choosing patches and encoding."""

# The masks of a curve by their labels; None encodes whole pictures.
Masks = dict[str, dict[str, Any] | None]


@dataclass(frozen=True)
class Point:
    """Whole pictures, or a ratio: its label, and the records of the evaluations, at each point in the same order."""

    label: str
    records: list[Record]

    def columns(self) -> dict[tuple[str, str], float]:
        """The main metric in percent, by family and column of the report's tables."""
        cells = [(record["family"], FAMILIES[record["family"]].cells(record)) for record in self.records]
        return {(family, column): v[0] for family, row in cells for column, v in row.items() if v}

    def families(self) -> dict[str, float]:
        """The mean over the columns of each family, in percent."""
        found: dict[str, list[float]] = {}
        for (family, _), value in self.columns().items():
            found.setdefault(family, []).append(value)
        return {family: sum(values) / len(values) for family, values in found.items()}


@dataclass(frozen=True)
class Speed:
    """Pictures a second, and the share of their patches that was encoded."""

    images_per_second: float
    kept_share: float


def masks_of(patch_mask: str, ratios: Sequence[float]) -> Masks:
    """The masks of a curve: whole pictures first, then each ratio once, the least first.

    Ratio 0 is whole pictures, whatever a mask would do there.

    Args:
        patch_mask: a name or `{name: ...}`. A ratio replaces each of its mask ratios.

    Raises:
        ConfigError: no mask, one without a ratio, or a ratio that it does not take.
    """
    asked = f"--mask_ratio {' '.join(map(str, ratios))}"
    if not patch_mask:
        fail(f"{asked}: give the --patch_mask that removes these shares of the patches, such as random")
    mask = read_patch_mask(patch_mask)
    if not ratio_options(mask):
        options = ", ".join(key for key in mask if key != "name") or "none"
        fail(f"{asked}: --patch_mask {mask['name']} has no mask ratio; its options are {options}")
    masks: Masks = {WHOLE: None}
    for ratio in ratios:
        if not 0 <= ratio < 1:
            fail(f"--mask_ratio {ratio}: must be in [0, 1), the share of patches that is removed")
    for ratio in sorted({ratio for ratio in ratios if ratio}):
        with as_config_error("--mask_ratio", ratio):
            masks[str(ratio)] = set_mask_ratios(mask, ratio)
    return masks


def check_file(file: ResultsFile, masks: Masks) -> None:
    """Raise a ConfigError where the file has the same mask with other options, or somebody else's picture is beside it."""
    curves = [record for name, record in file.results.items() if "@" in name and record.get("patch_mask")]
    for record, mask in ((record, mask) for record in curves for mask in masks.values() if mask):
        held = record["patch_mask"]
        if held["name"] == mask["name"] and _fixed(held) != _fixed(mask):
            fail(f"output={str(file.path)!r}: holds results under {_fixed(held)}, not {_fixed(mask)}; give another file")
    if len(masks) == 1:
        return  # whole pictures alone, of which no plot is drawn
    plot = plot_of(file)
    if plot == file.path:
        fail(f"output={str(file.path)!r}: its plot goes there; give a file such as {file.path.with_suffix('.json')}")
    if plot.exists() and not curves:
        fail(f"output={str(file.path)!r}: {plot}, where its plot goes, is there already; give another file")


def _fixed(mask: dict[str, Any]) -> dict[str, Any]:
    """What no ratio changes."""
    return {key: value for key, value in mask.items() if key not in ratio_options(mask)}


def plot_of(file: ResultsFile) -> Path:
    return file.path.with_suffix(".png")


def run_curve(
    encoder: Encoder, evaluations: Sequence[Evaluation], masks: Masks, file: ResultsFile, details: str = ""
) -> Iterator[tuple[str, Record, bool]]:
    """What [`run_into_file`] gives, of each evaluation at all points. Names end in `@<mask>_<ratio>`, but of whole pictures.

    Points take turns, and each evaluation begins with another one. So whatever else the machine does slows all of them, and
    none reads all data first.
    """
    model: Any = encoder.model  # each with a patch mask has the method, their common base class has not
    points = list(masks.items())
    for number, evaluation in enumerate(evaluations):
        first = number % len(points)
        for label, mask in points[first:] + points[:first]:
            encoder.apply_patch_mask = mask is not None
            if mask:
                model.set_patch_mask(mask)
            yield from run_into_file(encoder, [replace(evaluation, suffix=_suffix(label, mask))], file, details)


def points_of(results: dict[str, Record], evaluations: Sequence[Evaluation], masks: Masks) -> list[Point]:
    """The points of a curve.

    Args:
        results: the records that [`run_curve`] gave, by their names.
    """
    return [
        Point(label, [results[evaluation.name + _suffix(label, mask)] for evaluation in evaluations])
        for label, mask in masks.items()
    ]


def _suffix(label: str, mask: dict[str, Any] | None) -> str:
    return f"@{mask['name']}_{label}" if mask else ""


def speeds_of(points: Sequence[Point]) -> list[Speed]:
    """The speed of each point, over the evaluations that were timed at all of them; empty where there is none."""
    timed = [n for n in range(len(points[0].records)) if all(point.records[n].get("speed") for point in points)]
    return [_speed([point.records[n]["speed"] for n in timed]) for point in points] if timed else []


def _speed(found: list[dict[str, float]]) -> Speed:
    images = sum(one["images"] for one in found)
    # Records of earlier versions, which have whole pictures only, do not say that all patches were encoded.
    kept = sum(one["images"] * one.get("kept_share", 1.0) for one in found)
    return Speed(images / sum(one["seconds"] for one in found), kept / images)


def table_of(points: Sequence[Point], is_continued: bool = False) -> str:
    """The curve in Markdown: a row for each point; then each task, where a family has several; then what to know of it.

    Args:
        is_continued: some of the results, but not all, stood in the file.
    """
    whole, *_ = points
    speeds = speeds_of(points)
    rows = [["", "patches encoded", "images/s", "times whole", *whole.families()]]
    for number, point in enumerate(points):
        cells = ["–"] * 3
        if speeds:
            speed, times = speeds[number], speeds[number].images_per_second / speeds[0].images_per_second
            cells = [f"{speed.kept_share:.1%}", f"{speed.images_per_second:.1f}", f"{times:.2f}"]
        rows.append([point.label, *cells, *_cells(point.families(), whole.families() if number else None)])
    parts = [_markdown(rows)]
    if len(whole.columns()) > len(whole.families()):
        labels = ["family", "task", *(point.label for point in points)]
        of_ratios = [_cells(point.columns(), whole.columns()) for point in points[1:]]
        columns = [_cells(whole.columns(), None), *of_ratios]
        parts.append(_markdown([labels, *([*key, *cells] for key, *cells in zip(whole.columns(), *columns, strict=True))]))
    return "\n\n".join([*parts, "\n".join([NOTE, *_warnings(points, is_continued)])])


def _cells(values: dict[Any, float], reference: dict[Any, float] | None) -> list[str]:
    """Values in percent, with their differences to those of whole pictures where these are given."""
    differences = {key: f" ({values[key] - value:+.1f})" for key, value in (reference or {}).items()}
    return [f"{value:.1f}{differences.get(key, '')}" for key, value in values.items()]


def _warnings(points: Sequence[Point], is_continued: bool) -> list[str]:
    """What makes the speeds of a table no comparison."""
    if not speeds_of(points):
        return ["No picture was encoded: the features were kept, and the speed is not known."]
    timed = [record for point in points for record in point.records if record.get("speed")]
    names = sorted({f"{record['hardware']} with batches of {record['batch_size']}" for record in timed})
    found = [f"The speeds are no comparison, for they were measured on {'; '.join(names)}."] if len(names) > 1 else []
    continued = "Some results stood in the file: their speed is of then, when the machine may have been more or less busy."
    return [*found, continued] if is_continued else found


def _markdown(rows: list[list[str]]) -> str:
    """Rows, the first of which is the head, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])


def draw_curve(points: Sequence[Point], mask: str) -> Figure:
    """Quality over images a second: a line for each family, its points labelled with the ratios of the mask."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    speeds = [speed.images_per_second for speed in speeds_of(points)]
    for family in points[0].families():
        values = [point.families()[family] for point in points]
        axes.plot(speeds, values, marker="o", markersize=3, linewidth=1, label=family.replace("_", " "))
    for number, (speed, label) in enumerate(sorted(zip(speeds, (point.label for point in points), strict=True))):
        height = 1.01 + 0.045 * (number % 3)  # speeds may be nearly the same
        axes.axvline(speed, color="black", alpha=0.3, linewidth=0.7, linestyle=":")
        axes.text(speed, height, label, transform=axes.get_xaxis_transform(), fontsize=8, ha="center")
    axes.set_xlabel(f"images/s, where {mask} removes the share of patches above")
    axes.set_ylabel("mean over the tasks, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def show_curve(points: Sequence[Point], masks: Masks, file: ResultsFile, is_continued: bool) -> None:
    """Print the table of a curve, and write its plot beside the results.

    Args:
        is_continued: as in [`table_of`].

    Raises:
        ConfigError: the plot cannot be written.
    """
    print(table_of(points, is_continued), flush=True)
    names = [mask["name"] for mask in masks.values() if mask]
    if names and speeds_of(points):
        plot = plot_of(file)
        with as_config_error("plot", plot):
            draw_curve(points, names[0]).savefig(plot, dpi=150)
        print(f"written to {plot}")
