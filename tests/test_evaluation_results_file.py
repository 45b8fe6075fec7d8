"""Proves that an evaluation goes on from its output file, keeps what is in it, and touches no file that is somebody else's."""

import json
import os
from pathlib import Path

import pytest
from helpers import encode_image, random_picture, without_speed, write_shard

from hf_maskclip import export_to_clip
from hf_maskclip.cli import main as cli
from hf_maskclip.evaluation import Encoder, command

CLASSES = ["red fish", "blue bird", "green frog"]


@pytest.fixture
def model(make_model, processor, tmp_path) -> Path:
    export_to_clip(make_model("random"), tmp_path / "model", processor)
    return tmp_path / "model"


@pytest.fixture
def root(tmp_path) -> Path:
    """Three of the papers' data sets, six pictures each."""
    for number, name in enumerate(("food101", "cars", "stl10")):
        folder = tmp_path / "root" / f"wds_{name}"
        (folder / "test").mkdir(parents=True)
        (folder / "test" / "nshards.txt").write_text("1")
        pictures = [encode_image(random_picture(10 * number + n)) for n in range(6)]
        samples = {f"s{n}": {"png": picture, "cls": str(n % 3).encode()} for n, picture in enumerate(pictures)}
        write_shard(folder / "test" / "0.tar", samples)
        (folder / "classnames.txt").write_text("\n".join(CLASSES))
    return tmp_path / "root"


@pytest.fixture
def arguments(model, root, tmp_path) -> list[str]:
    options = ["--suite", "paper", "--data_root", str(root), "--output", str(tmp_path / "out" / "eval.json")]
    return ["evaluate", "--model", str(model), *options]


@pytest.fixture
def encoded(monkeypatch) -> list:
    """Grows by one at each set of pictures that is encoded."""
    calls, encode = [], Encoder._compute_image_features

    def counted(self, samples):
        calls.append(samples)
        return encode(self, samples)

    monkeypatch.setattr(Encoder, "_compute_image_features", counted)
    return calls


def one_data_set(arguments: list[str], root: Path, name: str, *more: str) -> list[str]:
    data = ["--data", str(root / f"wds_{name}"), "--task", "zero_shot_classification"]
    return [*arguments[:3], *data, *arguments[-2:], *more]


def contents(arguments: list[str]) -> dict:
    return json.loads(Path(arguments[arguments.index("--output") + 1]).read_text(encoding="utf-8"))


def test_a_suite_that_was_interrupted_goes_on_and_loses_nothing(arguments, encoded, monkeypatch, capsys):
    whole = [*arguments[:-1], arguments[-1] + ".whole"]
    assert cli(whole) == 0
    assert len(encoded) == 3

    encode = Encoder._compute_image_features
    with monkeypatch.context() as patch:

        def interrupted(self, samples):
            if len(encoded) == 5:
                raise KeyboardInterrupt
            return encode(self, samples)

        patch.setattr(Encoder, "_compute_image_features", interrupted)
        with pytest.raises(SystemExit) as stopped:
            cli(arguments)
    assert stopped.value.code == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert list(contents(arguments)["results"]) == ["zero_shot_food101", "zero_shot_cars"]

    assert cli(arguments) == 0
    assert len(encoded) == 6  # only the third
    assert without_speed(contents(arguments)["results"]) == without_speed(contents(whole)["results"])
    assert capsys.readouterr().out.count("as it stands in the output file") == 2


def test_another_data_set_is_added(arguments, root, encoded):
    for name in ("food101", "cars", "food101"):
        assert cli(one_data_set(arguments, root, name)) == 0
    assert list(contents(arguments)["results"]) == ["zero_shot_food101", "zero_shot_cars"]
    assert len(encoded) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--precision", "bfloat16"], "other weights"),  # the hash is of the weights as they are used
        (["--image_backend", "torchvision"], "image_backend 'pil', and 'torchvision' is asked"),
        (["--templates", "TEMPLATES"], "with templates ['a photo of a {c}'], and ['the {c}'] is asked"),
        (["--class_names", "NAMES"], "class_names_hash"),
        (["--patch_mask", "random"], "with patch_mask None"),
        ("pictures", "data_fingerprint"),
        ("weights", "other weights"),
    ],
)
def test_results_of_other_options_data_or_weights_are_neither_taken_nor_replaced(
    changed, message, arguments, root, make_model, processor, tmp_path, capsys, encoded
):
    command = one_data_set(arguments, root, "cars")
    assert cli(command) == 0
    before = Path(arguments[-1]).read_bytes()
    (tmp_path / "TEMPLATES").write_text("the {c}")
    (tmp_path / "NAMES").write_text("fish\nbird\nfrog")
    if changed == "pictures":
        samples = {f"s{n}": {"png": encode_image(random_picture(90 + n)), "cls": b"1"} for n in range(6)}
        write_shard(root / "wds_cars" / "test" / "0.tar", samples)
    elif changed == "weights":
        export_to_clip(make_model("random", seed=7), tmp_path / "other", processor)
        command[2] = str(tmp_path / "other")
    else:
        command += [str(tmp_path / word) if word.isupper() else word for word in changed]
    capsys.readouterr()
    assert cli(command) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert "give another file" in error
    assert Path(arguments[-1]).read_bytes() == before
    assert len(encoded) == 1


OF_A_RUN = {"steps": 4, "samples_seen": 16, "results": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(OF_A_RUN), "holds the results of a training run itself"),
        (json.dumps({"samples_seen": 16, "results": {}}), "holds the results of a training run itself"),
        ("", "holds no results of an evaluation"),
        ("my notes", "holds no results of an evaluation"),
        ("[1, 2]", "holds no results of an evaluation"),
        ('{"a": 1}', "holds no results of an evaluation"),
        ('{"results": [1]}', "holds no results of an evaluation"),
        ('{"results": {"a": 1}}', "holds no results of an evaluation"),
        ('{"results": {"a": {"b": 1}}}', "holds no results of an evaluation"),
        (b"\xff\xfe\x00", "holds no results of an evaluation"),
        ("folder", "is a folder; give a file in it"),
        ("below a file", "is no folder"),
        ("fifo", "is no ordinary file"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_model_is_loaded(
    content, message, arguments, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "mine.json"
    if content == "folder":
        output.mkdir()
    elif content == "fifo":
        os.mkfifo(output)
    elif content == "below a file":
        output.write_text("{}")
        arguments[-1] = str(output / "eval.json")
    else:
        output.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = output.read_bytes() if output.is_file() else None
    if content != "below a file":
        arguments[-1] = str(output)
    monkeypatch.setattr(command, "load_encoder", lambda *_: pytest.fail("the model was loaded"))
    assert cli(arguments) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error
    assert (output.read_bytes() if output.is_file() else None) == before


def test_a_place_that_cannot_be_written_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert cli(arguments) == 2
    assert "cannot be written" in capsys.readouterr().err
