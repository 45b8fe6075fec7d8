"""Proves that a label that is none is one error that names its sample, before any picture is encoded."""

import io

import datasets
import numpy as np
import pytest
import torch
from helpers import encode_image, random_picture, write_shard

from hf_maskclip.data.clip_benchmark import ClipBenchmarkFolder
from hf_maskclip.errors import ConfigError
from hf_maskclip.evaluation import ImageSet, evaluate_linear_probe, evaluate_multi_label, evaluate_zero_shot
from hf_maskclip.evaluation.datasets.find import Request, find_evaluations
from hf_maskclip.evaluation.labels import class_label, multi_hot_label

NAMES = ["red fish", "blue bird", "green frog"]
NAN = float("nan")


class NothingIsEncoded:
    def encode_images(self, images):
        pytest.fail("pictures were encoded")

    encode_texts = encode_images


@pytest.mark.parametrize("label", [-1, 0.5, 255, 3, NAN, None, "fish", [0, 1], torch.tensor([1, 2]), float("inf"), True])
def test_class_indices_that_are_none(label):
    images = ImageSet([(None, 0), (None, label)])
    for evaluate in (
        lambda: evaluate_zero_shot(NothingIsEncoded(), images, NAMES, ["a {c}"]),
        lambda: evaluate_linear_probe(NothingIsEncoded(), ImageSet([(None, 0)]), images, 3),
        lambda: evaluate_linear_probe(NothingIsEncoded(), images, ImageSet([(None, 0)]), 3),
    ):
        with pytest.raises(ConfigError, match="sample number 1"):
            evaluate()


@pytest.mark.parametrize("label", [2, 2.0, np.int64(2), torch.tensor(2), "2"])
def test_class_indices_of_any_type(label):
    assert class_label(label, 3, "sample") == 2


@pytest.mark.parametrize(
    "label", [[0, 0.5, 1], [0, 255, 1], [0, -1, 1], [0, NAN, 1], [[0, 1, 0]], [0, 1], 1, None, ["a", "b", "c"], [1, [0], 0]]
)
def test_labels_of_several_classes_that_are_none(label):
    images = ImageSet([(None, [0, 1, 0]), (None, label)])
    with pytest.raises(ConfigError, match="sample number 1"):
        evaluate_multi_label(NothingIsEncoded(), images, NAMES, ["a {c}"])


@pytest.mark.parametrize("label", [[0, 1, 0], [0.0, 1.0, 0.0], np.array([False, True, False]), torch.tensor([0, 1, 0])])
def test_labels_of_several_classes_of_any_type(label):
    assert multi_hot_label(label, 3, "sample") == [0, 1, 0]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "things" / "test").mkdir(parents=True)
    (tmp_path / "things" / "test" / "nshards.txt").write_text("1")
    (tmp_path / "things" / "classnames.txt").write_text("\n".join(NAMES))
    return tmp_path / "things"


def write(folder, labels: list[dict[str, bytes]]) -> None:
    samples = {f"s{n}": {"png": encode_image(random_picture(n))} | label for n, label in enumerate(labels)}
    write_shard(folder / "test" / "0.tar", samples)


@pytest.mark.parametrize("label", [b"-1", b"0.5", b"255", b"3", b"nan", b"", b"fish", b"0 1"])
def test_class_indices_of_shards(label, folder):
    write(folder, [{"cls": b"0"}, {"cls": label}])
    with pytest.raises(ConfigError, match="things: sample 's1'"):
        find_evaluations(str(folder), Request("zero_shot_classification"))


def npy(values) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 1, 0], [0, 0.5, 1]], "sample 's1': has 0.5 in its label"),
        ([[0, 1, 0], [0, 255, 1]], "sample 's1': has 255 in its label"),
        ([[0, 1, 0], [0, NAN, 1]], "sample 's1': has nan in its label"),
        ([[0, 1, 0], [[0, 1, 0]]], r"sample 's1': has a label of shape \(1, 3\)"),
        ([[0, 1, 0], 1], r"sample 's1': has a label of shape \(\)"),
        ([[0, 0, 0], [0, 0, 0]], "no label of its 2 samples has a 1"),
    ],
)
def test_labels_of_several_classes_of_shards(labels, message, folder):
    (folder / "dataset_type.txt").write_text("multilabel")
    write(folder, [{"npy": npy(label)} for label in labels])
    with pytest.raises(ConfigError, match=message):
        find_evaluations(str(folder), Request("zero_shot_classification"))


def test_a_hub_data_set_without_labels_ends_at_its_first_sample(monkeypatch):
    rows = {"img": [{"bytes": encode_image(random_picture(n)), "path": None} for n in range(4)], "label": [-1] * 4}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    stored = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(ClipBenchmarkFolder, "find", lambda data: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: stored.to_iterable_dataset())
    (evaluation,) = find_evaluations("org/things", Request("zero_shot_classification"))
    with pytest.raises(ConfigError, match="org/things: sample .* has class index -1, but there are 3 class names"):
        next(iter(evaluation.run.keywords["images"].samples))
