"""Where image-text pairs come from: files, Hub data sets, drawn scenes, each as one 🤗 Datasets stream and how to treat it.

The rows of a stream are dicts of undecoded fields, so that a bad picture or caption is the business of the one sample it is in.
Of tars, parquet files and folders a row has its `"__key__"` and, as `"__url__"`, its shard. A row that stands for unreadable
data has the cause as `"__error__"`.
"""

import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec

from ..errors import ConfigError, as_config_error
from . import scene_source
from .clip_benchmark import ClipBenchmarkFolder
from .decoding import PairDecoder
from .shards import SHARD_KINDS, read_shards
from .source import Source
from .specs import IMAGE_SUFFIXES, SHARD_SUFFIXES, expand_braces, is_hub_id

# Sources that are made here, by the name that stands for them. All others are read.
GENERATED: dict[str, Callable[[str, int], Source]] = {scene_source.NAME: scene_source.open_scenes}


def open_source(spec: str, *, split: str = "train", seed: int = 0, image_key: str = "", caption_key: str = "") -> Source:
    """Open a data source.

    Args:
        spec: files or folders, with braces and globs; a Hub id; or the name of a generated source (`scenes`).
        split: the split of a Hub data set, of a clip-benchmark folder, or of a generated source.
        seed: of a generated source.
        image_key, caption_key: as in [`PairDecoder`].

    Raises:
        ConfigError: nothing is there, or it holds no known kind of file.
    """
    if spec in GENERATED:
        return GENERATED[spec](split, seed)
    return Source(spec, open_files(spec, split), PairDecoder(image_key, caption_key))


def open_files(spec: str, split: str = "train") -> datasets.IterableDataset:
    """The rows of files, folders, or a Hub data set. Arguments and errors as of [`open_source`]."""
    paths = [path for pattern in expand_braces(spec) for path in _expand(pattern, spec, split)]
    if not paths:
        with as_config_error("Hub data set", spec):
            paths = _hub_shards(spec, split)
            if not paths:
                return _with_undecoded_images(datasets.load_dataset(spec, split=split, streaming=True))
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        raise ConfigError(f"{spec!r}: mixes {' and '.join(sorted(kinds))}; give one kind of data")
    for kind in SHARD_KINDS:
        if kinds == {kind.title}:
            return datasets.IterableDataset.from_generator(read_shards, gen_kwargs={"paths": paths, "read": kind.read})
    return _image_folders(paths)


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
        layout = ClipBenchmarkFolder.find(pattern)
        path = path / split if layout and layout.has(split) else path
        shards = [str(p) for suffix in SHARD_SUFFIXES for p in sorted(path.glob(f"*{suffix}"))]
        return shards or [str(path)]
    if path.exists():
        return [pattern]
    if is_hub_id(pattern):
        return []
    raise ConfigError(f"{spec!r}: there is no {pattern!r}")


def _hub_shards(name: str, split: str) -> list[str]:
    """The tar or parquet files of a Hub data set, to be read as any others; none where it is of another kind."""
    files = datasets.load_dataset_builder(name).config.data_files or {}
    paths = [str(path) for path in files.get(split, [])]
    return paths if all(path.endswith(SHARD_SUFFIXES) for path in paths) else []


def _kind(path: str) -> str:
    for kind in SHARD_KINDS:
        if path.endswith(kind.suffixes):
            return kind.title
    if Path(path).is_dir():
        return "image folders"
    raise ConfigError(f"{path!r}: must be a folder or end in {', '.join(SHARD_SUFFIXES)}")


def _image_folders(paths: list[str]) -> datasets.IterableDataset:
    """Folders with a `metadata.jsonl` or `.csv` (as 🤗 Datasets has them), or with a caption file beside each picture."""
    if any(list(Path(path).glob("metadata.*")) for path in paths):
        patterns = [f"{path}/**" for path in paths]
        return _with_undecoded_images(datasets.load_dataset("imagefolder", data_files=patterns, split="train", streaming=True))
    pictures = [p for path in paths for p in sorted(Path(path).rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        wanted = ", ".join((*SHARD_SUFFIXES, *IMAGE_SUFFIXES))
        raise ConfigError(f"{paths[0]!r}: holds no file that ends in {wanted}")
    # A shard is what one worker reads at a time; a few hundred pictures make enough of them to shuffle and to split.
    shards = [[str(p) for p in pictures[i : i + 256]] for i in range(0, len(pictures), 256)]
    return datasets.IterableDataset.from_generator(_read_pictures, gen_kwargs={"shards": shards})


def _read_pictures(shards: list[list[str]]) -> Iterator[dict[str, Any]]:
    for picture in (Path(p) for shard in shards for p in shard):
        caption = picture.with_suffix(".txt")
        sample: dict[str, Any] = {"__key__": str(picture), "__url__": str(picture.parent)}
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
