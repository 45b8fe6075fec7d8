"""Proves that held-out data is read as it is laid out, that each evaluation is named after its folder, and that what would
end a training at its first evaluation is found before the training starts."""

import pytest
from conftest import encode_image, pair, random_picture, write_shard

from training.data import PairDecoder
from training.errors import ConfigError
from training.evaluate import evaluate_sets, load_evaluation_sets


@pytest.fixture
def animals(tmp_path):
    """A clip-benchmark classification folder: 6 test pictures of 3 classes, its own templates."""
    folder = tmp_path / "animals"
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("red fish\nblue bird\ngreen frog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a picture of a {c}\nthe {c}\n")
    (folder / "test" / "nshards.txt").write_text("1")
    write_labels(folder, [0, 1, 2, 0, 1, 2])
    return folder


def write_labels(folder, labels) -> None:
    samples = {f"s{n}": {"webp": encode_image(random_picture(n), "WEBP"), "cls": str(c).encode()} for n, c in enumerate(labels)}
    write_shard(folder / "test" / "0.tar", samples)


@pytest.fixture
def sights(tmp_path):
    """A clip-benchmark retrieval folder: 4 pictures, two captions each, one a line."""
    folder = tmp_path / "sights"
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    (folder / "test" / "nshards.txt").write_text("1")
    files = {f"s{n}": {"png": encode_image(random_picture(n)), "txt": f"sight {n}\nview {n}\n".encode()} for n in range(4)}
    write_shard(folder / "test" / "0.tar", files)
    return folder


def test_each_folder_is_an_evaluation_of_its_kind(animals, sights, shards, make_model, processor):
    spec = f"{{{animals},{sights},{shards}/train-000.tar,{shards}/train-001.tar}}"
    sets = load_evaluation_sets(spec, PairDecoder(caption_key="json.captions,txt"), image_size=32)
    results = evaluate_sets(make_model(), processor, sets)
    assert list(results) == ["zero_shot_animals", "retrieval_sights", f"retrieval_{shards.name}"]
    classification, layout, files = results.values()
    assert (classification["num_images"], classification["num_classes"]) == (6, 3)
    assert classification["templates"] == ["a picture of a {c}", "the {c}"] and classification["top5"] == 1.0
    assert (layout["num_images"], layout["num_texts"]) == (4, 8) and layout["image_to_text_recall@10"] == 1.0
    assert (files["num_images"], files["num_texts"]) == (32, 64)


def test_scenes_have_their_own_evaluations(make_model, processor):
    sets = load_evaluation_sets("scenes", PairDecoder(), image_size=32)
    names = ["zero_shot_shape", "zero_shot_colour", "zero_shot_pair", "retrieval"]
    assert [evaluation.name for evaluation in sets] == names
    assert sets[1].run(make_model(), processor)["num_classes"] == 11
    assert load_evaluation_sets("", PairDecoder(), image_size=32) == []


def test_wrong_labels_and_empty_sets_are_found_at_once(animals, sights):
    write_labels(animals, [0, 3])
    with pytest.raises(ConfigError, match="animals': class index 3, but there are 3 class names"):
        load_evaluation_sets(str(animals), PairDecoder(), image_size=32)
    write_labels(animals, [])
    with pytest.raises(ConfigError, match="animals': its test split is empty"):
        load_evaluation_sets(str(animals), PairDecoder(), image_size=32)
    write_shard(animals / "test" / "0.tar", {"s0": pair(0)})
    with pytest.raises(ConfigError, match="sample 's0': has no class index in its field cls"):
        load_evaluation_sets(str(animals), PairDecoder(), image_size=32)
    write_shard(sights / "test" / "0.tar", {"s0": {"png": b"", "txt": b"a view"}})
    with pytest.raises(ConfigError, match="no usable image-text pair in the first 1 samples"):
        load_evaluation_sets(str(sights), PairDecoder(), image_size=32)


def test_a_damaged_picture_is_left_out_with_a_warning(sights, make_model, processor, caplog):
    files = {f"s{n}": {"png": encode_image(random_picture(n)), "txt": f"sight {n}".encode()} for n in range(3)}
    files["s1"]["png"] = files["s1"]["png"][:200]
    write_shard(sights / "test" / "0.tar", files)
    sets = load_evaluation_sets(str(sights), PairDecoder(), image_size=32)
    assert evaluate_sets(make_model(), processor, sets)["retrieval_sights"]["num_images"] == 2
    assert "evaluation leaves out s1 (image_undecodable)" in caplog.text
