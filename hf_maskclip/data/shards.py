"""Shards of image-text pairs, row by row: tar and parquet files, on a disk or anywhere that fsspec reads.

A row is a dict of undecoded fields, with its `"__key__"` and, as `"__url__"`, its shard. What cannot be read of a shard is one
row with the cause as `"__error__"`.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import fsspec
import pyarrow
import pyarrow.parquet

from .remote import storage_options
from .specs import PARQUET_SUFFIXES, TAR_SUFFIXES
from .tar_files import UNREADABLE, Row, read_tar

logger = logging.getLogger(__name__)

# Seconds to wait before a shard that could not be read is opened again.
RETRY_SECONDS = (1, 5, 25)


class UnreadableShards:
    """The shards that this process could not read.

    None of them is waited for again; nor is any other after three in a row, for then it is not the shard.
    """

    def __init__(self):
        self.shards: set[str] = set()
        self.in_a_row = 0

    def patience(self, path: str) -> tuple[int, ...]:
        return () if path in self.shards or self.in_a_row >= 3 else RETRY_SECONDS

    def add(self, path: str) -> None:
        self.shards.add(path)
        self.in_a_row += 1


_unreadable = UnreadableShards()


def read_shards(paths: list[str], read: Callable[[str], Iterator[Row]]) -> Iterator[Row]:
    """The rows of shards, one after the other.

    After a failure that may pass, of a network or a disk, a shard is opened again, after growing waits, and read on from where
    it was. What stays unreadable of a shard is one row with an `__error__`.
    """
    for path in paths:
        patience = _unreadable.patience(path)
        num_rows, waits = 0, patience
        while True:
            try:
                for row in islice(read(path), num_rows, None):
                    yield row
                    num_rows, waits, _unreadable.in_a_row = num_rows + 1, patience, 0
                break
            except Exception as error:  # fsspec passes on what the clients of its file systems raise
                reason = f"{type(error).__name__}: {error}"
                if not (waits and may_pass(error, path)):
                    logger.warning("%s: the rest of this shard is unreadable (%s)", path, reason)
                    _unreadable.add(path)
                    yield {"__error__": UNREADABLE, "__reason__": reason, "__url__": path}
                    break
                logger.warning("%s: %s; trying again in %d s", path, reason, waits[0])
                time.sleep(waits[0])
                waits = waits[1:]


def may_pass(error: Exception, path: str) -> bool:
    """Whether a failure may be gone when a shard is opened again: one of a network or a disk, not of content or packages."""
    is_of_the_system = isinstance(error, OSError) and error.errno is not None
    return not isinstance(error, ImportError) and (is_of_the_system or "://" in path)


def read_parquet(path: str) -> Iterator[Row]:
    """The rows of a parquet file. A group of rows that is damaged on a disk is one row with an `__error__`."""
    number = 0
    with fsspec.open(path, "rb", **storage_options(path)) as file:
        parquet = pyarrow.parquet.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            first, number = number, number + parquet.metadata.row_group(group).num_rows
            try:
                for batch in parquet.iter_batches(batch_size=64, row_groups=[group]):
                    for row in batch.to_pylist():
                        yield {"__key__": f"{path}#{first}", "__url__": path} | row
                        first += 1
            except (OSError, ValueError, pyarrow.ArrowException) as error:
                if may_pass(error, path):
                    raise
                logger.warning("%s: rows %d to %d are unreadable (%s)", path, first, number - 1, error)
                yield {"__error__": UNREADABLE, "__reason__": str(error), "__url__": path}


@dataclass(frozen=True)
class ShardKind:
    """A kind of shard: what messages call it, how its files end, and the rows of one of them."""

    title: str
    suffixes: tuple[str, ...]
    read: Callable[[str], Iterator[Row]]


SHARD_KINDS = (
    ShardKind("tar files", TAR_SUFFIXES, read_tar),
    ShardKind("parquet files", PARQUET_SUFFIXES, read_parquet),
)
