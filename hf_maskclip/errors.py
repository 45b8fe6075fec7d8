"""How a program says what it cannot use: one line that names the thing, its value, and what is allowed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import yaml
from safetensors import SafetensorError


class ConfigError(ValueError):
    """An option, a file or a data set that cannot be used. Programs print it as one line, without a traceback."""


class TrainingStopped(RuntimeError):
    """A training that cannot go on. What it had learnt is in its last checkpoint, which the message names."""


def fail(message: str) -> NoReturn:
    """Raise a ConfigError."""
    raise ConfigError(message)


@contextmanager
def as_config_error(name: str, value: Any) -> Iterator[None]:
    """Turn the errors of using what an option names into a ConfigError that has the option and its value.

    Errors of other kinds are bugs, and keep their traceback.
    """
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, yaml.YAMLError, SafetensorError) as error:
        raise ConfigError(f"{name}={str(value)!r}: cannot be used ({' '.join(str(error).split())})") from error
