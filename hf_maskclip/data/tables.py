"""Tables of pictures and captions: CSV and TSV, JSON lines, JSON, and a `metadata.parquet`.

Paths start from the table's folder. A table is held in memory, and read in parts, so that several workers share it.
"""

import codecs
import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet

from ..errors import fail
from .decoding import IMAGE_KEYS
from .remote import storage_options

Row = dict[str, Any]
Part = tuple[str, str, int]  # the table, the folder that its paths start from, and its first row
ROWS_OF_A_PART = 256  # some hundred rows make enough parts to shuffle and to split
DELIMITERS = ",\t;|"
csv.field_size_limit(2**31 - 1)


def parts_of(path: str, folder: str | None = None) -> list[Part]:
    """The parts of a table.

    Args:
        folder: that its paths start from; by default its own.

    Raises:
        ConfigError: the file is no table.
    """
    count = len(read_table(path))
    return [(path, folder or str(Path(path).parent), first) for first in range(0, count, ROWS_OF_A_PART)]


def read_parts(parts: list[Part]) -> Iterator[Row]:
    """The rows of parts of tables. Each has its `"__key__"`, and as `"__url__"` its table."""
    for path, folder, first in parts:
        for number, row in enumerate(read_table(path)[first : first + ROWS_OF_A_PART], start=first):
            yield {"__key__": f"{path}#{number}", "__url__": f"{folder}/{Path(path).name}"} | row


@lru_cache(maxsize=16)
def read_table(path: str) -> list[Row]:
    """All rows of a table. A line that is no JSON is a row with an `__error__`.

    Raises:
        ConfigError: the file is no table.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    with fsspec.open(path, "rb", **storage_options(path)) as file:
        content = file.read()
    # Bytes that are no UTF-8 stay in the one row that they are in.
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    text = content.decode(encoding, errors="surrogateescape")
    if suffix == ".json" and text.lstrip()[:1] in "[{":
        try:
            return _rows_of_json(json.loads(text), path)
        except json.JSONDecodeError:
            pass  # JSON lines under another name
    if suffix in (".jsonl", ".ndjson", ".json"):
        return [_json_row(line) for line in text.splitlines() if line.strip()]
    return _rows_of_csv(text)


def _rows_of_csv(text: str) -> list[Row]:
    header = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=header.count)
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter, skipinitialspace=True)
    return [{key.strip(): value for key, value in row.items() if key is not None} for row in reader]


def _json_row(line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    return row if isinstance(row, dict) else {"__error__": "json_undecodable"}


def _rows_of_json(content: Any, path: str) -> list[Row]:
    """A list of rows, or COCO's two lists of pictures and annotations."""
    if isinstance(content, dict) and "images" in content and "annotations" in content:
        captions = defaultdict(list)
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation.get("caption"))
        return [{"file_name": image["file_name"], "caption": captions[image["id"]]} for image in content["images"]]
    if isinstance(content, list):
        return [row if isinstance(row, dict) else {"__error__": "json_undecodable"} for row in content]
    if isinstance(content, dict):
        return [content]
    fail(f"{path!r}: must be a list of rows such as {{'file_name': ..., 'text': ...}}, or annotations in COCO's form")


def path_field(row: Row) -> str | None:
    """The path of a row's picture, in the first field that may hold one."""
    names = {name.lower(): value for name, value in row.items()}
    return next((names[key] for key in IMAGE_KEYS if isinstance(names.get(key), str)), None)
