"""Proves that the report shows what the files of results say, beside the papers' rows, and that its averages are over what the
papers' are over."""

import json

from hf_maskclip.cli import main as cli
from hf_maskclip.evaluation.report import PUBLISHED, read_results


def test_the_report_puts_measured_rows_beside_the_papers(tmp_path, capsys):
    def write(model, column, top1, **other):
        records = {"zero_shot_x": {"family": "zero_shot", "column": column, "data": "d", "top1": top1}}
        records |= other
        (tmp_path / model).mkdir(exist_ok=True)
        (tmp_path / model / f"eval_{column}.json").write_text(json.dumps({"results": records}))

    recalls = {f"{way}_recall@{k}": k / 100 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    retrieval = {"family": "retrieval", "column": "COCO", "data": "d"} | recalls
    write("mine", "Food101", 0.4321, retrieval_coco=retrieval)
    write("mine", "CIFAR10", 0.5)
    assert cli(["report", *map(str, sorted((tmp_path / "mine").iterdir())), "-o", str(tmp_path / "report.md")]) == 0
    lines = (tmp_path / "report.md").read_text().splitlines()
    header, theirs, mine = (
        next(line for line in lines if line.startswith(f"| {name}")) for name in ("method", "CLIP ", "mine")
    )
    columns = [cell.strip() for cell in header.split("|")]
    assert [mine.split("|")[columns.index(c)].strip() for c in ("Food101", "CIFAR10", "Cars")] == ["43.2", "50.0", "–"]
    assert theirs.split("|")[columns.index("Food101")].strip() == str(PUBLISHED["zero_shot"]["CLIP"]["Food101"])
    assert mine.split("|")[columns.index("Average")].strip() == "–"  # of 2 of 17 data sets there is no average
    assert any(line.startswith("| mine | 1.0/5.0/10.0") for line in lines)

    for column in PUBLISHED["zero_shot"]["CLIP"]:
        write("whole", column, 0.25)
    (table,) = read_results((tmp_path / "whole").iterdir())
    assert "| whole |" in table.markdown()
    assert table.markdown().splitlines()[-1].endswith("| 25.0 |")
    write("mine", "Food101-again", 0.1, zero_shot_y={"family": "zero_shot", "column": "Food101", "data": "d", "top1": 0.2})
    assert cli(["report", *map(str, (tmp_path / "mine").iterdir())]) == 2
    assert "another file has another result for zero_shot Food101 of mine" in capsys.readouterr().err


def test_the_published_rows_have_the_averages_that_the_report_computes():
    """So the averages are over what the papers' are over: theirs follow from their own columns, to the last printed digit."""
    from hf_maskclip.evaluation.report import AVERAGE_COLUMNS, averages

    deviating = set()
    for family in ("zero_shot", "robustness", "compositionality"):
        for method, row in PUBLISHED[family].items():
            single = {column: (value,) for column, value in row.items() if column not in AVERAGE_COLUMNS}
            found = averages(family, single, set(single))
            assert set(found) == set(row) - set(single)
            deviating |= {(method, name) for name in found if abs(found[name][0] - row[name]) > 0.11}
    # What does not follow from the paper's own columns is a misprint there, or an average of other columns.
    assert deviating == {
        ("CLIP", "OOD avg"),
        ("A-CLIP", "OOD avg"),
        ("CLIP", "avg object"),
        ("A-CLIP", "avg object"),
        ("E-CLIP", "avg attribute"),
    }


def test_no_file_of_results_is_one_line(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"results": [1]}')
    assert cli(["report", str(tmp_path / "x.json")]) == 2
    assert "x.json: is no file of results" in capsys.readouterr().err
