"""The files of the study's pairs: public packages that are fetched, checked and read, and tars that are written.

A package is a `.deb` of Debian or a `.tgz` of npm. Neither needs the tool that fetched it to be read.
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hf_maskclip.errors import fail

# The content of each file of a sample, by its suffix.
Sample = dict[str, bytes]


@dataclass(frozen=True)
class Package:
    """A package: the command that fetches it into the working directory, a glob for its file, and the file's SHA256.

    It is a glob because Debian's tool writes an epoch before the version, and mirrors do not.
    """

    command: tuple[str, ...]
    pattern: str
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """The package's file in a folder, downloaded where it is not yet there. Raises ConfigError for the tool or the file."""
        file = self._find(folder) or self._download(folder)
        with file.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        if sha256 != self.sha256:
            fail(f"{file}: has the SHA256 {sha256}, not {self.sha256}; remove the file, or put the right one there")
        return file

    def _find(self, folder: Path) -> Path | None:
        return min(folder.glob(self.pattern), default=None)

    def _download(self, folder: Path) -> Path:
        tool, *arguments = self.command
        by_hand = f"without it, put {self.pattern} into {folder} by hand"
        program = shutil.which(tool)
        if program is None:
            fail(f"{tool}: is not installed, and {' '.join(self.command)} needs it; {by_hand}")
        finished = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, errors="replace")
        if finished.returncode != 0:
            fail(f"{' '.join(self.command)}: failed ({' '.join(finished.stderr.split())[:300]}); {by_hand}")
        return self._find(folder) or fail(f"{' '.join(self.command)}: gave no {self.pattern}; {by_hand}")


def read_package(file: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Files of a package whose whole name matches a regular expression, as (what its group matched, content), in their order.

    Links are left out.
    """
    with file.open("rb") as content:
        if file.suffix == ".deb":
            _seek_data(content, file)
        with tarfile.open(fileobj=content, mode="r|*") as tar:
            for member in tar:
                name = re.fullmatch(pattern, member.name.removeprefix("./"))
                if name and member.isreg():
                    yield name.group(1), tar.extractfile(member).read()


def _seek_data(content: BinaryIO, file: Path) -> None:
    """Go to the tar of the installed files: a `.deb` is an `ar` archive, whose members have headers of 60 bytes."""
    if content.read(8) != b"!<arch>\n":
        fail(f"{file}: is no Debian package")
    while len(header := content.read(60)) == 60:
        if header.startswith(b"data.tar"):
            return
        size = int(header[48:58])
        content.seek(size + size % 2, io.SEEK_CUR)  # members start at even places
    fail(f"{file}: has no data.tar")


def share(key: str) -> float:
    """A number in [0, 1) that is a function of the key alone, for orders and draws that are the same everywhere."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48


def as_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


def write_tar(file: Path, samples: Sequence[Sample], prefix: str, first: int = 0) -> None:
    """Write samples under keys that are `prefix` and a number of six digits, counted from `first`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in enumerate(samples, first):
            for suffix, content in sample.items():
                member = tarfile.TarInfo(f"{prefix}_{number:06d}.{suffix}")  # its time is 0
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_shards(folder: Path, split: str, samples: Sequence[Sample], prefix: str, per_shard: int = 512) -> None:
    """Write `<split>-000000.tar` and so on; shards of a former run are replaced."""
    for former in folder.glob(f"{split}-??????.tar"):
        former.unlink()
    for number, start in enumerate(range(0, len(samples), per_shard)):
        write_tar(folder / f"{split}-{number:06d}.tar", samples[start : start + per_shard], prefix, start)


def write_benchmark(folder: Path, texts: Mapping[str, Sequence[str]], splits: Mapping[str, Sequence[Sample]]) -> None:
    """Write a data set in clip-benchmark's layout: its text files as lines, and one shard for each split."""
    for split, samples in splits.items():
        write_tar(folder / split / "0.tar", samples, "s")
        (folder / split / "nshards.txt").write_text("1\n", encoding="utf-8")
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
