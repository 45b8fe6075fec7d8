"""Proves that rows come in the order that windows have by definition, and that a reader goes on from any place of an epoch as
if it had never stopped, without reading the epoch again."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count, islice, pairwise

import datasets
import numpy as np
import pytest
from helpers import pair, write_shard

from hf_maskclip.data.sources import open_files
from training.data.shuffling import shard_stream
from training.data.windows import Place, Windows

SHARDS, ROWS = 12, 10
reads: Counter[int] = Counter()  # of each shard


def rows_of_shards(shards: list[int]):
    for shard in shards:
        for row in range(ROWS):
            reads[shard] += 1
            yield {"__key__": f"{shard}-{row}"}


@pytest.fixture
def open_epoch():
    stream = datasets.IterableDataset.from_generator(rows_of_shards, gen_kwargs={"shards": list(range(SHARDS))})
    reads.clear()
    return partial(shard_stream, stream, process=0, num_processes=1, num_workers=0, seed=3)


def wait_until(is_so: Callable[[], bool]) -> None:
    """For a thread. A test that waits in vain fails by its time limit."""
    while not is_so():
        time.sleep(0.001)


def keys_from(windows: Windows, place: Place) -> list[str]:
    return [row["__key__"] for row, _ in windows.epoch_from(place)]


@pytest.mark.parametrize("size", [2, 7, 25, 1000])
def test_rows_are_shuffled_inside_windows_of_the_streams_order(size, open_epoch):
    """A literal transcription: the stream in pieces, each in the order of its own random permutation."""
    stream = [row["__key__"] for row in open_epoch(5)]
    assert len(stream) == SHARDS * ROWS
    expected = []
    borders = [0, *range(size + 1, len(stream), size), len(stream)]  # the first piece has one row more
    for number, (first, last) in enumerate(pairwise(borders)):
        piece = stream[first:last]
        expected += [piece[index] for index in np.random.default_rng([1, 2, 5, number]).permutation(len(piece))]
    found = keys_from(Windows(open_epoch, size, [1, 2]), Place(5))
    assert found == expected
    assert sorted(found) == sorted(stream)
    assert found != stream
    assert found != keys_from(Windows(open_epoch, size, [1, 3]), Place(5))
    assert found != keys_from(Windows(open_epoch, size, [1, 2]), Place(6))


@pytest.mark.parametrize("size", [0, 1])
def test_rows_that_are_not_shuffled_keep_the_streams_order(size, open_epoch):
    assert keys_from(Windows(open_epoch, size, [0]), Place()) == [row["__key__"] for row in open_epoch(0)]


@pytest.mark.parametrize("size", [0, 4, 10, 25, 1000])
def test_a_reader_goes_on_from_any_place(size, open_epoch):
    windows = Windows(open_epoch, size, [0])
    whole = list(windows.epoch_from(Place()))
    for number, (_, place) in enumerate(whole, start=1):
        saved = Place(*json.loads(json.dumps(place)))  # as a checkpoint keeps it
        assert keys_from(windows, saved) == [row["__key__"] for row, _ in whole[number:]]


@pytest.mark.parametrize("size", [4, 25])
def test_going_on_reads_a_window_and_the_shard_that_it_begins_in_wherever_it_is(size, open_epoch):
    windows = Windows(open_epoch, size, [0])
    places = [place for _, place in windows.epoch_from(Place())]
    for place in places[:-1]:
        reads.clear()
        reader = windows.epoch_from(place)
        next(reader)
        reader.close()
        assert 0 < reads.total() <= ROWS + 3 * size + 1  # at the end of a window the next one is read, too; and one ahead


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_files_are_gone_on_with_too(kind, tmp_path):
    for shard in range(4):
        if kind == "tar":
            write_shard(tmp_path / f"{shard}.tar", {f"{shard}{row}": pair(row) for row in range(6)})
        else:
            rows = {"caption": [f"{shard}{row}" for row in range(6)]}
            datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{shard}.parquet")
    open_epoch = partial(shard_stream, open_files(f"{tmp_path}/*.{kind}"), process=0, num_processes=1, num_workers=0, seed=0)
    windows = Windows(open_epoch, 5, [0])
    whole = list(windows.epoch_from(Place()))
    assert len({row["__key__"] for row, _ in whole}) == 24
    for number in (1, 5, 6, 12, 17, 23):
        assert keys_from(windows, whole[number - 1][1]) == [row["__key__"] for row, _ in whole[number:]]


def test_saved_data_sets_are_gone_on_with_too(tmp_path):
    datasets.Dataset.from_dict({"caption": [str(row) for row in range(600)]}).save_to_disk(tmp_path / "saved")
    open_epoch = partial(shard_stream, open_files(str(tmp_path / "saved")), process=0, num_processes=1, num_workers=0, seed=0)
    windows = Windows(open_epoch, 50, [0])
    whole = list(islice(windows.epoch_from(Place()), 600))
    assert len({row["caption"] for row, _ in whole}) == 600
    for number in (1, 49, 50, 51, 299, 300, 301, 555):
        found = [row["caption"] for row, _ in windows.epoch_from(whole[number - 1][1])]
        assert found == [row["caption"] for row, _ in whole[number:]]


def test_the_next_window_is_read_while_one_is_used_and_no_other(open_epoch):
    reader = Windows(open_epoch, 20, [0]).epoch_from(Place())
    for _ in range(21):
        next(reader)
        wait_until(lambda: reads.total() == 41)  # the first window has a row more
    assert reads.total() == 41
    next(reader)
    wait_until(lambda: reads.total() == 61)
    reader.close()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")] == []
    assert reads.total() == 61


def test_a_reader_that_stops_leaves_no_thread_in_the_middle_of_a_window():
    has_begun = threading.Event()

    def endless(shards):
        for number in count():
            if number == 8:
                has_begun.set()
            yield {"__key__": str(number)}

    stream = datasets.IterableDataset.from_generator(endless, gen_kwargs={"shards": [0]})
    windows = Windows(lambda epoch: stream, 10**9, [0])
    windows._length = lambda window: 5 if window == 0 else 10**9
    reader = windows.epoch_from(Place())
    next(reader)
    assert has_begun.wait(20)
    reader.close()  # or this waits for a window without end
    assert [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")] == []


def test_what_reading_raises_comes_where_its_rows_would_have_come(open_epoch):
    def broken(shards):
        yield from ({"__key__": str(number)} for number in range(12))
        raise OSError("the disk is gone")

    stream = datasets.IterableDataset.from_generator(broken, gen_kwargs={"shards": [0]})
    reader, read = Windows(lambda epoch: stream, 5, [0]).epoch_from(Place()), []
    with pytest.raises(OSError, match="the disk is gone"):
        for row, _ in reader:
            read.append(row["__key__"])
    assert len(read) == 11  # the windows of 6 and 5 rows; the third one failed
