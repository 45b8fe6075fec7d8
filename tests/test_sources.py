"""Proves that every kind of source gives its pairs, that bad samples are skipped and counted by cause, and that a source that
is not there, or has other fields, is one clear error."""

import io
import json
from collections import Counter

import datasets
import numpy as np
import pytest
from helpers import pair, shared_data, write_shard
from PIL import Image

from hf_maskclip.data.decoding import PairDecoder, SkippedSample
from hf_maskclip.data.source import Source
from hf_maskclip.data.sources import open_files, open_source
from hf_maskclip.data.specs import expand_braces
from hf_maskclip.errors import ConfigError
from training.data.forms import CropTransform

RNG = np.random.default_rng(0)


def pairs_of(spec: str, decoder: PairDecoder | None = None) -> list[tuple[tuple[int, int], str]]:
    decoder = decoder or PairDecoder()
    decoded = [decoder(row, np.random.default_rng(0)) for row in open_files(spec)]
    return [(picture.size, caption) for picture, caption in decoded]


def expected_pairs(count: int) -> list[tuple[tuple[int, int], str]]:
    return [((40, 36), pair(number)["txt"].decode()) for number in range(count)]


def write_pictures(folder, sidecars: bool) -> None:
    folder.mkdir()
    rows = []
    for number in range(5):
        files = pair(number)
        (folder / f"{number}.png").write_bytes(files["png"])
        if sidecars:
            (folder / f"{number}.txt").write_bytes(files["txt"])
        rows.append({"file_name": f"{number}.png", "text": files["txt"].decode()})
    if not sidecars:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_all_kinds_of_sources_give_their_pairs(tmp_path):
    samples = {f"{number:03d}": pair(number) for number in range(5)}
    write_shard(tmp_path / "a-0.tar", samples)
    assert pairs_of(str(tmp_path / "a-0.tar")) == expected_pairs(5)

    images = [Image.open(io.BytesIO(s["png"])) for s in samples.values()]
    table = {"image": images, "caption": [s["txt"].decode() for s in samples.values()]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "pairs.parquet")
    assert pairs_of(str(tmp_path / "pairs.parquet")) == expected_pairs(5)

    for sidecars in (True, False):
        folder = tmp_path / f"pictures-{sidecars}"
        write_pictures(folder, sidecars)
        assert sorted(pairs_of(str(folder))) == sorted(expected_pairs(5))


@pytest.fixture
def hub_data_set(tmp_path, monkeypatch):
    """A folder that stands for the Hub data set org/pairs."""
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    places = {"org/pairs": str(folder.parent)}
    for name in ("load_dataset_builder", "load_dataset"):
        load = getattr(datasets, name)
        monkeypatch.setattr(datasets, name, lambda spec, load=load, **options: load(places.get(spec, spec), **options))
    return folder


def test_the_shards_of_a_hub_data_set_are_read_like_any_others(hub_data_set):
    for number in range(3):
        write_shard(hub_data_set / f"train-{number}.tar", {f"{number}-{n}": pair(n) for n in range(2)})
    stream = open_files("org/pairs")
    assert stream.num_shards == 3
    assert [row["__key__"] for row in stream] == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
    assert pairs_of("org/pairs")[:2] == expected_pairs(2)


def test_a_hub_data_set_of_another_kind_is_streamed_with_undecoded_images(hub_data_set):
    write_pictures(hub_data_set / "train", sidecars=False)
    assert pairs_of("org/pairs") == expected_pairs(5)
    assert isinstance(next(iter(open_files("org/pairs")))["image"]["path"], str)


def test_a_hub_data_set_without_the_split_is_one_line(hub_data_set):
    write_shard(hub_data_set / "train-0.tar", {"0": pair(0)})
    with pytest.raises(ConfigError, match="Hub data set='org/pairs': cannot be used") as error:
        open_files("org/pairs", split="test")
    assert "\n" not in str(error.value)


def test_braces_expand_as_in_a_shell():
    assert expand_braces("x") == ["x"]
    assert expand_braces("{a,b}/t-{08..11}.tar") == [f"{d}/t-{n}.tar" for d in "ab" for n in ("08", "09", "10", "11")]
    assert sorted(expand_braces("{a/{1..2},b}")) == ["a/1", "a/2", "b"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tmp}/absent.tar", "there is no '.*absent.tar'"),
        ("{tmp}/absent-*.tar", "no file matches"),
        ("{tmp}/empty", "holds no file that ends in .tar"),
        ("{tmp}/notes.md", "must be a folder or end in .tar"),
        ("{tmp}/{{one.tar,pictures}}", "mixes image folders and tar files"),
    ],
)
def test_a_source_that_is_not_there_is_one_clear_error(spec, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("")
    write_shard(tmp_path / "one.tar", {"0": pair(0)})
    write_pictures(tmp_path / "pictures", True)
    with pytest.raises(ConfigError, match=message) as error:
        open_files(spec.format(tmp=tmp_path))
    assert "\n" not in str(error.value)


def test_wrong_keys_are_found_before_training_and_the_fields_are_named(tmp_path):
    write_shard(tmp_path / "odd.tar", {str(n): {"input.png": pair(n)["png"], "prompt": b"a ball"} for n in range(3)})
    stream = open_files(str(tmp_path / "odd.tar"))
    with pytest.raises(ConfigError, match=r"in the first 3 samples \(caption_missing 3\).*fields input.png, prompt") as error:
        Source("odd.tar", stream, PairDecoder()).check()
    assert "--image_key and --caption_key" in str(error.value)
    Source("odd.tar", stream, PairDecoder("input.png", "prompt")).check()


def test_the_tokenizer_learns_from_captions_alone(shards):
    captions = list(open_source(str(shards)).captions(limit=10))
    assert len(captions) == 10
    assert captions[0] == "a red ball on grass number 0"


def test_a_cut_shard_costs_only_its_rest(tmp_path, tokenizer):
    write_shard(tmp_path / "a.tar", {f"a{n}": pair(n) for n in range(6)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    write_shard(tmp_path / "b.tar", {f"b{n}": pair(n) for n in range(6)})
    rows = list(open_files(str(tmp_path)))
    assert Counter(row.get("__error__") for row in rows)["shard_unreadable"] == 1
    keys = [row["__key__"] for row in rows if "__key__" in row]
    assert keys[:2] == ["a0", "a1"]
    assert len([k for k in keys if k[0] == "a"]) < 6
    assert [k for k in keys if k[0] == "b"] == [f"b{n}" for n in range(6)]


def test_the_broken_sample_data_is_read_through_and_counted_as_its_manifest_says():
    folder = shared_data("broken")
    manifest = json.loads((folder / "MANIFEST.json").read_text())["files"]
    bad = {s["key"] for content in manifest.values() for s in content["samples"] if s["status"] == "bad"}
    decoder, skipped, used = PairDecoder(), {}, []
    for row in open_files(str(folder)):
        try:
            picture, caption = decoder(row, RNG)
            CropTransform(32, 0.9, 0.5)(picture)
            used.append(row["__key__"])
        except SkippedSample as cause:
            skipped[row.get("__key__", "truncated.tar")] = str(cause)
    everything = [s["key"] for content in manifest.values() for s in content["samples"]]
    assert sorted(used) == sorted(key for key in everything if key not in bad)
    assert skipped.pop("truncated.tar") == "shard_unreadable"
    assert skipped == {
        "b0_truncated_jpeg": "image_undecodable",
        "b0_zero_byte_png": "image_undecodable",
        "b0_text_named_jpg": "image_undecodable",
        "b0_corrupt_png": "image_undecodable",
        "b0_decompression_bomb_png": "image_too_large",
        "b0_missing_image": "image_missing",
        "b1_missing_caption": "caption_missing",
        "b1_empty_caption": "caption_empty",
        "b1_blank_caption": "caption_empty",
        "b1_invalid_utf8_caption": "caption_not_utf8",
    }
