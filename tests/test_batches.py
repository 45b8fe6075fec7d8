"""Proves that a batch has the shapes, types and tokens that it should and comes again under its seed, that batches pass over
every sample once before any comes twice, and that what has no usable pair does not loop."""

from collections import Counter
from functools import partial
from itertools import islice

import pytest
import torch
from helpers import CONTEXT_LENGTH, pair, random_picture, write_shard
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from hf_maskclip.data.decoding import PairDecoder
from hf_maskclip.data.scene_source import SceneDecoder
from hf_maskclip.data.sources import open_files, open_source
from training.data.batches import PairBatches, Stopped, TextForm, pad_tokens, stack_pictures
from training.data.forms import CropTransform, PairForm
from training.data.loader import build_loader
from training.data.pairs import PairSource, seeded_draws
from training.data.shuffling import shard_stream
from training.data.text_masking import TextMask
from training.data.windows import Place

NO_TEXT_MASK = TextMask("none", CONTEXT_LENGTH)


def _every_epoch(stream, epoch):
    return stream


def batches_of(stream, tokenizer, decoder=None, batch_size=13, seed=0, text_mask=NO_TEXT_MASK) -> PairBatches:
    form = PairForm(decoder or PairDecoder(), CropTransform(32, 0.9, 0.5), text_mask)
    return batches_of_epochs(partial(_every_epoch, stream), form, tokenizer, batch_size, seed)


def batches_of_epochs(open_epoch, form, tokenizer, batch_size, seed=0, places=None) -> PairBatches:
    return PairBatches([PairSource(open_epoch, lambda step: form, 8)], tokenizer, batch_size, seed, places=places)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_pass_over_every_sample_once_before_any_comes_twice(shards, tokenizer, num_workers):
    stream = shard_stream(open_files(f"{shards}/*.tar"), process=0, num_processes=1, num_workers=num_workers, seed=0)
    loader = iter(build_loader(batches_of(stream, tokenizer, batch_size=1), num_workers))
    keys = [next(loader).keys[0] for _ in range(39 if num_workers == 0 else 14)]
    # Two workers take turns, so the shorter one starts again first: only the common part is free of repeats.
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
def test_workers_of_a_process_can_be_in_different_epochs(shards, tokenizer):
    """A stream of 🤗 Datasets shares its epoch between the workers of a process; ours must not."""
    split = {"process": 0, "num_processes": 1, "num_workers": 2, "seed": 0}
    open_epoch = partial(shard_stream, open_files(f"{shards}/train-*.tar"), **split)

    def keys_by_worker(*epochs: int) -> list[list[str]]:
        places = {worker: (Place(epoch),) for worker, epoch in enumerate(epochs)}
        form = PairForm(PairDecoder(), CropTransform(32, 0.9, 0.5), NO_TEXT_MASK)
        batches = batches_of_epochs(open_epoch, form, tokenizer, 1, places=places)
        first = [batch.keys[0] for batch in islice(build_loader(batches, num_workers=2), 10)]
        return [first[::2], first[1::2]]

    (first, _), (_, second) = keys_by_worker(0, 0), keys_by_worker(5, 5)
    assert keys_by_worker(0, 0)[1] != second
    for _ in range(5):
        assert keys_by_worker(0, 5) == [first, second]


def test_a_batch_has_its_shapes_types_and_repeats_under_one_seed(shards, tokenizer):
    def first_two(seed):
        stream = shard_stream(open_files(str(shards)), process=0, num_processes=1, num_workers=0, seed=seed)
        batches = iter(batches_of(stream, tokenizer, seed=seed))
        return next(batches), next(batches)

    (batch, second), (again, _), (other, _) = first_two(0), first_two(0), first_two(1)
    assert batch.pixel_values.shape == (13, 3, 32, 32)
    assert batch.pixel_values.dtype == torch.uint8
    assert batch.input_ids.shape[0] == 13
    assert len(batch.keys) == 13
    assert not batch.skipped
    assert torch.equal(batch.pixel_values, again.pixel_values)
    assert batch.keys == again.keys
    assert batch.keys != other.keys
    assert batch.keys != second.keys


@pytest.mark.parametrize("size", [(40, 40), (320, 240), (97, 120)])
def test_a_crop_is_the_one_that_torchvision_makes_of_a_picture_with_pillow(size):
    """The same draws, and pixels that differ by at most 1 of 255."""
    crop = v2.RandomResizedCrop(32, scale=(0.5, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    pillow = v2.Compose([crop, v2.RandomHorizontalFlip(0.5), v2.PILToTensor()])
    ours, picture, seen = CropTransform(32, 0.5, 0.5), random_picture(0, size), set()
    for seed in range(20):
        with seeded_draws(seed):
            expected = pillow(picture)
        with seeded_draws(seed):
            found = ours(picture)
        assert (found.dtype, found.shape) == (torch.uint8, (3, 32, 32))
        assert (found.int() - expected.int()).abs().max() <= 1
        seen.add(found.numpy().tobytes())
    assert len(seen) == 20


def test_draws_depend_on_their_seed_alone_and_leave_the_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded_draws(1):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded_draws(1):
        assert torch.equal(torch.rand(3), first)
    assert not torch.equal(first, expected)


def test_pictures_are_stacked_as_they_lie():
    pictures = [CropTransform(32, 0.5, 0.5)(random_picture(n, (40, 50))) for n in range(3)]
    assert torch.equal(stack_pictures(pictures), torch.stack(pictures))
    assert stack_pictures(pictures).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000)])
def test_extreme_shapes_are_cropped_to_the_square(size):
    assert CropTransform(32, 0.9, 0.5)(random_picture(0, size)).shape == (3, 32, 32)


@pytest.mark.parametrize("longest", [2, 7, 8, 9, 29, 32])
def test_a_batch_of_tokens_is_trimmed_to_its_longest_caption_in_steps_of_eight(tokenizer, longest):
    ids = pad_tokens(tokenizer, [[5] * longest, [5, 6]], 30 if longest < 30 else 32, TextForm())["input_ids"]
    assert ids.shape == (2, {2: 8, 7: 8, 8: 8, 9: 16, 29: 30, 32: 32}[longest])
    assert ids[0, :longest].tolist() == [5] * longest
    assert set(ids[1, 2:].tolist()) == {tokenizer.pad_token_id}


def test_long_captions_are_cut_with_their_end_token_and_a_text_mask_shortens_all(tmp_path, tokenizer):
    captions = ["a ball " * 500, "a small house on a hill"]
    write_shard(tmp_path / "a.tar", {str(n): pair(n, caption) for n, caption in enumerate(captions)})
    stream = open_files(str(tmp_path))
    ids = next(iter(batches_of(stream, tokenizer, batch_size=2))).input_ids
    assert ids.shape == (2, CONTEXT_LENGTH)
    assert ids[0, -1] == tokenizer.eos_token_id
    ids = next(iter(batches_of(stream, tokenizer, batch_size=2, text_mask=TextMask("block", 4)))).input_ids
    assert ids.shape == (2, 4)
    assert set(ids[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert set(ids[:, -1].tolist()) == {tokenizer.eos_token_id}


def test_scenes_give_endless_pairs_that_depend_on_their_number_alone(tokenizer):
    stream = open_source("scenes").stream
    first = [row["__key__"] for row in stream.take(3)]
    assert first == ["train-00000000", "train-00000001", "train-00000002"]
    stream = shard_stream(stream, process=0, num_processes=2, num_workers=2, seed=0)
    batch = next(iter(batches_of(stream, tokenizer, SceneDecoder(image_size=32), batch_size=4)))
    assert batch.pixel_values.shape == (4, 3, 32, 32)
    assert batch.pixel_values.float().std() > 10


def test_a_source_without_any_usable_pair_does_not_loop(tokenizer, tmp_path):
    write_shard(tmp_path / "bad.tar", {str(n): {"png": b"", "txt": b"a ball"} for n in range(5)})
    (batch,) = batches_of(open_files(str(tmp_path / "bad.tar")), tokenizer)
    assert batch.reason.startswith("1000 of the last 1000 samples gave no image-text pair (image_undecodable 1000), 1000")


def test_an_empty_shard_does_not_loop(tmp_path, tokenizer):
    write_shard(tmp_path / "empty.tar", {})
    (batch,) = batches_of(open_files(str(tmp_path / "empty.tar")), tokenizer)
    assert "(epoch_empty 1000)" in batch.reason


def test_no_key_comes_twice_in_a_batch_and_none_is_lost_in_silence(tmp_path, tokenizer):
    write_shard(tmp_path / "a.tar", {str(number): pair(number) for number in range(10)})
    split = {"process": 0, "num_processes": 1, "num_workers": 0, "seed": 0}
    open_epoch = partial(shard_stream, open_files(str(tmp_path)), **split)
    form = PairForm(PairDecoder(), CropTransform(32, 0.9, 0.5), NO_TEXT_MASK)
    batches = list(islice(batches_of_epochs(open_epoch, form, tokenizer, batch_size=7), 20))
    assert all(len(set(batch.keys)) == 7 for batch in batches)
    skipped = sum((batch.skipped for batch in batches), Counter())
    assert 0 < skipped["key_repeated"]
    (end,) = batches[-1].ends
    num_rows = end.epoch * 10 + (9 if end.window else 0) + end.used  # windows of 9 and 1
    assert num_rows == 20 * 7 + skipped["key_repeated"]


def test_fewer_pairs_than_a_batch_takes_end_in_one_line(tmp_path, tokenizer):
    write_shard(tmp_path / "a.tar", {str(number): pair(number) for number in range(5)})
    (stopped,) = batches_of(open_files(str(tmp_path)), tokenizer, batch_size=8)
    assert stopped == Stopped(
        "a data worker has 5 different pairs, too few for batch_size=8: use a smaller one, or fewer num_workers"
    )


def test_for_a_gpu_the_loader_pins_batches_and_keeps_what_else_is_in_them(shards, tokenizer, monkeypatch):
    """Where there is no GPU, PyTorch's loader is told of one, and what it would pin is noted."""
    stream, pinned = open_files(f"{shards}/*.tar"), []
    plain = next(iter(build_loader(batches_of(stream, tokenizer), num_workers=0)))
    assert not pinned
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor.clone())
    batch = next(iter(build_loader(batches_of(stream, tokenizer), num_workers=0, pins_memory=True)))
    assert [tuple(tensor.shape) for tensor in pinned] == [tuple(batch.input_ids.shape), (13, 3, 32, 32)]
    assert batch.pixel_values is not pinned[1]
    assert torch.equal(batch.pixel_values, plain.pixel_values)
    assert torch.equal(batch.input_ids, plain.input_ids)
    for name in ("keys", "skipped", "of_sources", "worker", "starts", "ends", "spatial_shapes"):
        assert getattr(batch, name) == getattr(plain, name)
    stopped = Stopped("no more")
    assert next(iter(DataLoader([stopped], batch_size=None, collate_fn=lambda item: item, pin_memory=True))) is stopped
