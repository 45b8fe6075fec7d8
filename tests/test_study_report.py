"""Proves that the numbers of a study's report follow from its results, and that the tables of the pages are those of the
results that are kept."""

import math
from dataclasses import replace

import numpy as np
import pytest

from training.study import pages
from training.study import run as study_run
from training.study.report import Curve, Report, mean_and_error, paired_difference, read_results, time_to_reach, write_results

PAIR = "zero_shot_pair/top1"


def made_up(method: str, seed: int, budget: str, step_seconds: float, scores: list[float], steps: int = 100) -> dict:
    """The result of a run that was evaluated at equal distances, the last time at its end."""
    evaluated = [steps * number // len(scores) for number in range(1, len(scores) + 1)]
    curve = [
        {"step": step, "seconds": step * step_seconds, "samples_seen": 8 * step, "metrics": {PAIR: score}}
        for step, score in zip(evaluated, scores, strict=True)
    ]
    run = {"method": method, "seed": seed, "budget": budget, "steps": steps, "samples_seen": 8 * steps, "base": {}}
    run |= {"seconds_per_step": step_seconds, "train_seconds": steps * step_seconds, "curve": curve, "commit": None}
    run |= {"versions": {"torch": "2"}, "machine": {"processor": "CPU", "cpus": 2, "precision": "bf16"}}
    return run | {"metrics": {PAIR: scores[-1], "other/top1": scores[-1] / 2}}


@pytest.fixture
def report() -> Report:
    results = [
        made_up("none", 0, "samples", 1.0, [0.2, 0.4]),
        made_up("none", 1, "samples", 2.0, [0.4, 0.6]),
        made_up("pgs", 0, "samples", 0.5, [0.1, 0.3]),
        made_up("pgs", 1, "samples", 0.8, [0.3, 0.3]),
        made_up("pgs", 0, "time", 0.5, [0.4, 0.7], steps=200),
    ]
    return Report(results, ["none", "pgs", "cluster"], {"pair": [PAIR], "both": [PAIR, "other/top1"]}, "pair")


def test_mean_and_standard_error():
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert mean_and_error([5.0]) == (5.0, 0.0)


def test_the_report_has_means_errors_relative_times_and_times_to_reach(report):
    header, _, none, pgs = report.table("samples").splitlines()
    assert header == "| method | n | pair | both | relative time | time to reach | pairs seen | seconds |"
    assert none == "| none | 2 | 50.0 ± 10.0 | 37.5 ± 7.5 | 1.00 | 1.00 | 800 | 100 |"
    # the fastest seeds take 0.5 and 1 s a step; its mean curve ends at 30 %, below the 50 % of none
    assert pgs == "| pgs | 2 | 30.0 ± 0.0 | 22.5 ± 0.0 | 0.50 | not reached | 800 | 50 |"
    # from 40 % after 50 s to 70 % after 100 s, 50 % are reached after 66.7 s of the 100 s of none; one seed has no error
    assert report.table("time").splitlines()[-1] == "| pgs | 1 | 70.0 | 52.5 | 0.50 | 0.67 | 1,600 | 100 |"
    assert report.reach("pgs", "time") == pytest.approx(2 / 3)
    assert report.reach("cluster", "time") is None
    assert math.isnan(report.relative_time("cluster"))
    text = report.markdown()
    assert "over that of `none`" in text
    assert "cluster" not in text
    assert "CPU, 2 CPUs, bf16" in text
    assert text.index("Equal samples") < text.index("Equal time")


def test_differences_are_paired_by_seed_with_their_intervals(report):
    header, _, pgs = report.differences("samples", "none").splitlines()
    assert header == "| method | n | pair | both |"
    # -10 and -30 points: a mean of -20, an error of 10, and t(0.975) of one degree of freedom is 12.706
    assert pgs == "| pgs | 2 | -20.0 (-147.1 to +107.1; 0 of 2) | -15.0 (-110.3 to +80.3; 0 of 2) |"
    assert report.differences("time", "none").splitlines()[-1] == "| pgs | 1 | +30.0 | +22.5 |"
    assert paired_difference([0.4, 0.2, 0.3], [0.2, 0.3, 0.2]).endswith("; 2 of 3)")
    assert paired_difference([0.3, 0.4], [0.2, 0.3]) == "+10.0"  # equal but for the rounding of floats
    assert paired_difference([0.4, 0.5], [0.3]) == paired_difference([], []) == "–"
    assert "Less" not in report.markdown()
    assert "Less `none`, in points (95 % interval; seeds ahead):" in replace(report, rivals=["none"]).markdown()


def test_sets_are_compared_side_by_side(report):
    reports = {"scenes": replace(report, rivals=["none"]), "pairs": report}
    header, _, none, pgs = pages.comparison_table(reports, "samples", {"pgs": "none"}).splitlines()
    scenes, pairs = "drawn scenes: R@10 (seeds)", "clip art and emoji: R@10 (seeds)"
    assert header == f"| method | time | {scenes} | less `none` | less its control | {pairs} | less its control |"
    assert none == "| `none` | 1.00 | 50.0 ± 10.0 (2) | – | – | 50.0 ± 10.0 (2) | – |"
    difference = "-20.0 (-147.1 to +107.1; 0 of 2)"
    assert pgs == f"| `pgs` | 0.50 | 30.0 ± 0.0 (2) | {difference} | {difference} | 30.0 ± 0.0 (2) | {difference} |"
    only_scenes = replace(report, results=[result for result in report.results if result["method"] == "none"])
    assert len(pages.comparison_table({"scenes": report, "pairs": only_scenes}, "samples").splitlines()) == 3


def test_peers_are_compared_on_each_set_and_on_all_together(report):
    other = replace(report, results=[made_up("none", 2, "samples", 1.0, [0.4]), made_up("pgs", 2, "samples", 1.0, [0.5])])
    report = replace(report, methods=["none", "pgs"])
    header, _, pgs = pages.peers_table({"public": report, "own": other}).splitlines()
    assert header == "| less `none` | public | own | together |"
    # -10, -30 and +10 points: a mean of -10, an error of 11.55, and t(0.975) of two degrees of freedom is 4.303
    assert pgs == "| `pgs` | -20.0 (-147.1 to +107.1; 0 of 2) | +10.0 | -10.0 (-59.7 to +39.7; 1 of 3) |"


def test_precisions_are_compared_by_what_the_results_say_they_ran_in(report):
    exact = [made_up("pgs", seed, "samples", 1.0, [0.5]) for seed in (1, 2)]
    for result in exact:
        result["machine"] = result["machine"] | {"precision": "float32"}
    other = replace(report, results=exact, methods=["pgs", "cluster"], baseline="pgs")
    header, _, pgs, cluster = pages.precisions_table({"scenes": (report, other)}).splitlines()
    assert header == "| set | method | float32 | bf16 | float32 less bf16 |"
    assert pgs == "| drawn scenes | `pgs` | 50.0 | 30.0 | +20.0 |"  # of seed 1 alone, which ran in both
    assert cluster == "| drawn scenes | `cluster` | – | – | – |"
    alike = replace(other, results=[made_up("pgs", 1, "samples", 1.0, [0.5])])  # a machine with bf16 has nothing to compare
    assert "| drawn scenes | `pgs` | – | – | – |" in pages.precisions_table({"scenes": (report, alike)})


def test_the_table_of_the_readme_is_that_of_equal_time(report):
    header, _, none, pgs = pages.short_table({"scenes": report, "pairs": report}).splitlines()
    sets = "drawn scenes, equal time | reached at | clip art and emoji, equal time | reached at"
    assert header == f"| mask | time of a step | {sets} |"
    assert none == "| `none` | 1.00 | 50.0 ± 10.0 | 1.00 | 50.0 ± 10.0 | 1.00 |"
    assert pgs == "| `pgs` | 0.50 | 70.0 | 0.67 | 70.0 | 0.67 |"


def test_a_run_that_was_evaluated_at_its_end_only_does_not_say_when_it_reached_the_baseline(report):
    assert report.reach_cell("pgs", "samples") == "not reached"
    once = [made_up("pgs", 0, "samples", 0.5, [0.9]), *report.of("none", "samples")]
    assert "| 0.50 | – | 800 | 50 |" in replace(report, results=once).table("samples")


def test_another_baseline_is_what_times_are_measured_by(report):
    report = replace(report, baseline="pgs")
    *_, none, pgs = report.table("samples").splitlines()
    # 1 / 0.5; its mean curve reaches the final 30 % of pgs at its first evaluation, after 50 s, all that pgs takes
    assert none == "| none | 2 | 50.0 ± 10.0 | 37.5 ± 7.5 | 2.00 | 1.00 | 800 | 100 |"
    assert pgs.startswith("| pgs | 2 | 30.0 ± 0.0 | 22.5 ± 0.0 | 1.00 | 1.00 |")
    assert "over that of `pgs`" in report.markdown()


def test_a_curve_is_the_mean_over_seeds_at_equal_shares_of_the_run_and_at_the_pace_of_the_fastest(report):
    curve = report.curve("none", "samples")
    assert curve.seconds.tolist() == [50, 100]
    assert curve.mean.tolist() == pytest.approx([0.3, 0.5])
    assert curve.error.tolist() == pytest.approx([0.1, 0.1])
    assert report.curve("cluster", "samples") is None


def test_the_time_to_reach_a_value_is_linear_between_points():
    curve = Curve(np.array([10.0, 20.0, 30.0]), np.array([0.1, 0.5, 0.3]), np.zeros(3))
    assert time_to_reach(curve, 0.3) == pytest.approx(15)
    assert time_to_reach(curve, 0.05) == 10
    assert time_to_reach(curve, 0.6) is None


def test_the_figure_has_a_line_for_each_method_and_a_panel_for_each_budget(report):
    figure = report.figure()
    assert [axes.get_title() for axes in figure.axes] == ["Equal samples", "Equal time"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["pgs", "none"]  # in the order in which they end


# ---- What is kept ---------------------------------------------------------------------------------------------------------


def test_the_results_that_are_kept_are_all_there_one_a_line(tmp_path, masks_of_ideas):
    kept = {"scenes": 191, "pairs": 169, "peer": 12, "peer_sample": 12, "pairs_float32": 3, "ablation": 15, "larger": 14}
    for name, num_runs in kept.items():
        file, copy = pages.RESULTS / f"{name}.jsonl", tmp_path / f"{name}.jsonl"
        write_results(results := read_results(file), copy)
        assert copy.read_bytes() == file.read_bytes()
        assert len(results) == len(pages.read_report(name).results) == num_runs


def test_the_pages_say_what_the_results_say(masks_of_ideas):
    scenes, pairs = (pages.read_report(name) for name in ("scenes", "pairs"))
    tables = pages.tables(scenes, pairs)
    for name in pages.PAGES:
        page = (study_run.ROOT / name).read_text()
        assert page.count("<!-- table: ") == page.count("<!-- end -->") > 0
        assert page == pages.fill(page, tables), f"{name}: run python -m training.study.pages"
    assert tables["in short"] in (study_run.ROOT / "README.md").read_text()
    assert tables["summary, equal time"] in (study_run.ROOT / "docs" / "study.md").read_text()


def test_the_summary_has_the_methods_of_all_seeds_and_the_others_have_tables_of_their_own(masks_of_ideas):
    scenes, pairs = (pages.read_report(name) for name in ("scenes", "pairs"))
    tables = pages.tables(scenes, pairs)
    for budget in ("samples", "tokens", "time"):
        _, _, *summary = tables[f"summary, equal {budget}"].splitlines()
        _, _, *others = tables[f"other rows, equal {budget}"].splitlines()
        assert len(summary) == 8
        assert all("(5)" in row and "(4)" in row for row in summary)
        assert len(others) == 9
        assert all(row.count("(3)") == 2 for row in others)
    assert len(tables["in short"].splitlines()) == 2 + 8
    drawn = {line.get_label() for axes in pages.figure(scenes, pairs).axes for line in axes.get_lines()}
    assert "pgs 0.5" in drawn
    assert "coarse" not in drawn


def test_a_table_goes_between_its_comments_and_nowhere_else():
    page = "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\n"
    filled = pages.fill(page, {"x": "| 1 |\n", "y": "| 2 |\n"})
    assert filled == "a\n<!-- table: x -->\n| 1 |\n<!-- end -->\nb\n<!-- table: y -->\n| 2 |\n<!-- end -->\n"
    with pytest.raises(KeyError, match="y"):
        pages.fill(page, {"x": ""})
