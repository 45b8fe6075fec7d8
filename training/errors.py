"""How a run says that it cannot start, or cannot go on: one line that names the thing, its value, and what is allowed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class ConfigError(ValueError):
    """An option, or the data it names, that cannot be used. Raised before training starts."""


class TrainingStopped(RuntimeError):
    """A training that cannot go on. What it had learnt is in its last checkpoint, which the message names."""


def fail(message: str) -> NoReturn:
    raise ConfigError(message)


@contextmanager
def naming(option: str, value: str) -> Iterator[None]:
    """Turn the errors of loading what an option names into one line that names the option and its value."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        fail(f"{option}={value!r}: cannot be loaded ({' '.join(str(error).split())})")
