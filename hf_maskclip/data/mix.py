"""How training data is named: one source, or a mix of several with their weights."""

import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import fail

WEIGHTED = re.compile(r"(?P<data>.+):(?P<weight>\d+(\.\d*)?|\.\d+)")
COMMA = re.compile(r",(?![^{}]*\})")  # outside of braces
FORM = "[{data: a/*.tar, weight: 3}, {data: b.parquet, weight: 1}]"


class MixPart(NamedTuple):
    """A source of a mix.

    Attributes:
        data: what names it, as [`open_source`] takes it.
        weight: its part of the samples, in proportion to the weights of the others.
        image_key, caption_key: of its rows; empty: those of the run.
    """

    data: str
    weight: float = 1.0
    image_key: str = ""
    caption_key: str = ""


def read_mix(train_data: str | list[Any]) -> list[MixPart]:
    """The sources that an option names: one by its name, several as `a.tar:3,b.tar:1` or as a list of mappings.

    Raises:
        ConfigError: another form, an unknown key, or a weight that is not a number above 0.
    """
    if isinstance(train_data, list):
        if not train_data:
            fail(f"train_data=[]: must name at least one source, such as {FORM}")
        return [_part(given, f"train_data[{number}]") for number, given in enumerate(train_data)]
    words = [train_data] if os.path.exists(train_data) else COMMA.split(train_data)
    weighted = [WEIGHTED.fullmatch(word.strip()) for word in words]
    if len(words) == 1 or not any(weighted):
        return [MixPart(train_data)]
    for word, match in zip(words, weighted, strict=True):
        if not match:
            fail(f"train_data={train_data!r}: {word.strip()!r} has no weight; each source has one, as in a.tar:3,b.tar:1")
    return [_part(word.strip(), "train_data") for word in words]


def _part(given: Any, name: str) -> MixPart:
    if isinstance(given, str):
        match = None if os.path.exists(given) else WEIGHTED.fullmatch(given)
        given = {"data": match["data"], "weight": float(match["weight"])} if match else {"data": given}
    if not isinstance(given, Mapping):
        fail(f"{name}={given!r}: must be a mapping, as in {FORM}")
    if unknown := given.keys() - set(MixPart._fields):
        fail(f"{name}: unknown key {min(map(str, unknown))!r}: must be one of {', '.join(MixPart._fields)}")
    for key in ("data", "image_key", "caption_key"):
        if not isinstance(value := given.get(key, ""), str) or (key == "data" and not value):
            fail(f"{name}: {key}={value!r}: must be text" + (" that names a source" if key == "data" else ""))
    weight = given.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        fail(f"{name}: weight={weight!r}: must be a number above 0")
    return MixPart(**{**given, "weight": float(weight)})


def specs_of(train_data: str | list[Any]) -> list[str]:
    """What names each source."""
    return [part.data for part in read_mix(train_data)]


def mix_in_words(train_data: str | list[Any]) -> str:
    """The source, or the sources with their shares."""
    parts = read_mix(train_data)
    total = sum(part.weight for part in parts)
    return ", ".join(f"{part.data} ({part.weight / total:.0%})" for part in parts) if len(parts) > 1 else parts[0].data
