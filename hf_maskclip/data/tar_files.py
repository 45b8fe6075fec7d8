"""The samples of a webdataset shard. Where a header is damaged, reading goes on at the next whole one, and the gap is told."""

import tarfile
from collections.abc import Iterator
from typing import Any

import fsspec

from .remote import storage_options

Row = dict[str, Any]
UNREADABLE = "shard_unreadable"
BUFFER = 2**16  # bytes that are read at a time


def read_tar(path: str) -> Iterator[Row]:
    """Samples of a webdataset shard: files that share a key, the base name up to its first dot. Extensions are lower-cased.

    After them comes one row with an `__error__` for each gap of damaged headers, and one where the end is missing: `tarfile`
    itself takes both for the end of the file.
    """
    sample: Row = {}
    headers = _watched_headers()
    with (
        fsspec.open(path, "rb", **storage_options(path)) as file,
        tarfile.open(fileobj=file, mode="r|*", bufsize=BUFFER, tarinfo=headers, ignore_zeros=True) as tar,
    ):
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not member.isfile() or not stem:
                continue
            if sample and sample["__key__"] != key:
                yield sample
                sample = {}
            stored = tar.extractfile(member)
            assert stored is not None  # for the member is a file
            content = stored.read()
            if len(content) < member.size:
                raise tarfile.ReadError("unexpected end of data")
            sample |= {"__key__": key, "__url__": path, extension.lower(): content}
    if sample:
        yield sample
    for _ in range(headers.num_gaps + (not headers.has_ended and not headers.is_in_gap)):
        yield {"__error__": UNREADABLE, "__url__": path}


class _WatchedHeader(tarfile.TarInfo):
    """Counts the gaps of damaged headers, and knows whether the zeros that end a tar file came last."""

    num_gaps: int
    has_ended: bool
    is_in_gap: bool

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            cls.has_ended, cls.is_in_gap = True, False
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError:
            cls.num_gaps += not cls.is_in_gap
            cls.has_ended, cls.is_in_gap = False, True
            raise
        cls.has_ended = cls.is_in_gap = False
        return header


def _watched_headers() -> type[_WatchedHeader]:
    """A class for one tar file: `tarfile` makes its headers from the class alone."""
    return type("Header", (_WatchedHeader,), {"num_gaps": 0, "has_ended": False, "is_in_gap": False})
