"""Proves that the command evaluates an export as the library does, on one process as on two, writes a record for each result,
and refuses what it cannot do in one line."""

import json
from pathlib import Path

import pytest
from helpers import encode_image, random_picture, without_speed, write_shard
from processes import Processes

from hf_maskclip import export_to_clip
from hf_maskclip.cli import main as cli
from hf_maskclip.evaluation.datasets import scenes


def program(arguments: list[str]) -> int:
    return cli(["evaluate", *arguments])


CLASSES = ["red fish", "blue bird", "green frog", "small house", "old car", "tall tree", "loud bell"]


@pytest.fixture
def export(make_model, processor, tmp_path) -> Path:
    export_to_clip(make_model("random"), tmp_path / "model" / "export", processor)
    return tmp_path / "model" / "export"


@pytest.fixture
def things(tmp_path) -> Path:
    """A clip-benchmark folder of 13 test and 13 training pictures in 7 classes: neither divides by two processes' batches."""
    folder = tmp_path / "things"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / "nshards.txt").write_text("1")
        samples = {f"s{n}": {"png": encode_image(random_picture(n % 7)), "cls": str(n % 7).encode()} for n in range(13)}
        write_shard(folder / split / "0.tar", samples)
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    return folder


@pytest.fixture
def command(export, things, tmp_path) -> list[str]:
    task = ["--data", str(things), "--task", "zero_shot_classification", "--batch_size", "4"]
    return ["--model", str(export), *task, "--output", str(tmp_path / "results" / "eval.json")]


def with_option(command: list[str], name: str, value: str) -> list[str]:
    command = list(command)
    if name in command:
        command[command.index(name) + 1] = value
        return command
    return [*command, name, value]


def results_of(command: list[str]) -> dict:
    return json.loads(Path(command[command.index("--output") + 1]).read_text())["results"]


def test_a_record_has_the_value_and_what_it_depends_on(command, export, capsys):
    assert program(command) == 0
    (record,) = results_of(command).values()
    assert record["n"] == 13
    assert 0 <= record["top1"] <= record["top5"] <= 1
    assert (record["task"], record["family"], record["split"]) == ("zero_shot_classification", "zero_shot", "test")
    assert (record["precision"], record["image_backend"], record["patch_mask"]) == ("float32", "pil", None)
    assert record["templates"] == ["a photo of a {c}"]
    assert record["templates_source"] == "default"
    assert record["model_hash"]
    assert f"zero_shot_things: top1 {record['top1']:.1%}" in capsys.readouterr().out


def test_precision_backend_and_mask_are_as_asked_and_recorded(command):
    command = with_option(with_option(command, "--precision", "bfloat16"), "--image_backend", "torchvision")
    assert program(with_option(command, "--patch_mask", "{name: random, mask_ratio: 0.75}")) == 0
    (record,) = results_of(command).values()
    assert (record["precision"], record["image_backend"]) == ("bfloat16", "torchvision")
    assert record["patch_mask"] == {"name": "random", "mask_ratio": 0.75}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["zero_shot_classification", "linear_probe"])
def test_two_processes_and_one_write_the_same_results(command, task, tmp_path):
    command = with_option(command, "--task", task)
    outputs = [str(tmp_path / f"{count}" / "eval.json") for count in (1, 2)]
    for count, output in zip((1, 2), outputs, strict=True):
        started = Processes(count, tmp_path / f"log{count}", program, with_option(command, "--output", output))
        assert started.wait() == [0] * count, started.printed()
    one, two = (results_of(with_option(command, "--output", output)) for output in outputs)
    assert without_speed(one) == without_speed(two)
    assert next(iter(one.values()))["n"] == 13


def test_the_suite_of_scenes_has_all_five_families(command, export, tmp_path, monkeypatch, capsys):
    for name in ("SCENES_PER_SET", "PROBE_SCENES", "COMPOSITIONALITY_SCENES"):
        monkeypatch.setattr(scenes, name, 40)
    output = str(tmp_path / "model" / "eval_scenes.json")
    assert program(["--model", str(export), "--suite", "scenes", "--output", output]) == 0
    results = json.loads(Path(output).read_text())["results"]
    families = [record["family"] for record in results.values()]
    assert {family: families.count(family) for family in families} == {
        "zero_shot": 3,
        "retrieval": 1,
        "linear_probe": 2,
        "robustness": 6,
        "compositionality": 7,
    }
    assert all(record["n"] == 40 for record in results.values())

    capsys.readouterr()
    figure = tmp_path / "bars.png"
    assert cli(["report", output, "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("## ") == 5
    assert "published" not in printed  # scenes are none of the papers' data sets
    assert f"{100 * results['robustness_noise']['top1']:.1f}" in printed
    assert "OOD avg" in printed
    assert "avg object" in printed
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--data": "absent/folder"}, "absent/folder"),
        ({"--model": "/absent/model"}, "error: /absent/model: no such folder"),
        ({"--split": "dev"}, "split='dev'"),
        ({"--batch_size": "0"}, "--batch_size 0: must be at least 1"),
        ({"--suite": "scenes"}, "give either --suite or --tasks, or --data with its --task"),
        ({"--patch_mask": "checkers"}, "checkers"),
        ({"--templates": "absent.txt"}, "absent.txt"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(command, changed, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, value in changed.items():
        command = with_option(command, name, value)
    assert program(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not Path(command[command.index("--output") + 1]).exists()


def test_the_papers_suite_without_data_says_where_to_get_it(command, tmp_path, capsys):
    output = ["--output", str(tmp_path / "eval.json")]
    assert program([*command[:2], "--suite", "paper", "--data_root", str(tmp_path / "absent"), *output]) == 2
    assert "is no folder; --suite paper reads its data sets there" in capsys.readouterr().err
    assert program([*command[:2], "--suite", "paper", "--data_root", str(tmp_path), *output]) == 2
    said = capsys.readouterr().err
    assert "hf download clip-benchmark/wds_imagenet-a" in said
    assert "none of the data sets is there" in said


def test_a_runs_own_evaluation_is_that_of_its_export(run, things, tmp_path):
    summary, _, folder = run(eval_data=str(things))
    output = tmp_path / "eval.json"
    task = ["--data", str(things), "--task", "zero_shot_classification"]
    assert program(["--model", str(folder / "export"), *task, "--output", str(output)]) == 0
    assert without_speed(results_of(["--output", str(output)])) == without_speed(summary["results"])
