"""Proves that every kind of source gives its samples once an epoch, over any number of processes and workers, or to each
process in an order of its own where the stream is resampled; and that too few shards are one clear error."""

from functools import partial
from operator import itemgetter

import datasets
import pytest
import torch

from hf_maskclip.data import scene_source
from hf_maskclip.data.sources import open_files, open_source
from hf_maskclip.errors import ConfigError
from training.data.shuffling import shard_stream
from training.data.windows import Place, Windows


class Rows(torch.utils.data.IterableDataset):
    """The rows of an epoch, shuffled inside windows of 8."""

    def __init__(self, open_epoch, seed: int, epoch: int):
        self.open_epoch, self.seed, self.epoch = open_epoch, seed, epoch

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        windows = Windows(self.open_epoch, 8, [self.seed, info.id if info else 0])
        return (row for row, _ in windows.epoch_from(Place(self.epoch)))


def keys_of_epochs(spec, *, num_processes, num_workers, epochs, seed=0) -> list[list[str]]:
    """Keys of the first `epochs` epochs over all processes, read through a DataLoader."""
    by_epoch: list[list[str]] = [[] for _ in range(epochs)]
    for process in range(num_processes):
        split = {"process": process, "num_processes": num_processes, "num_workers": num_workers}
        for epoch in range(epochs):
            rows = Rows(partial(shard_stream, open_source(spec).stream, seed=seed, **split), seed, epoch)
            loader = torch.utils.data.DataLoader(
                rows, batch_size=None, collate_fn=itemgetter("__key__"), num_workers=num_workers
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


WITH_WORKERS = [pytest.param(*numbers, marks=pytest.mark.slow) for numbers in ((1, 2), (1, 3), (2, 1), (3, 1))]


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (2, 0), (3, 0), *WITH_WORKERS])
def test_every_sample_once_an_epoch_over_processes_and_workers(source, num_processes, num_workers):
    """Three shards divide over one and three readers, not over two."""
    spec, expected = source
    split = {"num_processes": num_processes, "num_workers": num_workers}
    epochs = keys_of_epochs(spec, epochs=2, **split)
    for keys in epochs:
        assert sorted(keys) == expected
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    if num_workers == 0:
        assert keys_of_epochs(spec, epochs=2, **split) == epochs
        assert keys_of_epochs(spec, epochs=1, seed=1, **split)[0] != epochs[0]


def test_resampled_each_process_reads_all_shards_in_an_order_of_its_own(shards):
    orders = []
    for process in range(4):  # more than there are shards
        stream = shard_stream(open_files(str(shards)), process=process, num_processes=4, num_workers=0, seed=0, resampled=True)
        orders.append([row["__key__"] for row in stream])
        assert sorted(orders[-1]) == [f"{number:03d}" for number in range(39)]
    assert len(set(map(tuple, orders))) > 1  # of the 6 orders of three shards
    with pytest.raises(ConfigError, match="3 shards for 1 processes x 4 workers"):
        shard_stream(open_files(str(shards)), process=0, num_processes=2, num_workers=4, seed=0, resampled=True)


def test_fewer_shards_than_readers_is_an_error_that_says_what_to_do(shards):
    stream = open_files(str(shards))
    with pytest.raises(ConfigError, match="3 shards for 2 processes x 2 workers: use --num_workers 1 or split"):
        shard_stream(stream, process=0, num_processes=2, num_workers=2, seed=0)
    with pytest.raises(ConfigError, match="3 shards for 4 processes: split the data into more shards"):
        shard_stream(stream, process=0, num_processes=4, num_workers=0, seed=0)
