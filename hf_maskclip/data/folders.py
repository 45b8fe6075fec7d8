"""What a folder holds, found in all of its sub-folders: shards, tables, pictures, or a saved data set."""

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet

from ..errors import fail
from .decoding import IMAGE_KEYS
from .specs import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, PARQUET_SUFFIXES, SHARD_SUFFIXES, TABLE_SUFFIXES, TAR_SUFFIXES, ends_in
from .tables import path_field, read_table

logger = logging.getLogger(__name__)

# What splits are called. Where a folder has several, the one that is asked for is taken.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
NOT_DATA = ("__MACOSX", "__pycache__")


@dataclass
class Folder:
    """The files of a folder and of all folders in it, by what they are. Links are followed, hidden files are not.

    Attributes:
        pictures: those that Pillow opens, and those of other forms, which are counted as undecodable.
    """

    path: str
    tars: list[str] = field(default_factory=list)
    parquets: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: str, split: str) -> "Folder":
        """The files of a split, where the folder has several; else all."""
        folder = cls(path)
        for file in _of_split(_walk(path), path, split):
            folder._place(file)
        return folder

    def _place(self, file: str) -> None:
        is_table = ends_in(file, TABLE_SUFFIXES) or Path(file).name.lower() == "captions.txt"
        places = {
            "tars": ends_in(file, TAR_SUFFIXES),
            "parquets": ends_in(file, PARQUET_SUFFIXES),
            "tables": is_table,
            "pictures": ends_in(file, (*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES)),
            "others": True,
        }
        getattr(self, next(name for name, is_it in places.items() if is_it)).append(file)

    def shards(self) -> list[str]:
        """The tar or parquet files; none where the data is of another form.

        Tables of what is in tar files, such as img2dataset writes beside them, are no shards.

        Raises:
            ConfigError: both tar files and parquet files of other pictures.
        """
        stems = {_stem(tar) for tar in self.tars}
        parquets = [parquet for parquet in self.parquets if _stem(parquet) not in stems and _holds_pictures(parquet)]
        if self.tars and parquets:
            fail(f"{self.path!r}: mixes parquet files and tar files; give one kind of data")
        shards = self.tars or parquets
        if shards and self.pictures:
            logger.warning("%s: %d pictures beside the shards are not read", self.path, len(self.pictures))
        return shards

    def metadata(self) -> list[tuple[str, str]]:
        """The tables that name pictures and captions, each with the folder that its paths start from.

        `metadata.*` are such tables, as 🤗 Datasets has them. So is a single one beside pictures that have no caption files.
        """
        tables = [table for table in (*self.tables, *self.parquets) if Path(table).stem.lower() == "metadata"]
        if not tables and self.pictures and not any(map(caption_file, self.pictures[:100])):
            tables = self.tables if len(self.tables) == 1 else []
        return [(table, self._start_of_paths(table)) for table in tables]

    def _start_of_paths(self, table: str) -> str:
        """The folder in which the first picture of a table lies."""
        own = str(Path(table).parent)
        paths = filter(None, map(path_field, read_table(table)[:10]))
        for path in paths:
            found = [picture for picture in self.pictures if picture.endswith(f"{os.sep}{os.path.normpath(path)}")]
            if found and not os.path.exists(os.path.join(own, path)):
                return found[0].removesuffix(f"{os.sep}{os.path.normpath(path)}")
        return own

    def explain_nothing(self) -> str:
        """Why there is nothing to read, for a message."""
        if self.parquets:
            columns = ", ".join(pyarrow.parquet.read_schema(self.parquets[0]).names[:10])
            return f"the parquet files hold no pictures (columns {columns}): img2dataset downloads what their addresses name"
        archives = [Path(file).name for file in self.others if ends_in(file, (".zip", ".7z", ".rar"))]
        if archives:
            return f"{archives[0]} has to be unpacked"
        wanted = ", ".join((*SHARD_SUFFIXES, *IMAGE_SUFFIXES[:7]))
        return f"holds no file that ends in {wanted} or another ending of pictures"


def is_saved_data_set(path: str) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written a folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def caption_file(picture: str) -> Path | None:
    """The file beside a picture that holds its caption."""
    stem = os.path.splitext(picture)[0]
    suffixes = (".txt", ".TXT", ".caption", ".json")
    return next((Path(stem + suffix) for suffix in suffixes if os.path.isfile(stem + suffix)), None)


def _walk(path: str) -> list[str]:
    """All files of a folder, in order; no folder twice, however links lead to it."""
    files, seen = [], set()
    for folder, names, contents in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in NOT_DATA)
        files += [os.path.join(folder, name) for name in sorted(contents) if not name.startswith(".")]
    return files


def _of_split(files: list[str], path: str, split: str) -> list[str]:
    """The files of a split, by the first folder or file name that begins with one; all where less than two splits are named."""
    named = {file: _split_of(os.path.relpath(file, path)) for file in files}
    found = set(named.values()) - {None}
    if len(found) < 2 or split not in found:
        return files
    others = ", ".join(sorted(name for name in found if name and name != split))
    logger.warning("%s: reads the split %r; the files of %s are left out", path, split, others)
    return [file for file, name in named.items() if name in (None, split)]


def _split_of(relative: str) -> str | None:
    """The split that a folder is named after, or a shard's name begins with, such as `train-00001.tar`."""
    *folders, name = Path(relative).parts
    words = [folder.lower() for folder in folders]
    if ends_in(name, SHARD_SUFFIXES) and (prefix := re.match(r"([A-Za-z]+)[-_.\d]", name)):
        words.append(prefix[1].lower())
    return next((split for word in words for split, names in SPLITS.items() if word in names), None)


def _stem(path: str) -> str:
    return Path(path).name.partition(".")[0]


def _holds_pictures(parquet: str) -> bool:
    """Whether a parquet file has a column of bytes, of structs, or of paths to pictures."""
    try:
        schema = pyarrow.parquet.read_schema(parquet)
    except (OSError, pyarrow.ArrowException):
        return True  # a damaged shard is counted as one
    return any(map(_may_be_picture, schema.types)) or not {name.lower() for name in schema.names}.isdisjoint(IMAGE_KEYS)


def _may_be_picture(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_list(kind) or types.is_large_list(kind):
        return _may_be_picture(kind.value_type)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind)
