"""Proves that folders of evaluation data that nearly have a known layout are read, or refused with what to do."""

import pytest
from helpers import encode_image, random_picture, write_shard

from hf_maskclip.errors import ConfigError
from hf_maskclip.evaluation.datasets.find import Request, find_evaluations


def shards_with(folder, **files: str):
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    samples = {f"s{n}": {"png": encode_image(random_picture(n)), "txt": b"a ball", "cls": b"0"} for n in range(3)}
    write_shard(folder / "test" / "0.tar", samples)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no dataset_type.txt; write retrieval into it"),
        ({"dataset_type": "retreival"}, "its dataset_type.txt says 'retreival', which is none of retrieval, multilabel"),
        ({"dataset_type": ""}, "has '' in its dataset_type.txt; write retrieval into it"),
        ({"dataset_type": "captions", "classnames": "ball"}, "its dataset_type.txt says 'captions', which is none of"),
        ({"dataset_type": "multilabel"}, "has 'multilabel' in its dataset_type.txt; write retrieval into it"),
        ({"classnames": "ball"}, "is a data set of classes, and has no captions for retrieval"),
    ],
)
def test_a_set_of_captions_that_does_not_say_so(files, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        find_evaluations(shards_with(tmp_path / "sights", **files), Request("retrieval"))


def test_a_set_of_captions_that_says_so(tmp_path):
    (evaluation,) = find_evaluations(shards_with(tmp_path / "sights", dataset_type="Retrieval\n"), Request("retrieval"))
    assert evaluation.name == "retrieval_sights"


def save_pictures(*folders) -> None:
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        random_picture(number).save(folder / "0.png")


def test_a_folder_of_classes_without_splits_is_one_split(tmp_path):
    photos = tmp_path / "photos"
    save_pictures(photos / "cat", photos / "dog")
    (evaluation,) = find_evaluations(str(photos), Request("zero_shot_classification"))
    assert [target for _, target in evaluation.images[0].samples] == [0, 1]
    assert evaluation.about["split"] == "all"
    with pytest.raises(
        ConfigError, match="has no splits, and a linear probe needs two; move its classes into train/ and test/"
    ):
        find_evaluations(str(photos), Request("linear_probe"))


@pytest.mark.parametrize("task", ["zero_shot_classification", "linear_probe"])
def test_a_folder_that_lacks_the_split_is_refused_with_the_layout(task, tmp_path):
    photos = tmp_path / "photos"
    save_pictures(photos / "train" / "cat", photos / "val" / "cat")
    with pytest.raises(ConfigError, match="photos has the folders train, val; pictures are looked for in test/CLASS/"):
        find_evaluations(str(photos), Request(task))
