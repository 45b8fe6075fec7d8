"""Proves that every kind of source gives its pairs once, over any number of processes and workers; that bad samples are
skipped and counted by cause; and that what cannot work is one clear error."""

import io
import json
from collections import Counter
from functools import partial
from itertools import islice
from operator import itemgetter

import datasets
import numpy as np
import pytest
import torch
from conftest import CONTEXT_LENGTH, encode_image, pair, random_picture, shared_data, write_shard
from PIL import Image
from torchvision.transforms import v2

from hf_maskclip.data import scene_source
from hf_maskclip.data.decoding import MAX_IMAGE_PIXELS, PairDecoder, SkippedSample, decode_image, sample_key
from hf_maskclip.data.scene_source import SceneDecoder
from hf_maskclip.data.source import Source
from hf_maskclip.data.sources import open_files, open_source
from hf_maskclip.data.specs import expand_braces
from hf_maskclip.errors import ConfigError
from training.data.batches import PairBatches, pad_tokens, train_transform
from training.data.loader import build_loader
from training.data.shuffling import shard_stream
from training.data.text_masking import TextMask

RNG = np.random.default_rng(0)


def keys_of_epochs(spec, *, num_processes, num_workers, epochs, seed=0) -> list[list[str]]:
    """Keys of the first `epochs` epochs over all processes, read through a DataLoader."""
    by_epoch: list[list[str]] = [[] for _ in range(epochs)]
    for process in range(num_processes):
        split = {"process": process, "num_processes": num_processes, "num_workers": num_workers}
        for epoch in range(epochs):
            stream = shard_stream(open_source(spec).stream, epoch, seed=seed, buffer_size=8, **split)
            loader = torch.utils.data.DataLoader(
                stream, batch_size=None, collate_fn=itemgetter("__key__"), num_workers=num_workers
            )
            by_epoch[epoch] += list(loader)
    return by_epoch


@pytest.fixture(params=["tar", "parquet", "scenes"])
def source(request, shards, tmp_path, monkeypatch):
    """A source of 39 samples in three shards (of scenes, 12), and their keys."""
    if request.param == "scenes":
        monkeypatch.setattr(scene_source, "SHARDS", 3)
        monkeypatch.setattr(scene_source, "SCENES_PER_SHARD", 4)
        return "scenes", [f"train-{number:08d}" for number in range(12)]
    if request.param == "tar":
        return f"{shards}/train-*.tar", [f"{number:03d}" for number in range(39)]
    expected = []
    for number, count in enumerate((20, 12, 7)):
        path = tmp_path / f"pairs-{number}.parquet"
        datasets.Dataset.from_dict({"caption": [f"{n}" for n in range(count)]}).to_parquet(path)
        expected += [f"{path}#{n}" for n in range(count)]
    return f"{tmp_path}/pairs-*.parquet", sorted(expected)


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (1, 2), (1, 3), (2, 0), (2, 1), (3, 1), (3, 0)])
def test_every_sample_once_an_epoch_over_processes_and_workers(source, num_processes, num_workers):
    """Three shards divide over one and three readers, not over two."""
    spec, expected = source
    split = {"num_processes": num_processes, "num_workers": num_workers}
    epochs = keys_of_epochs(spec, epochs=2, **split)
    for keys in epochs:
        assert sorted(keys) == expected
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    if num_workers == 0:
        assert keys_of_epochs(spec, epochs=2, **split) == epochs
        assert keys_of_epochs(spec, epochs=1, seed=1, **split)[0] != epochs[0]


def test_resampled_each_process_reads_all_shards_in_an_order_of_its_own(shards):
    orders = []
    for process in range(4):  # more than there are shards
        stream = shard_stream(
            open_files(str(shards)), process=process, num_processes=4, num_workers=0, seed=0, buffer_size=8, resampled=True
        )
        orders.append([row["__key__"] for row in stream])
        assert sorted(orders[-1]) == [f"{number:03d}" for number in range(39)]
    assert len(set(map(tuple, orders))) == 4
    with pytest.raises(ConfigError, match="3 shards for 1 processes x 4 workers"):
        shard_stream(open_files(str(shards)), process=0, num_processes=2, num_workers=4, seed=0, buffer_size=8, resampled=True)


def test_workers_of_a_process_can_be_in_different_epochs(shards, tokenizer):
    """A stream of 🤗 Datasets shares its epoch between the workers of a process; ours must not."""
    split = {"process": 0, "num_processes": 1, "num_workers": 2, "seed": 0, "buffer_size": 8}
    open_epoch = partial(shard_stream, open_files(f"{shards}/train-*.tar"), **split)

    def keys_by_worker(*epochs: int) -> list[list[str]]:
        positions = {worker: (epoch, 0) for worker, epoch in enumerate(epochs)}
        transform = train_transform(32, 0.9, 0.5)
        batches = PairBatches(open_epoch, PairDecoder(), transform, tokenizer, NO_TEXT_MASK, 1, 0, positions=positions)
        first = [batch.keys[0] for batch in islice(build_loader(batches, num_workers=2), 10)]
        return [first[::2], first[1::2]]

    (first, _), (_, second) = keys_by_worker(0, 0), keys_by_worker(5, 5)
    assert keys_by_worker(0, 0)[1] != second
    for _ in range(5):
        assert keys_by_worker(0, 5) == [first, second]


NO_TEXT_MASK = TextMask("none", CONTEXT_LENGTH)


def _every_epoch(stream, epoch):
    return stream


def batches_of(stream, tokenizer, decoder=None, batch_size=13, seed=0, text_mask=NO_TEXT_MASK) -> PairBatches:
    transform = train_transform(32, 0.9, 0.5)
    return PairBatches(
        partial(_every_epoch, stream), decoder or PairDecoder(), transform, tokenizer, text_mask, batch_size, seed
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_pass_over_every_sample_once_before_any_comes_twice(shards, tokenizer, num_workers):
    stream = shard_stream(
        open_files(f"{shards}/*.tar"), process=0, num_processes=1, num_workers=num_workers, seed=0, buffer_size=8
    )
    loader = iter(build_loader(batches_of(stream, tokenizer, batch_size=1), num_workers))
    keys = [next(loader)["keys"][0] for _ in range(39 if num_workers == 0 else 14)]
    # Two workers take turns, so the shorter one starts again first: only the common part is free of repeats.
    assert len(set(keys)) == len(keys)


def test_a_batch_has_its_shapes_types_and_repeats_under_one_seed(shards, tokenizer):
    def first_two(seed):
        stream = shard_stream(open_files(str(shards)), process=0, num_processes=1, num_workers=0, seed=seed, buffer_size=8)
        batches = iter(batches_of(stream, tokenizer, seed=seed))
        return next(batches), next(batches)

    (batch, second), (again, _), (other, _) = first_two(0), first_two(0), first_two(1)
    assert batch.pixel_values.shape == (13, 3, 32, 32) and batch.pixel_values.dtype == torch.uint8
    assert batch.input_ids.shape[0] == 13 and len(batch.keys) == 13 and not batch.skipped
    assert torch.equal(batch.pixel_values, again.pixel_values) and batch.keys == again.keys
    assert batch.keys != other.keys and batch.keys != second.keys


def test_fewer_shards_than_readers_is_an_error_that_says_what_to_do(shards):
    stream = open_files(str(shards))
    with pytest.raises(ConfigError, match="3 shards for 2 processes x 2 workers: use --num_workers 1 or split"):
        shard_stream(stream, process=0, num_processes=2, num_workers=2, seed=0, buffer_size=8)
    with pytest.raises(ConfigError, match="3 shards for 4 processes: split the data into more shards"):
        shard_stream(stream, process=0, num_processes=4, num_workers=0, seed=0, buffer_size=8)


# ---- Sources ----------------------------------------------------------------------------------------------------------


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
    assert stream.num_shards == 3 and [row["__key__"] for row in stream] == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
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


def test_caption_keys_reach_into_json_lists_and_fall_back(shards):
    row = next(iter(open_files(str(shards))))
    drawn = {PairDecoder(caption_key="json.captions")(row, np.random.default_rng(seed))[1] for seed in range(20)}
    assert drawn == {"first of 0", "second of 0"}
    assert PairDecoder(caption_key="json.absent,txt")(row, RNG)[1] == "a red ball on grass number 0"
    with pytest.raises(SkippedSample, match="caption_missing"):
        PairDecoder(caption_key="json.absent")(row, RNG)


# ---- Pictures and captions --------------------------------------------------------------------------------------------


def skip_cause(**files: bytes) -> str:
    with pytest.raises(SkippedSample) as skipped:
        PairDecoder()({"__key__": "x", "png": encode_image(random_picture(0)), "txt": b"a ball"} | files, RNG)
    return str(skipped.value)


def test_causes_of_skipping():
    picture = encode_image(random_picture(0))
    assert skip_cause(txt=b" \n") == "caption_empty"
    assert skip_cause(txt="Caf\u00e9".encode("latin-1")) == "caption_not_utf8"
    assert skip_cause(png=b"") == "image_undecodable"
    assert skip_cause(png=b"not a picture") == "image_undecodable"
    assert skip_cause(png=picture[: len(picture) // 2]) == "image_undecodable"
    side = int(MAX_IMAGE_PIXELS**0.5) + 1
    assert skip_cause(png=encode_image(Image.new("1", (side, side)))) == "image_too_large"
    with pytest.raises(SkippedSample, match="json_undecodable"):
        PairDecoder(caption_key="json.caption")({"json": b"{"}, RNG)
    with pytest.raises(SkippedSample, match="image_missing"):
        PairDecoder()({"txt": b"a ball"}, RNG)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_unusual_pictures_become_rgb(mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    picture = Image.new(mode, (5, 7)) if mode == "I;16" else random_picture(0, (5, 7)).convert(mode)
    decoded = decode_image(encode_image(picture, form))
    assert decoded.mode == "RGB" and decoded.size == (5, 7)
    assert train_transform(32, 0.5, 0.5)(decoded).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("size", "decoded"),
    [((640, 480), (320, 240)), ((2000, 1500), (500, 375)), ((500, 400), (500, 400)), ((2000, 300), (2000, 300))],
)
def test_a_jpeg_is_decoded_no_larger_than_its_crops_need(size, decoded):
    picture = random_picture(0, (64, 48)).resize(size)
    jpeg = encode_image(picture, "JPEG")
    small = decode_image(jpeg, image_size=224, crop_scale=0.9)
    assert small.size == decoded and decode_image(jpeg).size == size
    assert decode_image(encode_image(picture), image_size=224, crop_scale=0.9).size == size  # a PNG can only be decoded whole
    whole, drafted = (np.asarray(p.resize((64, 48)), np.float32) for p in (decode_image(jpeg), small))
    assert np.abs(whole - drafted).mean() < 2
    for seed in range(50):  # no crop is smaller than what it becomes
        torch.manual_seed(seed)
        crop = v2.RandomResizedCrop(224, scale=(0.9, 1.0)).make_params([small])
        assert min(crop["height"], crop["width"]) >= 224


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000)])
def test_extreme_shapes_are_cropped_to_the_square(size):
    assert train_transform(32, 0.9, 0.5)(random_picture(0, size)).shape == (3, 32, 32)


@pytest.mark.parametrize("longest", [2, 7, 8, 9, 29, 32])
def test_a_batch_of_tokens_is_trimmed_to_its_longest_caption_in_steps_of_eight(tokenizer, longest):
    ids = pad_tokens(tokenizer, [[5] * longest, [5, 6]], max_length=30 if longest < 30 else 32)
    assert ids.shape == (2, {2: 8, 7: 8, 8: 8, 9: 16, 29: 30, 32: 32}[longest])
    assert ids[0, :longest].tolist() == [5] * longest and set(ids[1, 2:].tolist()) == {tokenizer.pad_token_id}


def test_long_captions_are_cut_with_their_end_token_and_a_text_mask_shortens_all(tmp_path, tokenizer):
    captions = ["a ball " * 500, "a small house on a hill"]
    write_shard(tmp_path / "a.tar", {str(n): pair(n, caption) for n, caption in enumerate(captions)})
    stream = open_files(str(tmp_path))
    ids = next(iter(batches_of(stream, tokenizer, batch_size=2))).input_ids
    assert ids.shape == (2, CONTEXT_LENGTH) and ids[0, -1] == tokenizer.eos_token_id
    ids = next(iter(batches_of(stream, tokenizer, batch_size=2, text_mask=TextMask("block", 4)))).input_ids
    assert ids.shape == (2, 4)
    assert set(ids[:, 0].tolist()) == {tokenizer.bos_token_id} and set(ids[:, -1].tolist()) == {tokenizer.eos_token_id}


def test_the_tokenizer_learns_from_captions_alone(shards):
    captions = list(open_source(str(shards)).captions(limit=10))
    assert len(captions) == 10 and captions[0] == "a red ball on grass number 0"


def test_scenes_give_endless_pairs_that_depend_on_their_number_alone(tokenizer):
    stream = open_source("scenes").stream
    first = [row["__key__"] for row in stream.take(3)]
    assert first == ["train-00000000", "train-00000001", "train-00000002"]
    stream = shard_stream(stream, process=0, num_processes=2, num_workers=2, seed=0, buffer_size=0)
    batch = next(iter(batches_of(stream, tokenizer, SceneDecoder(image_size=32), batch_size=4)))
    assert batch.pixel_values.shape == (4, 3, 32, 32) and batch.pixel_values.float().std() > 10


def test_a_source_without_any_usable_pair_does_not_loop(tokenizer, tmp_path):
    write_shard(tmp_path / "bad.tar", {str(n): {"png": b"", "txt": b"a ball"} for n in range(5)})
    (batch,) = batches_of(open_files(str(tmp_path / "bad.tar")), tokenizer)
    assert batch.reason.startswith("1000 of the last 1000 samples gave no image-text pair (image_undecodable 1000), 1000")


def test_rows_without_a_key_have_one_by_their_content(tmp_path):
    row = {"image": {"bytes": b"abc", "path": None}, "text": "a ball"}
    assert sample_key(row) == sample_key(dict(row)) != sample_key(row | {"text": "a box"})
    assert sample_key(row | {"__key__": "x1"}) == "x1"


def test_an_empty_shard_does_not_loop(tmp_path, tokenizer):
    write_shard(tmp_path / "empty.tar", {})
    (batch,) = batches_of(open_files(str(tmp_path / "empty.tar")), tokenizer)
    assert "(epoch_empty 1000)" in batch.reason


def test_a_cut_shard_costs_only_its_rest(tmp_path, tokenizer):
    write_shard(tmp_path / "a.tar", {f"a{n}": pair(n) for n in range(6)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    write_shard(tmp_path / "b.tar", {f"b{n}": pair(n) for n in range(6)})
    rows = list(open_files(str(tmp_path)))
    assert Counter(row.get("__error__") for row in rows)["shard_unreadable"] == 1
    keys = [row["__key__"] for row in rows if "__key__" in row]
    assert keys[:2] == ["a0", "a1"] and len([k for k in keys if k[0] == "a"]) < 6
    assert [k for k in keys if k[0] == "b"] == [f"b{n}" for n in range(6)]


def test_the_broken_sample_data_is_read_through_and_counted_as_its_manifest_says():
    folder = shared_data("broken")
    manifest = json.loads((folder / "MANIFEST.json").read_text())["files"]
    bad = {s["key"] for content in manifest.values() for s in content["samples"] if s["status"] == "bad"}
    decoder, skipped, used = PairDecoder(), {}, []
    for row in open_files(str(folder)):
        try:
            picture, caption = decoder(row, RNG)
            train_transform(32, 0.9, 0.5)(picture)
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
