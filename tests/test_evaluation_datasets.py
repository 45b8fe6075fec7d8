"""Proves that held-out data is read as it is laid out, that each evaluation is named after its folder, and that what would
give a wrong number, or end a training at its first evaluation, is a clear error before."""

import io
import json

import datasets
import fsspec
import numpy as np
import pytest
from helpers import encode_image, pair, random_picture, write_shard
from PIL import Image

from hf_maskclip.data.clip_benchmark import ClipBenchmarkFolder
from hf_maskclip.data.scene_sets import COMPOSITIONALITY_KINDS
from hf_maskclip.errors import ConfigError
from hf_maskclip.evaluation import Encoder
from hf_maskclip.evaluation.datasets.find import Request, find_evaluations
from hf_maskclip.evaluation.datasets.pairs import PairKeys
from hf_maskclip.evaluation.datasets.papers import ABOUT, LINEAR_PROBE, RETRIEVAL, ROBUSTNESS, ZERO_SHOT, PaperSuite
from hf_maskclip.evaluation.datasets.scenes import scene_evaluations
from hf_maskclip.evaluation.datasets.sugar_crepe import file_name
from hf_maskclip.evaluation.download import Missing, merged
from hf_maskclip.evaluation.runner import run_evaluations
from hf_maskclip.evaluation.suites import open_tasks

ANIMALS = ["red fish", "blue bird", "green frog"]


@pytest.fixture
def animals(tmp_path):
    """A clip-benchmark classification folder: 6 test pictures and 6 training pictures of 3 classes, its own templates."""
    folder = tmp_path / "animals"
    (folder / "test").mkdir(parents=True)
    (folder / "train").mkdir()
    (folder / "classnames.txt").write_text("\n".join(ANIMALS) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a picture of a {c}\nthe {c}\n")
    write_labels(folder, [0, 1, 2, 0, 1, 2], split="train")
    write_labels(folder, [0, 1, 2, 0, 1, 2])
    return folder


def write_labels(folder, labels, split="test") -> None:
    (folder / split / "nshards.txt").write_text("1")
    samples = {f"s{n}": {"webp": encode_image(random_picture(n), "WEBP"), "cls": str(c).encode()} for n, c in enumerate(labels)}
    write_shard(folder / split / "0.tar", samples)


@pytest.fixture
def sights(tmp_path):
    """A clip-benchmark retrieval folder: 4 pictures, two captions each, one a line."""
    folder = tmp_path / "sights"
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    (folder / "test" / "nshards.txt").write_text("1")
    files = {f"s{n}": {"png": encode_image(random_picture(n)), "txt": f"sight {n}\n\nview {n}\n".encode()} for n in range(4)}
    write_shard(folder / "test" / "0.tar", files)
    return folder


@pytest.fixture
def results(make_model, processor):
    """From evaluations to their records, by a tiny model."""

    def results(evaluations):
        return dict(run_evaluations(Encoder(make_model(), processor, batch_size=4), evaluations))

    return results


def of_data(data, task="zero_shot_classification", split="test", **kwargs):
    return find_evaluations(str(data), Request(task, split, **kwargs))


# ---- What is read ----------------------------------------------------------------------------------------------------------


def test_each_folder_is_an_evaluation_of_its_kind(animals, sights, shards, results):
    spec = f"{{{animals},{sights},{shards}/train-000.tar,{shards}/train-001.tar}}"
    found = results(find_evaluations(spec, Request(keys=PairKeys(caption_key="json.captions,txt"))))
    assert list(found) == ["zero_shot_animals", "retrieval_sights", f"retrieval_{shards.name}"]
    classification, layout, files = found.values()
    assert (classification["n"], classification["num_classes"], classification["split"]) == (6, 3, "test")
    assert classification["templates"] == ["a picture of a {c}", "the {c}"]
    assert classification["data"] == str(animals)
    assert (layout["n"], layout["num_texts"]) == (4, 8)
    assert (files["n"], files["num_texts"]) == (32, 64)


def test_a_run_on_scenes_has_evaluations_of_its_own(results):
    evaluations = scene_evaluations(image_size=32)
    assert [e.name for e in evaluations] == ["zero_shot_shape", "zero_shot_colour", "zero_shot_pair", "retrieval_scenes"]
    assert results(evaluations[1:2])["zero_shot_colour"]["num_classes"] == 11


def test_a_task_names_what_is_done_with_a_folder(animals, sights, results):
    (probe,) = results(of_data(animals, "linear_probe")).values()
    assert (probe["num_train"], probe["n"], probe["train_split"], probe["split"]) == (6, 6, "train", "test")
    (train,) = results(of_data(animals, split="train")).values()
    assert train["split"] == "train"
    assert train["templates_source"] == "data set"
    (retrieval,) = results(of_data(sights, "retrieval")).values()
    assert retrieval["num_texts"] == 8


def test_templates_are_the_users_else_the_data_sets_else_one(animals, tmp_path, results):
    own = tmp_path / "mine.txt"
    own.write_text("my {c}\n")
    (record,) = results(of_data(animals, templates_file=str(own))).values()
    assert (record["templates"], record["templates_source"]) == (["my {c}"], str(own))
    (animals / "zeroshot_classification_templates.txt").unlink()
    (record,) = results(of_data(animals)).values()
    assert (record["templates"], record["templates_source"]) == (["a photo of a {c}"], "default")
    own.write_text("\n")
    with pytest.raises(ConfigError, match=r"prompt templates \(.*mine.txt\): there is none"):
        of_data(animals, templates_file=str(own))
    own.write_text("no placeholder\n")
    with pytest.raises(ConfigError, match=r"prompt template 'no placeholder' \(.*mine.txt\): has no {c}"):
        of_data(animals, templates_file=str(own))


def test_class_names_of_the_user_replace_those_of_the_data_set(animals, tmp_path, results):
    names = tmp_path / "names.txt"
    names.write_text("fish\nbird\nfrog\ncat\n")
    (record,) = results(of_data(animals, class_names_file=str(names))).values()
    assert record["num_classes"] == 4


def test_pictures_of_several_classes_have_a_mean_average_precision(animals, results):
    (animals / "dataset_type.txt").write_text("multilabel")
    labels = [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    samples = {f"s{n}": {"jpg": encode_image(random_picture(n), "JPEG"), "npy": npy(row)} for n, row in enumerate(labels)}
    write_shard(animals / "test" / "0.tar", samples)
    (record,) = results(of_data(animals)).values()
    assert 0 < record["mean_average_precision"] <= 1
    assert record["n"] == 3
    with pytest.raises(ConfigError, match="a linear probe needs one class a picture"):
        of_data(animals, "linear_probe")
    samples["s1"]["npy"] = npy([0, 1])
    write_shard(animals / "test" / "0.tar", samples)
    with pytest.raises(ConfigError, match="sample 's1' has 2 classes, but there are 3 class names"):
        of_data(animals)


def npy(row: list[int]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(row))
    return buffer.getvalue()


def test_a_folder_that_is_not_on_this_machine_is_read_by_fsspec(animals, results):
    """As `clip-benchmark/wds_...` of the Hub is, there through hf://, here through a file system in memory."""
    remote = fsspec.filesystem("memory")
    remote.put(str(animals), "/wds_animals", recursive=True)
    (there,) = results(of_data("memory://wds_animals")).values()
    (here,) = results(of_data(animals)).values()
    differing = {key for key in here if here[key] != there[key]}
    assert differing == {"data", "data_fingerprint", "speed"}
    assert there["column"] == "animals"
    remote.rm("/wds_animals/test/0.tar")
    with pytest.raises(ConfigError, match="test/0.tar is missing; its nshards.txt says 1 shards"):
        of_data("memory://wds_animals")


def test_an_image_folder_has_the_classes_of_its_subfolders(tmp_path, results):
    for split in ("train", "test"):
        for n, name in enumerate(("red_fish", "blue_bird", "green_frog")):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for k in range(2):
                random_picture(n + 3 * k).save(folder / f"{k}.png")
    (record,) = results(of_data(tmp_path / "pets")).values()
    assert (record["n"], record["num_classes"], record["templates_source"]) == (6, 3, "default")
    (probe,) = results(of_data(tmp_path / "pets", "linear_probe")).values()
    assert probe["num_train"] == 6
    with pytest.raises(ConfigError, match="split='dev': .*pets has the folders test, train"):
        of_data(tmp_path / "pets", split="dev")


def test_a_class_has_one_index_in_all_splits_of_an_image_folder(tmp_path):
    for split, names in (("train", ("bird", "fish", "frog")), ("test", ("fish", "frog"))):
        for n, name in enumerate(names):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            random_picture(n).save(tmp_path / "pets" / split / name / "0.png")
    (probe,) = of_data(tmp_path / "pets", "linear_probe")
    labels = {key: sorted(label for _, label in probe.run.keywords[key].samples) for key in ("train", "test")}
    assert labels == {"train": [0, 1, 2], "test": [1, 2]}
    assert probe.run.keywords["num_classes"] == 3


def test_a_hub_data_set_with_labels_is_read_by_its_features(tmp_path, results, monkeypatch):
    rows = {"img": [{"bytes": encode_image(random_picture(n)), "path": None} for n in range(4)], "fine_label": [0, 1, 1, 0]}
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["red_fish", "frog"])})
    stored = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(ClipBenchmarkFolder, "find", lambda data: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: stored.to_iterable_dataset())
    (record,) = results(of_data("org/things")).values()
    assert (record["n"], record["num_classes"]) == (4, 2)
    assert record["column"] == "things"


def test_pairs_of_any_form_are_a_retrieval_set(shards, results):
    ((name, record),) = results(of_data(f"{shards}/train-00[01].tar", "retrieval")).items()
    assert record["n"] == 32
    assert name == f"retrieval_{shards.name}"
    (record,) = results(of_data(f"{shards}/train-{{000..002}}.tar", "retrieval")).values()
    assert record["n"] == 39


# ---- What is refused -------------------------------------------------------------------------------------------------------


def test_wrong_labels_and_empty_sets_are_found_at_once(animals, sights):
    write_labels(animals, [0, 3])
    with pytest.raises(ConfigError, match="animals: sample 's1' has class index 3, but there are 3 class names"):
        find_evaluations(str(animals), Request())
    write_labels(animals, [])
    with pytest.raises(ConfigError, match="animals: the split is empty"):
        find_evaluations(str(animals), Request())
    write_shard(animals / "test" / "0.tar", {"s0": pair(0)})
    with pytest.raises(ConfigError, match="sample 's0': has no class index in its field cls"):
        find_evaluations(str(animals), Request())
    write_shard(sights / "test" / "0.tar", {"s0": {"png": b"", "txt": b"\n"}})
    with pytest.raises(ConfigError, match="sights: the split is empty"):
        find_evaluations(str(sights), Request())


def test_unknown_splits_and_missing_and_short_shards_are_named(animals, sights):
    with pytest.raises(ConfigError, match="split='dev': .*animals has train, test"):
        of_data(animals, split="dev")
    for folder, task in ((animals, "zero_shot_classification"), (sights, "retrieval")):
        (folder / "test" / "nshards.txt").write_text("2")
        with pytest.raises(ConfigError, match="test/1.tar is missing; its nshards.txt says 2 shards"):
            of_data(folder, task)
        (folder / "test" / "nshards.txt").write_text("many")
        with pytest.raises(ConfigError, match="'many' is no number of shards"):
            of_data(folder, task)
        (folder / "test" / "nshards.txt").write_text("1")
        whole = (folder / "test" / "0.tar").read_bytes()
        (folder / "test" / "0.tar").write_bytes(whole[:2048])
        with pytest.raises(ConfigError, match="test/0.tar is cut off"):
            of_data(folder, task)


def test_tasks_that_data_cannot_answer_are_refused(animals, sights, tmp_path):
    with pytest.raises(ConfigError, match="sights': is a retrieval data set, and has no classes for linear_probe"):
        of_data(sights, "linear_probe")
    with pytest.raises(ConfigError, match="animals': is a data set of classes, and has no captions for retrieval"):
        of_data(animals, "retrieval")
    (animals / "classnames.txt").unlink()
    with pytest.raises(ConfigError, match="animals: has no classnames.txt"):
        of_data(animals)
    with pytest.raises(ConfigError, match="has no replace_obj.json"):
        of_data(tmp_path, "compositionality")
    with pytest.raises(ConfigError, match="two evaluations would be named retrieval_a"):
        for parent in ("x", "y"):
            (tmp_path / parent / "a").mkdir(parents=True)
            write_shard(tmp_path / parent / "a" / "0.tar", {"s0": pair(0)})
        find_evaluations(f"{tmp_path}/{{x,y}}/a/0.tar", Request())


def test_a_damaged_picture_is_left_out_with_a_warning_and_counted(sights, results, caplog):
    files = {f"s{n}": {"png": encode_image(random_picture(n)), "txt": f"sight {n}".encode()} for n in range(3)}
    files["s1"]["png"] = files["s1"]["png"][:200]
    write_shard(sights / "test" / "0.tar", files)
    (record,) = results(find_evaluations(str(sights), Request())).values()
    assert (record["n"], record["num_undecodable"]) == (2, 1)
    assert "evaluation leaves out s1 (image_undecodable)" in caplog.text


# ---- SugarCrepe and the papers' suite --------------------------------------------------------------------------------------


@pytest.fixture
def sugar_crepe(tmp_path):
    folder = tmp_path / "papers" / "sugar_crepe"
    (folder / "val2017").mkdir(parents=True)
    for n in range(3):
        Image.effect_noise((30, 40), 50 + n).convert("RGB").save(folder / "val2017" / f"{n}.jpg")
    rows = {str(n): {"filename": f"{n}.jpg", "caption": f"a ball {n}", "negative_caption": f"a fish {n}"} for n in range(3)}
    for kind in COMPOSITIONALITY_KINDS:
        (folder / file_name(kind)).write_text(json.dumps(rows))
    return folder


def test_sugar_crepes_files_are_seven_evaluations(sugar_crepe, results):
    found = results(of_data(sugar_crepe, "compositionality"))
    assert list(found) == [f"compositionality_{kind}" for kind in COMPOSITIONALITY_KINDS]
    assert all(record["n"] == 3 and 0 <= record["accuracy"] <= 1 for record in found.values())
    (sugar_crepe / "val2017" / "1.jpg").unlink()
    with pytest.raises(ConfigError, match="1 of 3 pictures are missing, the first is 1.jpg"):
        of_data(sugar_crepe, "compositionality")
    (sugar_crepe / "replace_obj.json").write_text("[]")
    with pytest.raises(ConfigError, match="replace_obj.json: is none of SugarCrepe's files"):
        of_data(sugar_crepe, "compositionality")


def missing_of(root) -> list[Missing]:
    return merged(part for task in PaperSuite(root).tasks() for part in task.missing)


def test_the_papers_suite_says_what_is_missing_and_runs_the_rest(sugar_crepe, animals, sights, results):
    root = sugar_crepe.parent
    assert len(ZERO_SHOT) == 17
    assert len(RETRIEVAL) == 3
    assert len(LINEAR_PROBE) == 3
    assert len(ROBUSTNESS) == 6
    (sugar_crepe / "add_att.json").rename(sugar_crepe / "kept.json")
    missing = [str(part) for part in missing_of(root)]
    assert len(missing) == 17 + 3 + 6 + 1  # the probes' data sets are among these
    files = " ".join(f'--include "{name}"' for name in (*ABOUT, "test/*"))
    assert f"hf download clip-benchmark/wds_food101 --repo-type dataset {files} --local-dir {root}/wds_food101" in missing[0]
    assert any(f'wds_vtab-cifar10 --repo-type dataset {files} --include "train/*"' in line for line in missing)
    assert "sugar-crepe/main/data/add_att.json" in missing[-1]
    others = [task.name for task in PaperSuite(root).tasks() if not task.missing]
    assert len(others) == 6
    assert all(name.startswith("compositionality") for name in others)

    (sugar_crepe / "kept.json").rename(sugar_crepe / "add_att.json")
    names = ("wds_vtab-cifar10", "food101", "imagenet-a", "wds_imagenet1k")  # with and without prefixes
    for name in names:
        (root / name).symlink_to(animals)
    write_labels(animals, [0, 2, 0, 2])
    (root / "wds_flickr8k").symlink_to(sights)
    assert len(missing_of(root)) == 27 - len(names) - 2
    found = results(open_tasks(PaperSuite(root).tasks()))
    assert list(found)[:6] == [
        "zero_shot_food101",
        "zero_shot_cifar10",
        "retrieval_flickr8k",
        "linear_probe_cifar10",
        "linear_probe_imagenet-1k",
        "robustness_imagenet-1k",
    ]
    assert len(found) == 7 + 7
    # Of ImageNet-A only the classes that have pictures are candidates, of ImageNet itself all.
    assert (found["robustness_a"]["num_classes"], found["robustness_imagenet-1k"]["num_classes"]) == (2, 3)
