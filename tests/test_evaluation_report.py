"""Proves that the report shows what the files of results say, beside the papers' rows, and that its averages are over what the
papers' are over. And that results of clip_benchmark stand in the same columns, or are named."""

import json

import pytest

from hf_maskclip.cli import main as cli
from hf_maskclip.evaluation.datasets.papers import ROBUSTNESS
from hf_maskclip.evaluation.report import PUBLISHED, Table, make_tables, other_averages
from hf_maskclip.evaluation.report_files import read_result_file

EVERYTHING = {"measured": {column: (0.0,) for family in ("zero_shot", "robustness") for column in PUBLISHED[family]["CLIP"]}}
EVERYTHING["measured"] |= {column: (0.0,) for column in PUBLISHED["compositionality"]["CLIP"]}


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
    (table,) = make_tables(map(read_result_file, (tmp_path / "whole").iterdir()))
    assert "| whole |" in table.markdown()
    assert table.markdown().splitlines()[-1].endswith("| 25.0 |")
    write("mine", "Food101-again", 0.1, zero_shot_y={"family": "zero_shot", "column": "Food101", "data": "d", "top1": 0.2})
    assert cli(["report", *map(str, (tmp_path / "mine").iterdir())]) == 2
    assert "another file has another result for zero_shot Food101 of mine" in capsys.readouterr().err


def test_averages_follow_one_rule_in_all_rows_and_what_the_paper_prints_otherwise_is_said(tmp_path):
    """Published averages follow from their own columns, to the last printed digit; what does not is a misprint there."""
    deviating = set()
    for family in ("zero_shot", "robustness", "compositionality"):
        deviating |= {(family, text) for text in other_averages(family, Table(family, "", EVERYTHING).published_rows())}
    assert deviating == {
        ("robustness", "CLIP OOD avg 29.0"),
        ("robustness", "A-CLIP OOD avg 30.3"),
        ("compositionality", "CLIP avg object 73.7"),
        ("compositionality", "A-CLIP avg object 71.6"),
        ("compositionality", "E-CLIP avg attribute 68.4"),
    }
    theirs = PUBLISHED["robustness"]["CLIP"]
    records = {c: {"family": "robustness", "column": c, "data": "d", "top1": theirs[c] / 100} for c in ROBUSTNESS}
    (tmp_path / "eval.json").write_text(json.dumps({"results": records}))
    (table,) = make_tables([read_result_file(tmp_path / "eval.json")])
    lines = table.markdown().splitlines()
    published, measured = (
        next(line for line in lines if line.startswith(f"| {m} ")) for m in ("CLIP (published)", tmp_path.name)
    )
    assert published.split("|")[2:] == measured.split("|")[2:]  # the same columns give the same averages
    assert published.rstrip(" |").endswith("29.9")
    assert "the paper prints: CLIP OOD avg 29.0; A-CLIP OOD avg 30.3." in lines[-1]


def test_rows_of_other_settings_stand_apart_and_say_whether_they_compare(tmp_path, capsys):
    top1 = {"family": "robustness", "column": "ImageNet-1K", "data": "d", "top1": 0.3}
    recalls = {f"{way}_recall@{k}": 0.5 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    coco = {"family": "retrieval", "column": "COCO", "data": "d"} | recalls
    cars = {"family": "zero_shot", "column": "Cars", "data": "d", "top1": 0.2}
    (tmp_path / "eval.json").write_text(json.dumps({"results": {"a": top1, "b": coco, "c": cars}}))
    assert cli(["report", str(tmp_path / "eval.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("Published in other settings. The published rows above are of CC12M, ViT-B/16, 32 epochs.") == 2
    expected = [
        "| CLIPF 0.5, 8 tokens | CC12M | ViT-B/16 | 30 epochs | in data and model | 39.8 | arXiv 2412.16148",
        "| CLIPF 0.5, 8 tokens | CC12M | ViT-B/16 | 30 epochs, 1 more without masks | in data and model | 41.0 | arXiv 2412",
        "| FLIP 0.75 | LAION-400M | ViT-L/16 | 6.4 epochs | no | 68.2 | arXiv 2212.00794, table 1 (d) |",
        "| A-CLIP | YFCC15M | ViT-B/16 | 25 epochs | no | 43.9 | arXiv 2212.08653",
        "| A-CLIP | YFCC15M | ViT-B/16 | 25 epochs | no | 38.0/–/– | 23.2/–/– | arXiv 2212.08653",
    ]
    assert [sum(line.startswith(start) for line in lines) for start in expected] == [1] * len(expected)
    # The paper's own rows, and what follows from them, have no part in it.
    tables = {table.family: table for table in make_tables([read_result_file(tmp_path / "eval.json")])}
    assert not tables["zero_shot"].other_settings()
    assert "CLIPF" not in tables["robustness"].markdown()
    assert set(tables["robustness"].means()[0]) == {f"{m} (published)" for m in PUBLISHED["robustness"]} | {tmp_path.name}


def test_published_rows_of_all_settings_are_in_the_tables_columns():
    for group in PUBLISHED["other_settings"]:
        assert all(group[key] for key in ("source", *PUBLISHED["setting"]))
        families = set(group) - {"source", *PUBLISHED["setting"]}
        assert families
        for family in families:
            known = PUBLISHED[family]["CLIP"]
            for row in group[family].values():
                assert row
                assert row.keys() <= known.keys()
                assert all(isinstance(value, list) == isinstance(known[column], list) for column, value in row.items())


def of_clip_benchmark(dataset, task, metrics, **about):
    about = {"model": "ViT-B-32", "pretrained": "laion2b"} | about
    return {"dataset": dataset, "task": task, "metrics": metrics, "language": "en"} | about


ACC = {"acc1": 0.5, "acc5": 0.9, "mean_per_class_recall": 0.4}
RECALLS = {f"{what}_retrieval_recall@{k}": k / 20 + (what == "text") / 100 for what in ("image", "text") for k in (1, 5, 10)}
# What clip_benchmark wrote, and the cells that it fills: family, column, percent.
MAPPED = [
    (of_clip_benchmark("wds/vtab/cifar10", "zeroshot_classification", ACC), [("zero_shot", "CIFAR10", 50.0)]),
    (of_clip_benchmark("wds/cars", "zeroshot_classification", ACC), [("zero_shot", "Cars", 50.0)]),
    (of_clip_benchmark("imagenet-a", "zeroshot_classification", ACC), [("robustness", "A", 50.0)]),
    (of_clip_benchmark("wds/imagenetv2", "zeroshot_classification", ACC), [("robustness", "V2", 50.0)]),
    (
        of_clip_benchmark("wds/voc2007", "zeroshot_classification", {"mean_average_precision": 0.7}),
        [("zero_shot", "VOC2007", 70.0)],
    ),
    (
        of_clip_benchmark("wds/mscoco_captions", "zeroshot_retrieval", RECALLS),
        [("retrieval", "text COCO", (6.0, 26.0, 51.0)), ("retrieval", "image COCO", (5.0, 25.0, 50.0))],
    ),
    (
        of_clip_benchmark("imagenet1k", "linear_probe", {"lp_acc1": 0.6, "lp_acc5": 0.9, "fewshot_k": -1, "seed": 0}),
        [("linear_probe", "ImageNet-1K", 60.0)],
    ),
    (
        of_clip_benchmark("sugar_crepe/add_att", "image_caption_selection", {"text_acc": 0.8, "image_acc": 1.0, "acc": 0.8}),
        [("compositionality", "add_attribute", 80.0)],
    ),
]
LEFT_OUT = {
    "is in no table here": of_clip_benchmark("wds/objectnet", "zeroshot_classification", ACC),
    "captioning on mscoco_captions: is in no table": of_clip_benchmark("mscoco_captions", "captioning", {"Bleu_1": 0.3}),
    "in the language 'it'": of_clip_benchmark("imagenet1k", "zeroshot_classification", ACC, language="it"),
    "without recall at 1": of_clip_benchmark("flickr8k", "zeroshot_retrieval", {"text_retrieval_recall@5": 0.5}),
    "at 5 before 10": of_clip_benchmark("flickr8k", "zeroshot_retrieval", {k: v for k, v in RECALLS.items() if "@5" not in k}),
    "of 16 pictures a class": of_clip_benchmark("cifar10", "linear_probe", {"lp_acc1": 0.6, "fewshot_k": 16}),
    "has none of the metrics": of_clip_benchmark("cifar10", "zeroshot_classification", {"loss": 1.0}),
}


@pytest.mark.parametrize(("content", "cells"), MAPPED, ids=[content["dataset"] for content, _ in MAPPED])
def test_results_of_clip_benchmark_are_read(content, cells, tmp_path):
    (tmp_path / "b.json").write_text(json.dumps(content))
    tables = {table.family: table for table in make_tables([read_result_file(tmp_path / "b.json")])}
    assert {family for family, _, _ in cells} == set(tables)
    for family, column, value in cells:
        (row,) = tables[family].rows.values()
        assert list(tables[family].rows) == ["ViT-B-32 laion2b"]
        assert row[column] == pytest.approx(value if isinstance(value, tuple) else (value,))


@pytest.mark.parametrize("words", LEFT_OUT)
def test_what_clip_benchmark_has_and_no_table_has_is_said_in_one_line(words, tmp_path, capsys):
    (tmp_path / "b.json").write_text(json.dumps(LEFT_OUT[words]))
    (tmp_path / "good.json").write_text(json.dumps(MAPPED[0][0]))
    assert cli(["report", str(tmp_path / "b.json"), str(tmp_path / "good.json")]) == 0
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert "| ViT-B-32 laion2b |" in printed.out
    assert cli(["report", str(tmp_path / "b.json")]) == 2
    assert "no results in it" in capsys.readouterr().err


def test_what_was_measured_under_a_mask_or_on_some_pictures_has_a_row_of_its_own(tmp_path):
    whole = {"family": "zero_shot", "column": "Cars", "data": "d", "top1": 0.5, "patch_mask": None, "limit": None}
    changes = {"eval": {}, "eval_own": {"top1": 0.25, "patch_mask": {"name": "own"}}, "eval_try": {"top1": 0.75, "limit": 10}}
    changes["at one ratio"] = {"top1": 0.125, "patch_mask": {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}}
    ceiling = {"name": "cluster", "mask_ratio": 0.5, "min_mask_ratio": 0.3, "max_mask_ratio": None}
    changes["at two"] = {"top1": 0.375, "patch_mask": ceiling}
    for name, changed in changes.items():
        record = whole | changed
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": {"r": record}}))
    (table,) = make_tables(map(read_result_file, sorted(tmp_path.iterdir())))
    found = {
        "": 50.0,
        ", under own": 25.0,
        ", first 10": 75.0,
        ", under pgs at 0.5": 12.5,
        ", under cluster (0.3 to 0.5)": 37.5,
    }
    assert table.rows == {f"{tmp_path.name}{condition}": {"Cars": (value,)} for condition, value in found.items()}


NO_RESULTS = [
    "",
    "[]",
    "{}",
    "null",
    '{"results": [1]}',
    '{"results": {"r": {"family": "zero_shot"}}}',
    '{"results": {"r": 1}}',
]


@pytest.mark.parametrize("text", NO_RESULTS)
def test_no_file_of_results_is_one_line(text, tmp_path, capsys):
    (tmp_path / "x.json").write_text(text)
    assert cli(["report", str(tmp_path / "x.json"), "--figure", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert "x.json: is no file of results" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_each_file_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "b.json").write_text(json.dumps(MAPPED[0][0]))
    opened, read_text = [], type(tmp_path).read_text
    monkeypatch.setattr(type(tmp_path), "read_text", lambda path, **kw: opened.append(path.name) or read_text(path, **kw))
    assert cli(["report", str(tmp_path / "b.json")]) == 0
    assert opened.count("b.json") == 1
