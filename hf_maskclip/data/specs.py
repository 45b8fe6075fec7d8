"""How data is named: by paths with braces, by the endings of files, or by the id of a Hub data set."""

import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PARQUET_SUFFIXES = (".parquet",)
SHARD_SUFFIXES = (*TAR_SUFFIXES, *PARQUET_SUFFIXES)
# Of pictures: what Pillow opens by itself, and what it does not. The latter are read to be counted.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".jpx", ".jpf", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".icns", ".psd", ".qoi", ".pcx", ".dds"),
)
OTHER_IMAGE_SUFFIXES = (".heic", ".heif", ".hif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw")


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
    if name.count("/") != 1 or name.endswith(SHARD_SUFFIXES) or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith(".")
