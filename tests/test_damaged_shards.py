"""Proves that damage in the middle of a tar or parquet file costs what it hit, is counted, and ends nothing: bytes that are
zero, random or flipped at seeded places, and files that are cut."""

import logging
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import pair, write_shard

from hf_maskclip.data.decoding import PairDecoder
from hf_maskclip.data.pictures import SkippedSample
from hf_maskclip.data.shards import read_parquet, read_shards
from hf_maskclip.data.tar_files import read_tar


@pytest.fixture
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def count(path, read_shard) -> tuple[int, int]:
    """Of a damaged shard: the samples that give a pair, and those that give none."""
    good = bad = 0
    for row in read_shards([str(path)], read_shard):
        try:
            PairDecoder()(row, np.random.default_rng(0))
            good += 1
        except SkippedSample:
            bad += 1
    return good, bad


@pytest.mark.slow
def test_damage_in_a_tar_is_read_on_behind_and_counted(quiet, tmp_path):
    write_shard(tmp_path / "a.tar", {f"{n:03d}": pair(n) for n in range(60)})
    whole = (tmp_path / "a.tar").read_bytes()
    assert count(tmp_path / "a.tar", read_tar) == (60, 0)
    rng = random.Random(0)
    for number in range(200):
        content = bytearray(whole)
        at = rng.randrange(len(content) - 20_000)
        length = rng.choice((1, 512, 4096))
        content[at : at + length] = (bytes(length), rng.randbytes(length), bytes([content[at] ^ 64]) * length)[number % 3]
        (tmp_path / "b.tar").write_bytes(content)
        good, bad = count(tmp_path / "b.tar", read_tar)
        assert good >= 52, (number, at)
        assert good == 60 or bad, (number, at)


@pytest.mark.slow
def test_a_tar_that_is_cut_says_so_wherever_the_cut_is(quiet, tmp_path):
    write_shard(tmp_path / "a.tar", {f"{n:03d}": pair(n) for n in range(20)})
    whole = (tmp_path / "a.tar").read_bytes().rstrip(b"\0")
    rng = random.Random(1)
    for number in range(100):
        cut = rng.randrange(512, len(whole))
        (tmp_path / "b.tar").write_bytes(whole[: cut if number % 2 else cut // 512 * 512])
        errors = [row for row in read_shards([str(tmp_path / "b.tar")], read_tar) if "__error__" in row]
        assert len(errors) == 1, cut


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_damage_in_a_parquet_file_costs_a_group_of_rows(compression, quiet, tmp_path):
    columns = {"image": [pair(n)["png"] for n in range(40)], "text": [f"caption {n}" for n in range(40)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=10, compression=compression)
    whole = (tmp_path / "a.parquet").read_bytes()
    end_of_pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    rng, goods = random.Random(0), []
    for _ in range(200):
        content = bytearray(whole)
        content[rng.randrange(4, end_of_pages)] ^= 1 << rng.randrange(8)
        (tmp_path / "b.parquet").write_bytes(content)
        good, bad = count(tmp_path / "b.parquet", read_parquet)
        assert good == 40 or bad or compression == "none"  # a letter of a caption, or a pixel, may be another one
        goods.append(good)
    assert min(goods) >= 30
