"""clip-benchmark's layout of data sets, on a disk or anywhere that fsspec reads, and what its files say."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import fsspec
from huggingface_hub.errors import HfHubHTTPError

from ..errors import fail
from .remote import storage_options
from .specs import SHARD_SUFFIXES, is_hub_id

SPLITS = ("train", "validation", "test")
TAR_END = 1024  # zero bytes that end a tar file; one that is cut between two samples lacks nothing else


@dataclass
class ClipBenchmarkFolder:
    """A folder in clip-benchmark's layout, on a disk or anywhere that fsspec reads, such as `hf://datasets/clip-benchmark/...`.

    `dataset_type.txt` (`retrieval`, `multilabel`, or absent: classification), `classnames.txt`,
    `zeroshot_classification_templates.txt`, and for each split `nshards.txt` and the shards `0.tar`, `1.tar`, ...
    """

    root: str

    def __post_init__(self):
        self.root = self.root.rstrip("/")
        self.name = self.root.rpartition("/")[2].removeprefix("wds_")
        self.kind = (self.text("dataset_type.txt") or "classification").strip().lower()

    @classmethod
    def find(cls, data: str) -> "ClipBenchmarkFolder | None":
        """The folder, or the Hub data set, in this layout that `data` names; None where it is of another form."""
        if data.endswith(SHARD_SUFFIXES) or not (is_hub_id(data) or "://" in data or Path(data).is_dir()):
            return None
        folder = cls(f"hf://datasets/{data}" if is_hub_id(data) else data)
        if any(folder.text(name) is not None for name in ("dataset_type.txt", "classnames.txt")):
            return folder
        return folder if any(folder.has(split) for split in SPLITS) else None

    def has(self, split: str) -> bool:
        return self.text(f"{split}/nshards.txt") is not None

    def text(self, name: str) -> str | None:
        """The content of a file, or None where there is no such file. Raises ConfigError for a server that does not answer."""
        try:
            with fsspec.open(f"{self.root}/{name}", "r", encoding="utf-8", **storage_options(self.root)) as file:
                return file.read()
        except FileNotFoundError:
            return None
        except Exception as error:  # fsspec passes on what the clients of its file systems raise
            is_answer = not self.root.startswith("hf://") or isinstance(error, HfHubHTTPError)
            what = f"{name} cannot be read" if is_answer else "the Hub cannot be reached"
            fail(f"{self.root}: {what} ({type(error).__name__}: {str(error).split('. ')[0]})")

    def shards(self, split: str) -> list[str]:
        """The shards of a split. Raises ConfigError for a split or a shard that is not there, or not there to its end."""
        filesystem, root = fsspec.core.url_to_fs(self.root, **storage_options(self.root))
        count = self.text(f"{split}/nshards.txt")
        if count is None:
            found = [name for name in SPLITS if self.has(name)]
            fail(f"split={split!r}: {self.root} has {', '.join(found) or 'no folder with an nshards.txt'}")
        if not count.strip().isdigit():
            fail(f"{self.root}/{split}/nshards.txt: {count.strip()!r} is no number of shards")
        names = [f"{split}/{number}.tar" for number in range(int(count))]
        for name in names:
            if not filesystem.exists(f"{root}/{name}"):
                fail(f"{self.root}: {name} is missing; its nshards.txt says {len(names)} shards")
            if any(filesystem.tail(f"{root}/{name}", TAR_END)):
                fail(f"{self.root}: {name} is cut off, it does not end as a tar file does")
        return [f"{self.root}/{name}" for name in names]

    def fingerprint(self, split: str, shards: list[str]) -> str:
        """A hash that changes whenever one of the split's shards does."""
        filesystem, _ = fsspec.core.url_to_fs(self.root, **storage_options(self.root))
        about = [filesystem.info(fsspec.core.url_to_fs(shard)[1]) for shard in shards]
        return hashlib.sha256(json.dumps([self.root, split, about], default=str).encode()).hexdigest()
