"""Proves that a mix of sources gives samples by weight, each source with its own keys, epochs and place, goes on exactly, and
says in one line what is wrong with it."""

import json
from collections import Counter
from functools import partial
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from helpers import CONTEXT_LENGTH, as_killed_at, pair, same, write_shard

from hf_maskclip.data.decoding import PairDecoder
from hf_maskclip.data.mix import MixPart, mix_in_words, read_mix, specs_of
from hf_maskclip.data.sources import open_files
from hf_maskclip.errors import ConfigError, TrainingStopped
from training.config import load_config
from training.data.batches import PairBatches
from training.data.forms import CropTransform, PairForm
from training.data.mix import Mix
from training.data.pairs import PairSource
from training.data.position import LoaderState
from training.data.shuffling import shard_stream
from training.data.text_masking import TextMask
from training.data.windows import Place

FORMS = {
    "a.tar": [MixPart("a.tar")],
    "a-{00..12}.tar": [MixPart("a-{00..12}.tar")],
    "a.tar::b.tar": [MixPart("a.tar::b.tar")],
    "org/pairs:2": [MixPart("org/pairs:2")],  # a configuration of a data set
    "a.tar:3,b.tar:1": [MixPart("a.tar", 3), MixPart("b.tar", 1)],
    "{a,b}.tar:3, s3://bucket/c/*.parquet:.5": [MixPart("{a,b}.tar", 3), MixPart("s3://bucket/c/*.parquet", 0.5)],
    "a.tar::b.tar:2,org/pairs:english:1": [MixPart("a.tar::b.tar", 2), MixPart("org/pairs:english", 1)],
    "http://host:8080/a.tar:1.5,scenes:1": [MixPart("http://host:8080/a.tar", 1.5), MixPart("scenes", 1)],
}


@pytest.mark.parametrize("text", FORMS)
def test_a_text_names_one_source_or_several_with_their_weights(text):
    assert read_mix(text) == FORMS[text]
    assert read_mix(load_config(["--train_data", text]).train_data) == FORMS[text]


def test_a_list_has_keys_of_each_source_on_the_command_line_and_in_a_file(tmp_path):
    parts = [MixPart("{a,b}.tar", 3, caption_key="alt"), MixPart("b.tar", 1, image_key="webp"), MixPart("c.tar", 2)]
    words = "[{data: '{a,b}.tar', weight: 3, caption_key: alt}, {data: b.tar, image_key: webp}, {data: c.tar, weight: 2}]"
    assert read_mix(load_config(["--train_data", words]).train_data) == parts
    (tmp_path / "run.yaml").write_text(f"train_data: {words.replace('{data: c.tar, weight: 2}', 'c.tar:2')}")
    assert read_mix(load_config(["--config", str(tmp_path / "run.yaml")]).train_data) == parts
    assert specs_of([part._asdict() for part in parts]) == ["{a,b}.tar", "b.tar", "c.tar"]
    assert mix_in_words("a.tar:3,b.tar:1") == "a.tar (75%), b.tar (25%)"


def test_a_path_that_is_there_is_one_source_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:1,b:2").mkdir()
    assert read_mix("a:1,b:2") == read_mix(["a:1,b:2"]) == [MixPart("a:1,b:2")]


BAD = [
    ("a.tar:3,b.tar", "train_data='a.tar:3,b.tar': 'b.tar' has no weight; each source has one, as in a.tar:3,b.tar:1"),
    ("a.tar:0,b.tar:1", "train_data: weight=0.0: must be a number above 0"),
    ([], "train_data=[]: must name at least one source, such as"),
    ([3], "train_data[0]=3: must be a mapping, as in [{data: "),
    (["a", {"path": "b.tar"}], "train_data[1]: unknown key 'path': must be one of data, weight, image_key, caption_key"),
    ([{"weight": 2}], "train_data[0]: data='': must be text that names a source"),
    ([{"data": 7}], "train_data[0]: data=7: must be text that names a source"),
    ([{"data": "a.tar", "caption_key": 1}], "train_data[0]: caption_key=1: must be text"),
    ([{"data": "a.tar", "weight": "much"}], "train_data[0]: weight='much': must be a number above 0"),
    ([{"data": "a.tar", "weight": True}], "train_data[0]: weight=True: must be a number above 0"),
    ([{"data": "a.tar", "weight": float("nan")}], "train_data[0]: weight=nan: must be a number above 0"),
]


@pytest.mark.parametrize(("train_data", "message"), BAD, ids=range(len(BAD)))
def test_what_is_no_mix_is_told_in_one_line(train_data, message):
    with pytest.raises(ConfigError) as error:
        read_mix(train_data)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def batches_of(folders, shares, tokenizer, batch_size, **options) -> PairBatches:
    form = PairForm(PairDecoder(), CropTransform(16, 0.9, 0.5), TextMask("none", CONTEXT_LENGTH))
    one_reader = {"process": 0, "num_processes": 1, "num_workers": 0, "seed": 0}
    sources = [
        PairSource(partial(shard_stream, open_files(str(folder)), **one_reader), lambda step: form, 4, folder.name, share)
        for folder, share in zip(folders, shares, strict=True)
    ]
    return PairBatches(sources, tokenizer, batch_size, **{"seed": 0} | options)


def write_folders(tmp_path, *sizes: int):
    """A folder of a shard of each size. Their keys are the same."""
    folders = [tmp_path / f"of-{size}" for size in sizes]
    for folder, size in zip(folders, sizes, strict=True):
        folder.mkdir()
        write_shard(folder / "0.tar", {f"{n:03d}": pair(n, f"{folder.name} {n}") for n in range(size)})
    return folders


@pytest.mark.parametrize("shares", [[1.0], [0.75, 0.25], [0.5, 0.3, 0.2], [0.97, 0.03], [1 / 3] * 3])
def test_each_batch_has_of_every_source_its_share_rounded_and_in_the_mean_its_share(shares, tmp_path, tokenizer):
    batches = batches_of(write_folders(tmp_path, 1) * len(shares), shares, tokenizer, 16)
    counts = np.array([batches._pairs_of_sources(step) for step in range(1, 2001)])
    wanted = 16 * np.array(shares)
    assert (counts.sum(axis=1) == 16).all()
    assert (np.abs(counts - wanted) < 1).all()
    assert counts.mean(axis=0) == pytest.approx(wanted, abs=0.05)
    assert not (counts == counts[0]).all() or np.allclose(wanted, wanted.round())
    # A literal transcription: points at equal distances, from a random offset on, each in the interval of its source.
    offset = np.random.default_rng([0, 7]).random()
    points = (offset + np.arange(16)) / 16
    borders = [0, *np.cumsum(shares)]
    assert counts[6].tolist() == [((first <= points) & (points < last)).sum() for first, last in pairwise(borders)]


@pytest.mark.timeout(120)
def test_sources_have_epochs_of_their_own_and_their_pairs_are_different_though_keys_are_the_same(tmp_path, tokenizer):
    folders = write_folders(tmp_path, 40, 5)
    seen: Counter[str] = Counter()
    batches = iter(batches_of(folders, [0.8, 0.2], tokenizer, 20))
    for _ in range(5):
        batch = next(batches)
        assert batch.of_sources == {"of-40": 16, "of-5": 4}
        seen += batch.of_sources
        captions = tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True)
        assert sum(caption.replace(" ", "").startswith("of-5") for caption in captions) == 4
        assert not batch.skipped["key_repeated"] or batch.skipped["key_repeated"] < 5
    assert seen == {"of-40": 80, "of-5": 20}
    assert batch.ends[0].epoch == 1  # two passes over 40
    assert batch.ends[1].epoch >= 3  # at least four over 5


def test_batches_of_a_mix_go_on_from_any_place(tmp_path, tokenizer):
    folders = write_folders(tmp_path, 40, 7)
    whole = list(islice(batches_of(folders, [0.7, 0.3], tokenizer, 6), 20))
    for number, batch in enumerate(whole[:15], start=1):
        places = json.loads(json.dumps(batch.ends))  # as a checkpoint keeps them
        places = {0: tuple(Place(*place) for place in places)}
        after = next(iter(batches_of(folders, [0.7, 0.3], tokenizer, 6, places=places, first_step=number + 1)))
        assert after.keys == whole[number].keys
        assert torch.equal(after.pixel_values, whole[number].pixel_values)
        assert (after.starts, after.ends) == (whole[number].starts, whole[number].ends)


@pytest.mark.slow
def test_a_resumed_mix_is_the_uninterrupted_one_to_the_last_bit(run, data, tmp_path, monkeypatch):
    keys: list[list[str]] = []
    use = LoaderState.use
    monkeypatch.setattr(LoaderState, "use", lambda state, batch: (keys.append(batch.keys), use(state, batch)))
    small = tmp_path / "small"
    small.mkdir()
    for shard in range(2):
        write_shard(small / f"{shard}.tar", {f"s{shard}-{n}": pair(50 + 5 * shard + n) for n in range(4)})
    large = {"data": f"{data}/train-*.tar", "weight": 5}
    mix = [large, {"data": f"{small}/*.tar", "weight": 3, "caption_key": "json.captions"}]
    options = {"train_data": mix, "max_steps": 12, "num_workers": 2, "shuffle_buffer": 6}
    _, expected, _ = run(**options, output_dir=str(tmp_path / "whole"))
    expected_keys = list(keys)
    small_seen = sum(key.startswith("s") for batch in keys for key in batch)
    assert small_seen > 8  # more than one epoch of it
    assert expected[-1]["of_sources"] == {mix[0]["data"]: 48 - small_seen, mix[1]["data"]: small_seen}
    assert abs(small_seen - 48 * 3 / 8) <= 6
    _, _, folder = run(**options, checkpoint_every=1)
    for step in (9, 4):
        as_killed_at(folder, step)
        keys.clear()
        _, steps, _ = run(**options, checkpoint_every=1, resume="auto")
        assert same(steps) == same(expected)
        assert steps[-1]["of_sources"] == expected[-1]["of_sources"]
        assert keys == expected_keys[step:]
    for changed, message in (
        ([mix[0], mix[1] | {"weight": 4}], r"\(source 1: a share of 0.556, there 0.625\)"),
        ([mix[0], mix[1] | {"caption_key": "txt"}], r"\(source 2: the keys '' and 'txt', there '' and 'json.captions'\)"),
        ([mix[0]], r"\(1 sources, there 2\)"),
        ([mix[1], mix[0]], r"\(source 1: 2 shards, there 4\)"),
    ):
        with pytest.raises(ConfigError, match="is other data than .*" + message):
            run(**options | {"train_data": changed}, checkpoint_every=1, resume="auto")


def test_each_source_has_its_own_captions_and_the_same_one_may_come_twice(data, options):
    spec = f"{data}/train-*.tar"
    config = load_config(["--train_data", json.dumps([{"data": spec}, {"data": spec, "caption_key": "json.captions"}])])
    mix = Mix.open(config)
    captions = mix.captions(40)
    assert list(captions) == [spec, f"{spec} #2"]
    assert all(" number " in caption for caption in captions[spec])
    assert all(" of " in caption for caption in captions[f"{spec} #2"])
    assert len(mix.pictures(6)) == 6


def test_a_scene_is_not_mirrored_though_the_pictures_beside_it_are(run, data, monkeypatch):
    flips = {}
    batches = PairBatches.__iter__

    def looked_at(made):
        flips.update({source.name: source.form_at(1).transform.flip for source in made.sources})
        return batches(made)

    monkeypatch.setattr(PairBatches, "__iter__", looked_at)
    _, steps, _ = run(train_data=f"{data}/train-*.tar:1,scenes:1", eval_data=f"{data}/val-0.tar", max_steps=1)
    assert flips == {f"{data}/train-*.tar": 0.5, "scenes": 0.0}
    assert steps[0]["of_sources"] == {f"{data}/train-*.tar": 2, "scenes": 2}


@pytest.mark.timeout(120)
def test_a_source_that_gives_out_is_named(run, data, tmp_path):
    small, bad = tmp_path / "small.tar", tmp_path / "bad.tar"
    write_shard(small, {"a": pair(1)})
    write_shard(bad, {f"{n:04d}": pair(n) if n == 0 else {"png": b"", "txt": b"a ball"} for n in range(600)})
    with pytest.raises(TrainingStopped, match=f"{small}: a data worker has 1 different pairs, too few for the 2 that its"):
        run(train_data=f"{data}/train-*.tar:1,{small}:1")
    with pytest.raises(TrainingStopped, match=f"{bad}: 99. of the last 1000 samples gave no image-text pair"):
        run(train_data=f"{data}/train-*.tar:1,{bad}:1", max_steps=5)
    with pytest.raises(ConfigError, match="'absent.tar'"):
        run(train_data=f"{data}/train-*.tar:1,absent.tar:1")


def test_a_source_with_few_shards_decides_how_many_workers_there_are(run, data, capsys):
    run(train_data=f"{data}/train-*.tar:1,{data}/train-0.tar:1", num_workers=3, max_steps=1)
    assert f"num_workers=3: uses 1, for train_data='{data}/train-0.tar' has 1 shards" in capsys.readouterr().out
