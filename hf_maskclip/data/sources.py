"""Where image-text pairs come from: files, Hub data sets, drawn scenes, each as one 🤗 Datasets stream and how to treat it.

The rows of a stream are dicts of undecoded fields, so that a bad picture or caption is the business of the one sample it is in.
Of tars, parquet files and folders a row has its `"__key__"` and, as `"__url__"`, its shard. A row that stands for unreadable
data has the cause as `"__error__"`.
"""

import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec

from ..errors import as_config_error, fail
from . import scene_source
from .clip_benchmark import ClipBenchmarkFolder
from .decoding import PairDecoder
from .folders import Folder, caption_file, is_saved_data_set
from .remote import storage_options
from .shards import SHARD_KINDS, read_shards
from .source import Source
from .specs import IMAGE_SUFFIXES, SHARD_SUFFIXES, TABLE_SUFFIXES, HubDataSet, ends_in, hub_data_set_of, patterns_of
from .tables import parts_of, read_parts

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


@dataclass
class Found:
    """What a path stands for: a kind of data, and its shards, which the reader of that kind takes."""

    kind: str
    shards: list[Any]


def open_files(spec: str, split: str = "train") -> datasets.IterableDataset:
    """The rows of files, folders, or a Hub data set. Arguments and errors as of [`open_source`]."""
    if hub := hub_data_set_of(spec):
        return _open_hub(spec, hub, split)
    return _open_paths([path for pattern in patterns_of(spec) for path in _matches(pattern, spec)], spec, split)


def _open_paths(paths: list[str], spec: str, split: str) -> datasets.IterableDataset:
    found = [what for path in paths for what in _look_at(path, spec, split)]
    kinds = {what.kind for what in found}
    if len(kinds) > 1:
        fail(f"{spec!r}: mixes {' and '.join(sorted(kinds))}; give one kind of data")
    shards = list({str(shard): shard for what in found for shard in what.shards}.values())
    (kind,) = kinds
    if not shards:
        fail(f"{spec!r}: the {kind} have no rows")
    return READERS[kind](shards, split)


def _matches(pattern: str, spec: str) -> list[str]:
    """The files and folders that a path or glob stands for. Raises ConfigError where there is none."""
    if pattern.startswith("pipe:"):
        fail(f"{pattern!r}: commands are not run; name the files, such as s3://bucket/{{000..099}}.tar or https://host/000.tar")
    # What follows a ? in an address of the web is no part of the path, such as the signature of a signed one.
    has_magic = glob.has_magic(pattern.partition("?")[0] if pattern.startswith(("http://", "https://")) else pattern)
    if "://" in pattern:
        found = _remote_matches(pattern, spec, has_magic)
    elif os.path.exists(pattern):
        found = [pattern]
    elif has_magic:
        found = sorted(glob.glob(pattern, recursive=True))
    else:
        fail(f"{spec!r}: there is no {pattern!r}")
    if not found:
        fail(f"{spec!r}: no file matches {pattern!r}")
    return found


def _remote_matches(pattern: str, spec: str, has_magic: bool) -> list[str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern, **storage_options(pattern))
        return sorted(filesystem.unstrip_protocol(p) for p in filesystem.glob(path)) if has_magic else [pattern]
    except Exception as error:  # no client of such a system is installed, or what the clients raise
        fail(f"{spec!r}: cannot be read ({type(error).__name__}: {error})")


def _look_at(path: str, spec: str, split: str) -> list[Found]:
    """What a file, an address or a folder is."""
    for kind in SHARD_KINDS:
        if ends_in(path, kind.suffixes):
            return [Found(kind.title, [path])]
    if ends_in(path, TABLE_SUFFIXES):
        return [Found("tables", list(parts_of(path)))]
    if not Path(path).is_dir():
        wanted = ", ".join((*SHARD_SUFFIXES, *TABLE_SUFFIXES))
        if "://" in path:
            files = f"{path.rstrip('/')}/{{000..099}}.tar"
            fail(f"{path!r}: an address must end in {wanted}; of a folder name the files, as in {files}")
        fail(f"{path!r}: must be a folder or end in {wanted}")
    if is_saved_data_set(path):
        return [Found("saved data sets", [path])]
    layout = ClipBenchmarkFolder.find(path)
    folder = Folder.of(f"{path}/{split}" if layout and layout.has(split) else path, split)
    shards = folder.shards()
    if shards:
        return [found for shard in shards for found in _look_at(shard, spec, split)]
    if tables := folder.metadata():
        return [Found("tables", parts_of(table, start)) for table, start in tables]
    if not folder.pictures:
        fail(f"{path!r}: {folder.explain_nothing()}")
    # A shard is what one worker reads at a time; a few hundred pictures make enough of them to shuffle and to split.
    return [Found("image folders", [folder.pictures[i : i + 256] for i in range(0, len(folder.pictures), 256)])]


def _open_shards(read: Callable[[str], Iterator[dict[str, Any]]]) -> Callable[[list[Any], str], datasets.IterableDataset]:
    return lambda paths, split: datasets.IterableDataset.from_generator(read_shards, gen_kwargs={"paths": paths, "read": read})


def _open_tables(parts: list[Any], split: str) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(read_parts, gen_kwargs={"parts": parts})


def _open_pictures(shards: list[Any], split: str) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(_read_pictures, gen_kwargs={"shards": shards})


def _open_saved(paths: list[Any], split: str) -> datasets.IterableDataset:
    """Data sets that `save_to_disk` wrote."""
    parts = []
    for path in paths:
        with as_config_error("saved data set", path):
            saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                fail(f"{path!r}: has the splits {', '.join(saved)}, not {split!r}")
            saved = saved[split]
        parts.append(_with_undecoded_images(saved))
    whole = datasets.concatenate_datasets(parts)
    return whole.to_iterable_dataset(num_shards=max(1, len(whole) // 256))


READERS: dict[str, Callable[[list[Any], str], datasets.IterableDataset]] = {
    **{kind.title: _open_shards(kind.read) for kind in SHARD_KINDS},
    "tables": _open_tables,
    "image folders": _open_pictures,
    "saved data sets": _open_saved,
}


def _read_pictures(shards: list[list[str]]) -> Iterator[dict[str, Any]]:
    for picture in (Path(p) for shard in shards for p in shard):
        sample: dict[str, Any] = {"__key__": str(picture), "__url__": f"{picture.parent}/"}
        try:
            suffix = picture.suffix.lower()
            sample |= {suffix[1:] if suffix in IMAGE_SUFFIXES else "image": picture.read_bytes()}
            caption = caption_file(str(picture))
            field = "json" if caption and caption.suffix.lower() == ".json" else "txt"
            yield sample | ({field: caption.read_bytes()} if caption else {})
        except OSError:
            yield sample | {"__error__": "file_unreadable"}


def _open_hub(spec: str, hub: HubDataSet, split: str) -> datasets.IterableDataset:
    """A data set on the Hub; its tar or parquet files are read as any others."""
    split = hub.split or split
    with as_config_error("Hub data set", spec):
        try:
            files = datasets.load_dataset_builder(hub.id, name=hub.config).config.data_files or {}
        except ValueError as error:
            if hub.config is None and "config name is missing" in str(error).lower():
                names = datasets.get_dataset_config_names(hub.id)
                fail(f"{spec!r}: has the configurations {', '.join(names)}; name one, such as {hub.id}:{names[0]}")
            raise
        paths = [str(path) for path in files.get(split, [])]
        if paths and all(ends_in(path, SHARD_SUFFIXES) for path in paths):
            return _open_paths(paths, spec, split)
        return _with_undecoded_images(datasets.load_dataset(hub.id, name=hub.config, split=split, streaming=True))


def _with_undecoded_images(data):
    for name, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data
