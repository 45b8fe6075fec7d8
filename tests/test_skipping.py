"""Proves that samples without a pair are counted and logged now and then, that too many of them end a run with the name of
their shard, and that shards which fail for a while lose nothing."""

import logging
from collections import Counter

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from helpers import pair, write_shard

from hf_maskclip.data import shards
from hf_maskclip.data.sources import open_files
from hf_maskclip.errors import ConfigError, TrainingStopped
from training.data.skipping import EMPTY_EPOCHS, LOG_EVERY, WINDOW, SkipMonitor


def test_the_first_sample_of_each_cause_and_every_thousandth_is_logged(caplog):
    monitor = SkipMonitor(max_share=1.0)
    for number in range(2 * LOG_EVERY):
        monitor.count_skipped("image_missing", f"key-{number}", "a.tar")
        monitor.count_used()
    monitor.count_skipped("caption_missing", "other", "b.tar")
    assert [record.getMessage() for record in caplog.records] == [
        "skipped: image_missing (number 1) in a.tar, key key-0",
        "skipped: image_missing (number 1000) in a.tar, key key-999",
        "skipped: image_missing (number 2000) in a.tar, key key-1999",
        "skipped: caption_missing (number 1) in b.tar, key other",
    ]
    assert monitor.causes == {"image_missing": 2000, "caption_missing": 1}


@pytest.mark.parametrize(("max_share", "allowed"), [(0.1, 100), (0.0, 0), (0.999, 999)])
def test_a_share_above_the_limit_stops_with_the_causes_and_the_worst_shard(max_share, allowed):
    monitor = SkipMonitor(max_share)

    def read_a_window(skipped: int) -> None:
        for number in range(WINDOW):
            if number < skipped:
                monitor.count_skipped("image_missing", "key", "fair.tar" if number % 3 == 1 else "bad.tar")
            else:
                monitor.count_used()

    read_a_window(allowed)
    read_a_window(allowed)  # each window counts for itself
    with pytest.raises(TrainingStopped) as error:
        read_a_window(allowed + 1)
    assert f"{allowed + 1} of the last 1000 samples gave no image-text pair (image_missing {allowed + 1})" in str(error.value)
    assert f" of them in bad.tar; max_skipped_share={max_share} are allowed" in str(error.value)


@pytest.mark.parametrize(("num_lost", "stops"), [(0, False), (2, False), (3, True), (9, True)])
def test_too_many_lost_shards_stop_though_each_is_one_sample(num_lost, stops):
    monitor = SkipMonitor(max_share=0.25)

    def read_an_epoch_of_ten_shards() -> None:
        for number in range(10):
            for _ in range(50):
                monitor.count_used(f"{number}.tar")
            if number < num_lost:
                monitor.count_skipped("shard_unreadable", "", f"{number}.tar")
        monitor.end_epoch()

    read_an_epoch_of_ten_shards()
    if stops:
        with pytest.raises(TrainingStopped, match=rf"{2 * num_lost} of the last 20 shards could not be .* such as 0.tar"):
            read_an_epoch_of_ten_shards()
    else:
        read_an_epoch_of_ten_shards()


def test_where_all_may_be_skipped_only_epochs_without_a_pair_stop():
    monitor = SkipMonitor(max_share=1.0)

    def read_an_epoch(used: int) -> None:
        for _ in range(WINDOW + 1):
            monitor.count_skipped("image_missing", "key", "bad.tar")
        for _ in range(used):
            monitor.count_used("bad.tar")
        monitor.end_epoch()

    for used in (*[0] * (EMPTY_EPOCHS - 1), 1, *[0] * (EMPTY_EPOCHS - 1)):
        read_an_epoch(used)
    with pytest.raises(TrainingStopped, match=r"no image-text pair in 10 epochs of a data worker \(image_missing \d+\)"):
        read_an_epoch(0)


@pytest.mark.parametrize("max_share", [0.5, 1.0])
def test_a_long_start_without_captions_is_read_over_where_all_may_be_skipped(max_share, run, tmp_path, caplog):
    rows = [{"png": b"", "txt": b""}] * 1100 + [pair(number) for number in range(8)]
    write_shard(tmp_path / "late.tar", {f"{number:04d}": row for number, row in enumerate(rows)})
    options = {"train_data": str(tmp_path / "late.tar"), "shuffle_buffer": 0, "max_skipped_share": max_share}
    if max_share < 1:
        with pytest.raises(ConfigError, match=r"in the first 1000 samples \(caption_empty 1000\)"):
            run(**options)
        return
    summary, steps, _ = run(**options)
    assert len(steps) == 4
    assert summary["skipped"] == {"caption_empty": 2200}
    assert f"{tmp_path}/late.tar: no usable image-text pair in the first 1000 samples; reading on" in caplog.messages


class FailingFiles(LocalFileSystem):
    """Local files behind the protocol `failing://` whose reading fails as often as `failures` says, at a byte."""

    protocol = "failing"
    cachable = False
    failures = 0
    at_byte = 0

    def _open(self, path, *args, **kwargs):
        file = super()._open(path, *args, **kwargs)
        read = file.f.read

        def failing_read(size=-1):
            if FailingFiles.failures and file.f.tell() >= FailingFiles.at_byte:
                FailingFiles.failures -= 1
                raise ConnectionError("the network is down")
            return read(size)

        file.f = _Reader(file.f, failing_read)
        return file


class _Reader:
    def __init__(self, file, read):
        self.file, self.read = file, read

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def failing_shard(tmp_path, monkeypatch):
    """A shard of six pairs, and the waits before it is opened again."""
    fsspec.register_implementation("failing", FailingFiles, clobber=True)
    monkeypatch.setattr(shards, "_unreadable", shards.UnreadableShards())
    waits = []
    monkeypatch.setattr(shards.time, "sleep", waits.append)
    write_shard(tmp_path / "a.tar", {f"a{n}": pair(n) for n in range(6)})
    FailingFiles.at_byte = (tmp_path / "a.tar").stat().st_size // 2
    return f"failing://{tmp_path}/a.tar", waits


def keys_of(spec: str) -> list[str]:
    return [row.get("__error__") or row["__key__"] for row in open_files(spec)]


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_source_that_fails_and_then_answers_gives_every_sample_once(failures, failing_shard, caplog):
    spec, waits = failing_shard
    FailingFiles.failures = failures
    assert keys_of(spec) == [f"a{n}" for n in range(6)]
    assert waits == list(shards.RETRY_SECONDS[:failures])
    assert FailingFiles.failures == 0
    assert f"{spec}: ConnectionError: the network is down; trying again in 1 s" in caplog.messages


def test_a_source_that_keeps_failing_is_skipped_and_next_time_tried_without_waiting(failing_shard, caplog):
    spec, waits = failing_shard
    FailingFiles.failures = 1000
    read = keys_of(spec)
    assert 1 <= len(read) <= 6  # not all rows, and what stands for the rest
    assert read[-1] == "shard_unreadable"
    assert waits == list(shards.RETRY_SECONDS)
    assert f"{spec}: the rest of this shard is unreadable (ConnectionError: the network is down)" in caplog.messages
    assert keys_of(spec) == read
    assert len(waits) == len(shards.RETRY_SECONDS)
    FailingFiles.failures = 0
    assert keys_of(spec) == [f"a{n}" for n in range(6)]


def test_a_network_that_is_down_is_waited_for_three_times_and_not_for_every_shard(failing_shard, tmp_path):
    _, waits = failing_shard
    for number in range(20):
        write_shard(tmp_path / f"b{number:02d}.tar", {"b": pair(number)})
    FailingFiles.failures, FailingFiles.at_byte = 10_000, 0
    assert keys_of(f"failing://{tmp_path}/b*.tar") == ["shard_unreadable"] * 20
    assert waits == list(shards.RETRY_SECONDS) * 3
    FailingFiles.failures = 0
    assert keys_of(f"failing://{tmp_path}/b*.tar") == ["b"] * 20
    FailingFiles.failures = 1
    assert keys_of(f"failing://{tmp_path}/a.tar") == [f"a{n}" for n in range(6)]
    assert waits == [*shards.RETRY_SECONDS * 3, 1]  # it is up again, and patience is back


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_shard_that_vanishes_mid_run_is_waited_for_then_skipped(kind, failing_shard, tmp_path):
    _, waits = failing_shard
    if kind == "parquet":
        import datasets

        for name in "ab":
            rows = {"__key__": [f"{name}{n}" for n in range(6)], "txt": ["a ball"] * 6}
            datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{name}.parquet")
    else:
        write_shard(tmp_path / "b.tar", {f"b{n}": pair(n) for n in range(6)})
    stream = open_files(f"{tmp_path}/[ab].{kind}")
    assert len(list(stream)) == 12
    (tmp_path / f"a.{kind}").unlink()
    rows = list(stream)
    assert Counter(row.get("__error__") for row in rows) == {"shard_unreadable": 1, None: 6}
    assert rows[0]["__url__"] == f"{tmp_path}/a.{kind}"
    assert waits == list(shards.RETRY_SECONDS)


def test_a_damaged_local_file_is_not_waited_for(failing_shard, tmp_path, caplog):
    _, waits = failing_shard
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: len(content) // 2])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing more")
    assert keys_of(f"{tmp_path}/a.tar")[-1] == "shard_unreadable"
    assert keys_of(f"{tmp_path}/b.parquet") == ["shard_unreadable"]
    assert not waits
    assert caplog.records[-1].levelno == logging.WARNING
