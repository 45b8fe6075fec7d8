"""The file of an evaluation's results: looked at before any work, added to after each result, and gone on from."""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import as_config_error, fail

OF_A_RUN = ("steps", "samples_seen")


class ResultsFile:
    """A JSON file with one record for each result. What it holds stays.

    Args:
        path: it may hold results already, of the same weights.
        about: what it says besides the results.
        skip_existing: take also those results as they are whose data cannot be told from its former state.

    Raises:
        ConfigError: it cannot be written, or holds something that is not to be overwritten.
    """

    def __init__(self, path: str | os.PathLike, about: dict[str, Any], *, skip_existing: bool = False):
        self.path = Path(path).expanduser()
        self.skip_existing = skip_existing
        self._check_place()
        self.summary: dict[str, Any] = about | {"results": {}}
        if self.path.exists():
            self.summary = self._read()

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        return self.summary["results"]

    def check_model(self, model_hash: str) -> None:
        """Raise ConfigError where the file holds results of other weights."""
        others = sorted({str(record.get("model_hash")) for record in self.results.values()} - {model_hash})
        if others:
            fail(
                f"output={str(self.path)!r}: holds results of other weights ({others[0]}, not {model_hash}); give another file"
            )

    def finished(self, name: str, expected: dict[str, Any]) -> dict[str, Any] | None:
        """The record of a result that need not be computed again; None where there is none, or where data may have changed.

        Args:
            expected: what the record says of data and options.

        Raises:
            ConfigError: there is one of other data or options.
        """
        record = self.results.get(name)
        if record is None:
            return None
        for key, value in json.loads(json.dumps(expected)).items():
            if record.get(key) != value:
                held, asked = _shorts(record.get(key), value)
                fail(f"output={str(self.path)!r}: holds {name} with {key} {held}, and {asked} is asked; give another file")
        return record if self.skip_existing or expected.get("data_fingerprint") else None

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Write the results aside and rename them, so that the file is whole at any time."""
        self.results[name] = record
        with as_config_error("output", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_name(self.path.name + ".unfinished")
            unfinished.write_text(json.dumps(self.summary, indent=2) + "\n", encoding="utf-8")
            unfinished.replace(self.path)

    def _check_place(self) -> None:
        place = f"output={str(self.path)!r}"
        if self.path.is_dir():
            fail(f"{place}: is a folder; give a file in it, such as {self.path / 'eval.json'}")
        if self.path.exists() and not self.path.is_file():
            fail(f"{place}: is no ordinary file")
        folder = next(parent for parent in self.path.absolute().parents if parent.exists())
        if not folder.is_dir():
            fail(f"{place}: {folder} is no folder")
        if not os.access(folder, os.W_OK) or (self.path.exists() and not os.access(self.path, os.W_OK)):
            fail(f"{place}: cannot be written")

    def _read(self) -> dict[str, Any]:
        place = f"output={str(self.path)!r}"
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            records = list(content["results"].values())
            is_results = all(isinstance(record, dict) and "family" in record for record in records)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            is_results = False
        if not is_results:
            fail(f"{place}: exists and holds no results of an evaluation; give another file")
        if any(key in content for key in OF_A_RUN):
            fail(f"{place}: holds the results of a training run itself; give another file, such as eval_more.json beside it")
        return content


def _shorts(held: Any, asked: Any) -> tuple[str, str]:
    """Two values that differ, in few letters; of two dicts only what differs."""
    if isinstance(held, dict) and isinstance(asked, dict):
        both = [(key, value) for key, value in held.items() if key in asked and asked[key] == value]
        held, asked = ({key: value for key, value in one.items() if (key, value) not in both} for one in (held, asked))
    return _short(held), _short(asked)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
