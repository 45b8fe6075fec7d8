"""Where image-text pairs come from: tar shards, parquet, image folders, Hub data sets, scenes, each as one 🤗 Datasets stream.

The rows of a stream are dicts of undecoded fields, so that a bad picture or caption is the business of the one sample it is in.
Of tars, parquet files and folders a row has its `"__key__"` and, as `"__url__"`, its shard. A row that stands for unreadable
data has the cause as `"__error__"`.
"""

import glob
import logging
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow.parquet

from training.errors import ConfigError, naming
from training.scenes import sample_scene

logger = logging.getLogger(__name__)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Seconds to wait before a shard that could not be read is opened again.
RETRY_SECONDS = (1, 5, 25)
# An epoch of scenes: shards x scenes in each. The supply is endless; another epoch draws the same again in another order.
SCENE_SHARDS, SCENES_PER_SHARD = 1024, 1024


def open_stream(spec: str, split: str = "train", seed: int = 0) -> datasets.IterableDataset:
    """Open a data source as a stream of undecoded rows, in the order of its shards.

    Args:
        spec: `scenes`; files or folders, with braces and globs; or a Hub id.
        split: the split of a Hub data set or a clip-benchmark folder, and of scenes.
        seed: of the scenes.

    Raises:
        ConfigError: nothing is there, or it holds no known kind of file.
    """
    if spec == "scenes":
        return _scenes(split, seed)
    paths = [path for pattern in expand_braces(spec) for path in _expand(pattern, spec, split)]
    if not paths:
        with naming("Hub data set", spec):
            paths = _hub_shards(spec, split)
            if not paths:
                return _with_undecoded_images(datasets.load_dataset(spec, split=split, streaming=True))
    kinds = sorted({_kind(path) for path in paths})
    if len(kinds) > 1:
        raise ConfigError(f"{spec!r}: mixes {' and '.join(kinds)}; give one kind of data")
    if kinds == ["tar files"]:
        return datasets.IterableDataset.from_generator(_read_shards, gen_kwargs={"paths": paths, "read": _read_tar})
    if kinds == ["parquet files"]:
        return datasets.IterableDataset.from_generator(_read_shards, gen_kwargs={"paths": paths, "read": _read_parquet})
    return _image_folders(paths)


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


def clip_benchmark_split(folder: Path, split: str) -> Path | None:
    """The folder of a split in clip-benchmark's local layout (`<root>/<split>/nshards.txt`), or None for another folder."""
    return folder / split if (folder / split / "nshards.txt").is_file() else None


def _expand(pattern: str, spec: str, split: str) -> list[str]:
    """The files or image folders that a path or glob stands for; none where it can only be a Hub id."""
    if glob.has_magic(pattern):
        filesystem, path = fsspec.core.url_to_fs(pattern)
        remote = "://" in pattern
        found = [filesystem.unstrip_protocol(p) for p in filesystem.glob(path)] if remote else glob.glob(pattern)
        if not found:
            raise ConfigError(f"{spec!r}: no file matches {pattern!r}")
        return sorted(found)
    if "://" in pattern:
        return [pattern]
    path = Path(pattern)
    if path.is_dir():
        path = clip_benchmark_split(path, split) or path
        shards = [str(p) for suffix in (*TAR_SUFFIXES, ".parquet") for p in sorted(path.glob(f"*{suffix}"))]
        return shards or [str(path)]
    if path.exists():
        return [pattern]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", pattern) and not pattern.endswith((*TAR_SUFFIXES, ".parquet")) and pattern[0] != ".":
        return []
    raise ConfigError(f"{spec!r}: there is no {pattern!r}")


def _hub_shards(name: str, split: str) -> list[str]:
    """The tar or parquet files of a Hub data set, to be read as any others; none where it is of another kind."""
    files = datasets.load_dataset_builder(name).config.data_files or {}
    paths = [str(path) for path in files.get(split, [])]
    return paths if all(path.endswith((*TAR_SUFFIXES, ".parquet")) for path in paths) else []


def _kind(path: str) -> str:
    if path.endswith(TAR_SUFFIXES):
        return "tar files"
    if path.endswith(".parquet"):
        return "parquet files"
    if Path(path).is_dir():
        return "image folders"
    raise ConfigError(f"{path!r}: must be a folder or end in {', '.join((*TAR_SUFFIXES, '.parquet'))}")


def _scenes(split: str, seed: int) -> datasets.IterableDataset:
    gen_kwargs = {"shards": list(range(SCENE_SHARDS)), "split": split, "seed": seed}
    return datasets.IterableDataset.from_generator(_sample_scenes, gen_kwargs=gen_kwargs)


def _sample_scenes(shards: list[int], split: str, seed: int) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for index in range(shard * SCENES_PER_SHARD, (shard + 1) * SCENES_PER_SHARD):
            yield {"__key__": f"{split}-{index:08d}", "scene": sample_scene(index, seed=seed, split=split)}


class _Lost:
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


_lost = _Lost()


def _read_shards(paths: list[str], read: Callable[[str], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The rows of shards, one after the other.

    After a failure that may pass, of a network or a disk, a shard is opened again, after growing waits, and read on from where
    it was. What stays unreadable of a shard is one row with an `__error__`.
    """
    for path in paths:
        patience = _lost.patience(path)
        num_rows, waits = 0, patience
        while True:
            try:
                for row in islice(read(path), num_rows, None):
                    yield row
                    num_rows, waits, _lost.in_a_row = num_rows + 1, patience, 0
                break
            except Exception as error:  # fsspec passes on what the clients of its file systems raise
                may_pass = isinstance(error, OSError) or "://" in path
                if not (waits and may_pass):
                    logger.warning("%s: the rest of this shard is unreadable (%s)", path, error)
                    _lost.add(path)
                    yield {"__error__": "shard_unreadable", "__url__": path}
                    break
                logger.warning("%s: %s; trying again in %d s", path, error, waits[0])
                time.sleep(waits[0])
                waits = waits[1:]


def _read_tar(path: str) -> Iterator[dict[str, Any]]:
    """Samples of a webdataset shard: files that share a key, the base name up to its first dot. Extensions are lower-cased."""
    sample: dict[str, Any] = {}
    with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not member.isfile() or not stem:
                continue
            if sample and sample["__key__"] != key:
                yield sample
                sample = {}
            content = tar.extractfile(member).read()
            if len(content) < member.size:
                raise tarfile.ReadError("unexpected end of data")
            sample |= {"__key__": key, "__url__": path, extension.lower(): content}
    if sample:
        yield sample


def _read_parquet(path: str) -> Iterator[dict[str, Any]]:
    number = 0
    with fsspec.open(path, "rb") as file:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield {"__key__": f"{path}#{number}", "__url__": path} | row
                number += 1


def _image_folders(paths: list[str]) -> datasets.IterableDataset:
    """Folders with a `metadata.jsonl` or `.csv` (as 🤗 Datasets has them), or with a caption file beside each picture."""
    if any(list(Path(path).glob("metadata.*")) for path in paths):
        patterns = [f"{path}/**" for path in paths]
        return _with_undecoded_images(datasets.load_dataset("imagefolder", data_files=patterns, split="train", streaming=True))
    pictures = [p for path in paths for p in sorted(Path(path).rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        wanted = ", ".join((*TAR_SUFFIXES, ".parquet", *IMAGE_SUFFIXES))
        raise ConfigError(f"{paths[0]!r}: holds no file that ends in {wanted}")
    # A shard is what one worker reads at a time; a few hundred pictures make enough of them to shuffle and to split.
    shards = [[str(p) for p in pictures[i : i + 256]] for i in range(0, len(pictures), 256)]
    return datasets.IterableDataset.from_generator(_read_pictures, gen_kwargs={"shards": shards})


def _read_pictures(shards: list[list[str]]) -> Iterator[dict[str, Any]]:
    for picture in (Path(p) for shard in shards for p in shard):
        caption = picture.with_suffix(".txt")
        sample = {"__key__": str(picture), "__url__": str(picture.parent)}
        try:
            sample |= {picture.suffix.lower()[1:]: picture.read_bytes()}
            yield sample | ({"txt": caption.read_bytes()} if caption.is_file() else {})
        except OSError:
            yield sample | {"__error__": "file_unreadable"}


def _with_undecoded_images(stream: datasets.IterableDataset) -> datasets.IterableDataset:
    for name, feature in (stream.features or {}).items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(name, datasets.Image(decode=False))
    return stream
