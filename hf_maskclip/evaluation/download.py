"""Getting the data of the papers' tables: what an evaluation reads, and no more, with its size said first."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from ..errors import as_config_error


@dataclass(frozen=True)
class Missing:
    """A part of a data set that is not there.

    Args:
        place: the folder, or the file, that it is to be.
        source: a data set on the Hub, or an address.
        files: patterns of the files of a data set on the Hub; of an address none.
    """

    place: Path
    source: str
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.files:
            return f"{self.place}: {self.source}"
        wanted = " ".join(f'--include "{pattern}"' for pattern in self.files)
        return f"{self.place}: hf download {self.source} --repo-type dataset {wanted} --local-dir {self.place}"


def merged(parts: Iterable[Missing]) -> list[Missing]:
    """Each place once, with all that is wanted of it."""
    by_place: dict[tuple[Path, str], dict[str, None]] = {}
    for part in parts:
        by_place.setdefault((part.place, part.source), {}).update(dict.fromkeys(part.files))
    return [Missing(place, source, tuple(files)) for (place, source), files in by_place.items()]


def size_of(part: Missing) -> int:
    """The bytes that have still to come. Raises ConfigError where the server does not answer."""
    with as_config_error("download", part.source):
        if part.files:
            return sum(file.file_size or 0 for file in _from_hub(part, dry_run=True) if file.will_download)
        import fsspec

        return fsspec.open(part.source).fs.size(part.source) or 0


def fetch(part: Missing) -> None:
    """Bring it to its place; what has come already is not fetched again. A zip file is unpacked. Raises ConfigError."""
    from torchvision.datasets.utils import download_and_extract_archive, download_url

    with as_config_error("download", part.source):
        if part.files:
            _from_hub(part)
        elif part.source.endswith(".zip"):
            download_and_extract_archive(part.source, part.place.parent, remove_finished=True)
        else:
            download_url(part.source, part.place.parent, part.place.name)


def _from_hub(part: Missing, **options):
    return snapshot_download(part.source, repo_type="dataset", local_dir=part.place, allow_patterns=list(part.files), **options)
