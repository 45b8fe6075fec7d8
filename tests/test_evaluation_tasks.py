"""Proves that evaluations are chosen by name, tried on few pictures, explained picture by picture, and run from Python, and
that the data of the papers' tables is fetched as it is read."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from helpers import encode_image, random_picture, without_speed, write_shard
from huggingface_hub import DryRunFileInfo
from transformers import CLIPModel, CLIPProcessor

from hf_maskclip import export_to_clip
from hf_maskclip.cli import main as cli
from hf_maskclip.errors import ConfigError
from hf_maskclip.evaluation import Encoder, Request, download, evaluate, find_evaluations
from hf_maskclip.evaluation.datasets import scenes
from hf_maskclip.evaluation.suites import tasks_of_suite

CLASSES = ["red fish", "blue bird", "green frog"]
SIX = {"zero_shot": ["zero_shot_shape", "zero_shot_colour", "zero_shot_pair"], "retrieval_scenes": ["retrieval_scenes"]}


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    for name in ("SCENES_PER_SET", "PROBE_SCENES", "COMPOSITIONALITY_SCENES"):
        monkeypatch.setattr(scenes, name, 20)


@pytest.fixture
def folder(make_model, processor, tmp_path) -> str:
    export_to_clip(make_model("random"), tmp_path / "model", processor)
    return str(tmp_path / "model")


def labelled_set(folder: Path, splits: tuple[str, ...] = ("test",), seed: int = 0) -> Path:
    """A clip-benchmark folder of six pictures a split, in three classes."""
    folder.mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    for number, split in enumerate(splits):
        (folder / split).mkdir()
        (folder / split / "nshards.txt").write_text("1")
        pictures = [encode_image(random_picture(seed + 10 * number + n)) for n in range(6)]
        samples = {f"s{n}": {"png": picture, "cls": str(n % 3).encode()} for n, picture in enumerate(pictures)}
        write_shard(folder / split / "0.tar", samples)
    return folder


# ---- Names -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["zero_shot"], ["retrieval_scenes"], ["retrieval_scenes", "zero_shot"]])
def test_tasks_and_families_are_chosen_by_name(names, folder):
    expected = [task for name in SIX if name in names for task in SIX[name]]
    assert list(evaluate(folder, names, suite="scenes")) == expected


def test_the_suite_of_a_name_is_found(folder, tmp_path):
    assert list(evaluate(folder, ["zero_shot_pair"])) == ["zero_shot_pair"]
    labelled_set(tmp_path / "data" / "wds_cars")
    assert list(evaluate(folder, ["zero_shot_cars"], data_root=tmp_path / "data")) == ["zero_shot_cars"]


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (["zero_shot_colours"], {}, "task 'zero_shot_colours': there is none of this name; did you mean zero_shot_colour?"),
        (["imagenet"], {"suite": "paper"}, "task 'imagenet': there is none of this name; "),
        (["zero_shot"], {}, "tasks zero_shot: are in the suites scenes and paper; say which suite"),
        (["zero_shot_pair", "zero_shot_cars"], {}, "tasks zero_shot_pair, zero_shot_cars: no suite has all of them"),
        (["zero_shot_cars"], {"data_root": "nowhere"}, "task zero_shot_cars: its data is not there"),
        ([], {"suite": "paper", "data_root": "nowhere"}, "none of the data sets is there; hf-maskclip download gets them"),
        ([], {}, "tasks: name some, or a suite"),
    ],
)
def test_names_that_cannot_be_meant(tasks, options, message, folder):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        evaluate(folder, tasks, **options)


def test_the_command_lists_its_tasks_and_takes_them(folder, tmp_path, capsys):
    assert cli(["evaluate", "--list_tasks"]) == 0
    listed = capsys.readouterr().out
    for suite, count in (("scenes", 19), ("paper", 17 + 3 + 3 + 6 + 7)):
        names = [task.name for task in tasks_of_suite(suite)]
        assert len(set(names)) == count
        assert all(name in listed for name in names)
    output = tmp_path / "eval.json"
    assert cli(["evaluate", "--model", folder, "--tasks", "zero_shot_pair,retrieval_scenes", "--output", str(output)]) == 0
    assert list(json.loads(output.read_text())["results"]) == ["zero_shot_pair", "retrieval_scenes"]


# ---- From Python -----------------------------------------------------------------------------------------------------------


def test_a_folder_a_model_and_an_encoder_have_the_same_results(folder):
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder, backend="pil")
    by_folder = evaluate(folder, ["zero_shot_pair"])
    assert by_folder["zero_shot_pair"]["n"] == 20
    assert without_speed(evaluate(model, ["zero_shot_pair"], processor=processor)) == without_speed(by_folder)
    assert without_speed(evaluate(Encoder(model, processor), ["zero_shot_pair"])) == without_speed(by_folder)
    with pytest.raises(ConfigError, match="a model needs its processor"):
        evaluate(model, ["zero_shot_pair"])
    with pytest.raises(ConfigError, match="an Encoder has its own processor and limit"):
        evaluate(Encoder(model, processor), ["zero_shot_pair"], limit=3)


def test_data_of_ones_own_beside_a_suite(folder, tmp_path):
    own = find_evaluations(str(labelled_set(tmp_path / "things")), Request("zero_shot_classification"))
    assert list(evaluate(folder, own)) == ["zero_shot_things"]
    assert list(evaluate(folder, [*own, "zero_shot_pair"])) == ["zero_shot_things", "zero_shot_pair"]


def test_an_output_file_is_gone_on_from(folder, tmp_path, monkeypatch):
    output = tmp_path / "eval.json"
    first = evaluate(folder, ["zero_shot_pair"], output=output)
    monkeypatch.setattr(Encoder, "_compute_image_features", lambda *_: pytest.fail("encoded again"))
    assert evaluate(folder, ["zero_shot_pair"], output=output) == json.loads(json.dumps(first))


def test_a_record_has_its_errors_its_speed_and_its_batch_size(folder):
    record = evaluate(folder, ["zero_shot_pair"])["zero_shot_pair"]
    assert set(record["standard_errors"]) == {"top1", "top5", "mean_per_class"}
    assert record["speed"]["images"] == 20
    assert record["speed"]["images_per_second"] == pytest.approx(20 / record["speed"]["seconds"])
    assert record["batch_size"] == 16
    assert "CPU" in record["hardware"]


# ---- A trial ---------------------------------------------------------------------------------------------------------------


def test_a_limit_takes_the_first_pictures_and_says_so(folder, tmp_path, capsys):
    data = str(labelled_set(tmp_path / "things", ("train", "test")))
    for task in ("zero_shot_classification", "linear_probe"):
        (evaluation,) = find_evaluations(data, Request(task))
        (record,) = evaluate(folder, [evaluation], limit=4).values()
        assert (record["n"], record["limit"], record.get("num_train", 4)) == (4, 4, 4)
    output = str(tmp_path / "eval.json")
    command = ["evaluate", "--model", folder, "--tasks", "zero_shot_pair", "--output", output]
    assert cli([*command, "--limit", "7"]) == 0
    assert "(n = 7, a trial on the first 7)" in capsys.readouterr().out
    assert cli(command) == 2  # a trial is never taken for the result
    assert "holds zero_shot_pair with limit 7, and None is asked" in capsys.readouterr().err


# ---- Details ---------------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_details_of_classification_give_its_metrics(folder, tmp_path):
    data = str(labelled_set(tmp_path / "things", ("train", "test")))
    for task in ("zero_shot_classification", "linear_probe"):
        (evaluation,) = find_evaluations(data, Request(task))
        (record,) = evaluate(folder, [evaluation], details=tmp_path / "details").values()
        assert "details" not in record
        predictions = lines(tmp_path / "details" / f"{evaluation.name}.jsonl")
        assert [line["picture"] for line in predictions] == [f"s{n}" for n in range(6)]
        assert {line["label"] for line in predictions} | {line["predicted"] for line in predictions} == set(CLASSES)
        is_right = [line["label"] == line["predicted"] for line in predictions]
        assert sum(is_right) / 6 == record["top1"]
        classes = lines(tmp_path / "details" / f"{evaluation.name}.classes.jsonl")
        assert [(line["class"], line["n"]) for line in classes] == [(name, 2) for name in CLASSES]
        assert sum(line["top1"] for line in classes) / 3 == pytest.approx(record["mean_per_class"])


def test_details_of_several_classes_retrieval_and_compositionality(folder, tmp_path):
    tasks = ["retrieval_scenes", "compositionality_add_object"]
    found = evaluate(folder, tasks, suite="scenes", details=tmp_path)
    searched = lines(tmp_path / "retrieval_scenes.jsonl")
    for way in ("image_to_text", "text_to_image"):
        ranks = torch.tensor([line["wrong_as_near"] for line in searched if line["way"] == way])
        assert (ranks < 1).float().mean().item() == pytest.approx(found["retrieval_scenes"][f"{way}_recall@1"])
    pairs = lines(tmp_path / "compositionality_add_object.jsonl")
    is_right = [line["true_score"] > line["false_score"] for line in pairs]
    assert sum(is_right) / 20 == found["compositionality_add_object"]["accuracy"]
    assert all(line["true"] != line["false"] for line in pairs)


def test_details_that_are_missing_are_made(folder, tmp_path):
    options = {"output": tmp_path / "eval.json", "details": tmp_path / "details"}
    evaluate(folder, ["zero_shot_pair"], output=options["output"])
    evaluate(folder, ["zero_shot_pair"], **options)
    assert len(lines(tmp_path / "details" / "zero_shot_pair.jsonl")) == 20


# ---- Download --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Data sets on a Hub: folders from which files that match the patterns are copied."""
    root = tmp_path / "hub"

    def snapshot_download(repo_id, *, repo_type, local_dir, allow_patterns, dry_run=False):
        assert repo_type == "dataset"
        files = [path for path in (root / repo_id).rglob("*") if path.is_file()]
        names = [str(path.relative_to(root / repo_id)) for path in files]
        wanted = [name for name in names if any(fnmatch(name, pattern) for pattern in allow_patterns)]
        if dry_run:
            sizes = [(root / repo_id / name).stat().st_size for name in wanted]
            return [DryRunFileInfo("0", size, name, "", False, True) for name, size in zip(wanted, sizes, strict=True)]
        for name in wanted:
            (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / repo_id / name, Path(local_dir) / name)
        return str(local_dir)

    monkeypatch.setattr(download, "snapshot_download", snapshot_download)
    return root


def test_what_an_evaluation_reads_is_downloaded_and_no_more(hub, folder, tmp_path, capsys):
    labelled_set(hub / "clip-benchmark" / "wds_cars", ("train", "test"))
    command = ["download", str(tmp_path / "data"), "--tasks", "zero_shot_cars"]
    assert cli([*command, "--dry_run"]) == 0
    assert not (tmp_path / "data").exists()
    said = capsys.readouterr().out
    assert "wds_cars  0 MB  clip-benchmark/wds_cars" in said
    assert "test/*" in said
    assert "train/*" not in said
    assert cli(command) == 0
    assert {path.name for path in (tmp_path / "data" / "wds_cars").iterdir()} == {"classnames.txt", "test"}
    assert evaluate(folder, ["zero_shot_cars"], data_root=tmp_path / "data")["zero_shot_cars"]["n"] == 6
    capsys.readouterr()
    assert cli(command) == 0
    assert capsys.readouterr().out == "everything is there\n"


def test_a_probe_has_its_training_split_downloaded_too(hub, tmp_path):
    labelled_set(hub / "clip-benchmark" / "wds_vtab-cifar10", ("train", "test"))
    assert cli(["download", str(tmp_path / "data"), "--tasks", "zero_shot_cifar10,linear_probe_cifar10"]) == 0
    assert {path.name for path in (tmp_path / "data" / "wds_vtab-cifar10").iterdir()} == {"classnames.txt", "test", "train"}
