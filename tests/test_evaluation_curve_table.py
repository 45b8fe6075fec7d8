"""Proves that the table and the plot of a curve have what its records say, and say which speeds are no comparison."""

import pytest

from hf_maskclip.evaluation.curve import Point, draw_curve, speeds_of, table_of


def record(top1: float, images: int | None = None, seconds: float = 1.0, **more) -> dict:
    speed = None if images is None else {"images": images, "seconds": seconds, "images_per_second": images / seconds}
    about = {"family": "zero_shot", "column": "a", "hardware": "2 CPUs", "batch_size": 16, "top1": top1, "speed": speed}
    if speed and "kept_share" in more:
        speed["kept_share"] = more.pop("kept_share")
    return about | more


def test_speeds_are_over_what_was_timed_at_every_point():
    whole = Point("whole", [record(0.5, 10), record(0.25, 90, 9.0, column="b"), record(0.5, None, column="c")])
    half = Point(
        "0.5", [record(0.375, 10, 0.25, kept_share=0.5), record(0.25, None, column="b"), record(0.5, 5, 1.0, column="c")]
    )
    assert [(speed.images_per_second, speed.kept_share) for speed in speeds_of([whole, half])] == [(10.0, 1.0), (40.0, 0.5)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_of([whole, half]).splitlines()]
    assert rows[2] == ["whole", "100.0%", "10.0", "1.00", "41.7"]
    assert rows[3] == ["0.5", "50.0%", "40.0", "4.00", "37.5 (-4.2)"]
    assert rows[7] == ["zero_shot", "a", "50.0", "37.5 (-12.5)"]
    (axes,) = draw_curve([whole, half], "pgs").axes
    assert axes.lines[0].get_xdata().tolist() == [10.0, 40.0]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([125 / 3, 37.5])
    assert [text.get_text() for text in axes.texts] == ["whole", "0.5"]


def test_two_families_of_retrieval_and_precision_have_their_main_metric():
    found = Point(
        "whole",
        [
            {"family": "retrieval", "column": "x", "image_to_text_recall@1": 0.25, "text_to_image_recall@1": 0.75},
            {"family": "zero_shot", "column": "voc", "mean_average_precision": 0.5},
            {"family": "retrieval", "column": "one text"},  # among one, recall says nothing
        ],
    )
    assert found.families() == {"retrieval": 50.0, "zero_shot": 50.0}


CONDITIONS = {
    "no comparison, for they were measured on 2 CPUs with batches of 16; cuda with batches of 16": {"hardware": "cuda"},
    "no comparison, for they were measured on 2 CPUs with batches of 16; 2 CPUs with batches of 4": {"batch_size": 4},
    "the features were kept, and the speed is not known": {"speed": None},
}


@pytest.mark.parametrize("message", CONDITIONS)
def test_speeds_that_are_no_comparison_are_told(message):
    alike = [Point("whole", [record(0.5, 10)]), Point("0.5", [record(0.5, 10)])]
    other = [alike[0], Point("0.5", [record(0.5, 10) | CONDITIONS[message]])]
    assert message in table_of(other)
    assert message not in table_of(alike)
