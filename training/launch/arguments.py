"""Options from the words of a command line, and from a YAML file: each as the type that its field has."""

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from hf_maskclip.errors import as_config_error, fail
from training.launch.option_names import OTHER_NAMES

TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", dict: "a mapping such as {name: pgs}", list: "a list"}
Fields = dict[str, dataclasses.Field]  # of a dataclass, by the names that its options have


def read_options(arguments: list[str], known: Fields) -> dict[str, Any]:
    """Read `--config FILE` and `--key value` pairs, those of the command line winning.

    Raises:
        ConfigError: unknown key, missing value, or wrong type.
    """
    given = _parse(arguments, known)
    values: dict[str, Any] = {}
    if config_file := given.pop("config", None):
        values |= _read_yaml(Path(config_file))
    for key, value in given.items():
        with as_config_error(key, value):
            values[key] = value if _is_text(known[key].type, value) else yaml.safe_load(value)
    return {key: _typed(key, value, _field(key, known).type) for key, value in values.items()}


def _is_text(allowed: Any, word: str) -> bool:
    """Whether a word of the command line is text, not YAML; a name may have YAML's signs, such as the braces of a path."""
    return allowed is str or (allowed == str | list and not re.match(r"\[\s*\{", word))


def _parse(arguments: list[str], known: Fields) -> dict[str, str]:
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            fail(f"unexpected argument {word!r}: options are given as --key value")
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if key != "config":
            _field(key, known)
        if not equals:
            is_switch = key != "config" and _field(key, known).type is bool and (not rest or rest[0].startswith("--"))
            if not rest and not is_switch:
                fail(f"--{key}: needs a value")
            value = "true" if is_switch else rest.pop(0)
        given[key] = value
    return given


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        fail(f"config={str(path)!r}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        fail(f"config={str(path)!r}: not valid YAML ({' '.join(str(error).split())})")
    if not isinstance(values, dict):
        fail(f"config={str(path)!r}: must hold 'key: value' lines")
    if "compute_environment" in values or "distributed_type" in values:
        fail(f"config={str(path)!r}: is for accelerate launch --config_file {path}; --config takes a recipe")
    return values


def _field(key: str, known: Fields) -> dataclasses.Field:
    if key not in known:
        meant = next((name for name, others in OTHER_NAMES.items() if key.lower() in others.split()), None)
        close = [meant] if meant else difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        about = f" ({known[close[0]].metadata['help']})" if meant else ""
        hint = f"did you mean {close[0]!r}{about}?" if close else f"must be one of {', '.join(known)}"
        fail(f"unknown option {key!r}: {hint}")
    return known[key]


def _typed(key: str, value: Any, allowed: Any) -> Any:
    """The value as the type of its option. Raises ConfigError with what is allowed."""
    if typing.get_origin(allowed) is Literal:
        # YAML reads a bare `no` as False.
        value = "no" if value is False else value
        if value not in typing.get_args(allowed):
            fail(f"{key}={value!r}: must be one of {', '.join(map(repr, typing.get_args(allowed)))}")
        return value
    if allowed is bool:
        if not isinstance(value, bool):
            fail(f"{key}={value!r}: must be true or false")
        return value
    if allowed is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3, which has no dot, as a string
        except ValueError:
            pass
    if allowed is int and isinstance(value, float) and value.is_integer():
        return int(value)
    types_allowed = typing.get_args(allowed) if isinstance(allowed, types.UnionType) else (allowed,)
    if not isinstance(value, types_allowed) or isinstance(value, bool):
        fail(f"{key}={value!r}: must be {' or '.join(TYPE_NAMES[t] for t in types_allowed)}")
    return value
