"""Proves that classes of one name are scored as clip_benchmark does, that names that are no words are said before anything
is encoded, and that the settings of a probe are no metrics."""

import logging

import pytest
import torch
from torch.nn import functional as F

from hf_maskclip.evaluation import ImageSet, evaluate_linear_probe, evaluate_zero_shot
from hf_maskclip.evaluation.class_names import warn_of_names_without_words
from hf_maskclip.evaluation.command import numbers_of
from hf_maskclip.evaluation.encoder import ImageFeatures
from hf_maskclip.evaluation.tasks import ClassificationData


class ByName:
    """Stands in for an Encoder: a picture of class m has the features of m's name."""

    def __init__(self, names, texts=None):
        self.names, self.texts = names, texts or {name: name for name in names}

    def feature(self, name: str) -> torch.Tensor:
        distinct = list(dict.fromkeys(self.texts.values()))
        return F.one_hot(torch.tensor(distinct.index(self.texts[name])), len(distinct)).float()

    def encode_images(self, images):
        targets = [target for _, target in images.samples]
        return ImageFeatures(torch.stack([self.feature(self.names[m]) for m in targets]), targets)

    def encode_texts(self, prompts):
        return torch.stack([self.feature(prompt.removeprefix("a ")) for prompt in prompts])


MISSILES = ["tench", "missile", "wolf", "missile", "crane", "sunglasses", "sunglasses", "crane", "crane"]
ONE_OF_EACH = ImageSet([(None, m) for m in range(9)])


@pytest.mark.parametrize(
    ("names", "images", "top1", "equal"),
    [
        # First index wins: of nine classes the right ones are tench, wolf and the first of each name.
        (MISSILES, ONE_OF_EACH, 5 / 9, {"missile": [1, 3], "crane": [4, 7, 8], "sunglasses": [5, 6]}),
        (MISSILES, ImageSet([(None, 1)]), 1.0, {"missile": [1, 3], "crane": [4, 7, 8], "sunglasses": [5, 6]}),
        (MISSILES, ImageSet([(None, 3)]), 0.0, {"missile": [1, 3], "crane": [4, 7, 8], "sunglasses": [5, 6]}),
        (["a", "b", "c"], ImageSet([(None, m) for m in range(3)]), 1.0, None),
    ],
)
def test_of_classes_of_one_name_the_first_wins_as_with_argmax(names, images, top1, equal, caplog):
    encoder = ByName(names)
    result = evaluate_zero_shot(encoder, images, names, ["a {c}"])
    assert result["top1"] == top1
    assert result.get("equal_names") == equal
    assert result["num_classes"] == len(names)
    scores = encoder.encode_images(images).features @ encoder.encode_texts([f"a {name}" for name in names]).t()
    labels = torch.tensor([target for _, target in images.samples])
    assert result["top1"] == (scores.argmax(dim=1) == labels).double().mean().item()  # clip_benchmark's rule
    said = [record.getMessage() for record in caplog.records if "classes of one name" in record.getMessage()]
    assert len(said) == (equal is not None)
    assert all("'missile' (1, 3), 'crane' (4, 7, 8), 'sunglasses' (5, 6)" in line for line in said)


def test_top_5_counts_the_earlier_of_one_name_alone():
    names = ["x"] * 5 + ["x", "y"]
    result = evaluate_zero_shot(ByName(names), ImageSet([(None, 4), (None, 5)]), names, ["a {c}"])
    assert result["top5"] == 1 / 2  # the fifth x is among five, the sixth is not


def test_a_tie_of_different_names_is_wrong():
    names = ["cat", "dog", "fish"]
    same_text = ByName(names, {"cat": "pet", "dog": "pet", "fish": "fish"})
    result = evaluate_zero_shot(same_text, ImageSet([(None, 0), (None, 1), (None, 2)]), names, ["a {c}"])
    assert result["top1"] == 1 / 3
    assert "equal_names" not in result


def test_a_twin_without_a_picture_is_no_rival_where_only_occurring_classes_are_candidates():
    result = evaluate_zero_shot(ByName(MISSILES), ImageSet([(None, 3), (None, 0)]), MISSILES, ["a {c}"], only_occurring=True)
    assert (result["top1"], result["num_classes"]) == (1.0, 2)


NO_WORDS = ["n01440764", "n02085620-Chihuahua", "7", "0012", "3.5", "class 12", "LABEL_0", "label 4", "c0", "/m/0abc1"]
NO_WORDS += ["3fa9c2d17b", "#12"]
WORDS = [
    "tench",
    "747-400",
    "DC-10",
    "A300B4",
    "汽车",
    "😀",
    "red_fish",
    "a",
    "7 up can",
    "001.Black footed Albatross",
    "Golf 7",
]
WORDS += ["facade", "bedded", "C-130", "1957 Chevy", "deadbeef"]


@pytest.mark.parametrize("name", [*NO_WORDS, *WORDS])
def test_names_that_are_no_words_are_said_before_anything_is_encoded(name, caplog):
    data = ClassificationData("things", "things/val", lambda split: ImageSet([]), ["wolf", name], ["a {c}"], "default")
    data.zero_shot()
    said = [record.getMessage() for record in caplog.records]
    expected = f"things/val: 1 of 2 class names are no words, such as {name!r}"
    assert [line.startswith(expected) for line in said] == ([True] if name in NO_WORDS else [])


def test_a_probe_does_not_read_names(caplog):
    data = ClassificationData("things", "things/val", lambda split: ImageSet([]), ["n01440764", "7"], ["a {c}"], "default")
    data.linear_probe()
    assert not caplog.records
    warn_of_names_without_words(data.class_names, data.data)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_what_a_probe_chose_is_a_setting_and_no_metric():
    pytest.importorskip("sklearn", reason="scikit-learn is of the probe extra")
    names = [f"class {m}" for m in range(6)]
    images = ImageSet([(None, m) for m in range(6) for _ in range(10)])
    record = evaluate_linear_probe(ByName(names), images, images, 6, solver="logistic_regression")
    assert record["settings"]["C"] in [10.0**exponent for exponent in range(-2, 7)]
    assert {key for key, value in record.items() if isinstance(value, float)} == {"top1", "top5", "mean_per_class"}
    assert numbers_of(record) == "top1 100.0% ± 0.0, top5 100.0% ± 0.0, mean_per_class 100.0% ± 0.0 (n = 60)"
