"""How data is named: by paths with braces, by the endings of files, or by the id of a Hub data set."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
PARQUET_SUFFIXES = (".parquet",)
SHARD_SUFFIXES = (*TAR_SUFFIXES, *PARQUET_SUFFIXES)
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
# Of pictures: what Pillow opens by itself, and what it does not. The latter are read to be counted.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".jpx", ".jpf", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".icns", ".psd", ".qoi", ".pcx", ".dds"),
)
OTHER_IMAGE_SUFFIXES = (".heic", ".heif", ".hif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw")


HUB_DATA = "hf://datasets/"


class HubDataSet(NamedTuple):
    """A data set on the Hub, named as `org/name`, `org/name:configuration`, `org/name@split` or both."""

    id: str
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, name: str) -> "HubDataSet":
        rest, _, split = name.partition("@")
        identifier, _, config = rest.partition(":")
        return cls(identifier, config or None, split or None)


def ends_in(path: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a path or an address ends in one of these, in either case; what follows a `?` in an address is no part of it."""
    return (urlsplit(path).path if "://" in path else path).lower().endswith(suffixes)


def patterns_of(spec: str) -> list[str]:
    """The paths, addresses, globs and Hub ids in a spec: braces and `~` are expanded, and `::` stands between several.

    A path that is there is taken as it is, whatever characters it has.
    """
    if os.path.exists(os.path.expanduser(spec)):
        return [os.path.expanduser(spec)]
    # `zip://a.jpg::https://host/b.zip` is one address, of a file system on another.
    parts = [spec] if re.match(r"(zip|tar|gzip|\w+cache)://", spec) else spec.split("::")
    return list(dict.fromkeys(path for part in parts for path in expand_braces(os.path.expanduser(part))))


def expand_braces(pattern: str) -> list[str]:
    """Expand `{a,b}` and `{000..012}` as a shell does; what comes up twice is there once."""
    match = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    first, last = match[1].split("..") if re.fullmatch(r"\d+\.\.\d+", match[1]) else ("", "")
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)] if first else match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    expanded = [path for number in numbers for path in expand_braces(f"{before}{number}{after}")]
    return list(dict.fromkeys(expanded))


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `org/name` of a Hub repository, and is no file or folder here."""
    if name.count("/") != 1 or ends_in(name, (*SHARD_SUFFIXES, *TABLE_SUFFIXES)) or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith(".")


def hub_data_set_of(spec: str) -> HubDataSet | None:
    """The data set that a spec names by its id; None where it names paths, or something that lies here."""
    hub, patterns = HubDataSet.parse(spec), patterns_of(spec)
    return hub if len(patterns) == 1 and not os.path.exists(patterns[0]) and is_hub_id(hub.id) else None


def hub_ids_of(specs: Iterable[str]) -> list[str]:
    """The ids of the Hub's data sets that specs read, named by an id or by `hf://datasets/` paths."""
    found: dict[str, None] = {}
    for spec in specs:
        hub = hub_data_set_of(spec)
        paths = [pattern.removeprefix(HUB_DATA) for pattern in patterns_of(spec) if pattern.startswith(HUB_DATA)]
        ids = [hub.id] if hub else ["/".join(path.split("/")[:2]).partition("@")[0] for path in paths]
        found |= dict.fromkeys(ids)
    return list(found)
