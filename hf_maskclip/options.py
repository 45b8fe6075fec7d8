"""What the options of all programs share: the names that they choose from, and `--import`.

Nothing heavy is imported here, so that --help answers at once.
"""

import logging
import os
import sys
from importlib import import_module
from pathlib import Path

from .errors import ConfigError

TASKS = ("zero_shot_classification", "retrieval", "linear_probe", "compositionality")
SUITES = ("scenes", "paper")
CLIP_TOKENIZER = "openai/clip-vit-base-patch32"
QUICKSTART_MODEL = "runs/quickstart/export"
SOLVERS = ("gradient_descent", "logistic_regression")


def built_in_masks() -> list[str]:
    """The names of this package's patch masks: each has a file `models/patch_masking_<name>.py`."""
    prefix = "patch_masking_"
    return sorted(path.stem.removeprefix(prefix) for path in Path(__file__).with_name("models").glob(f"{prefix}*.py"))


def quiet_deepspeed() -> None:
    """Keep one line of DeepSpeed, which saving weights imports where it is installed, out of what a command prints.

    It says that there is no accelerator. No command uses DeepSpeed, and its logger writes to stdout.
    """
    logging.getLogger("DeepSpeed").addFilter(_is_to_be_shown)


def _is_to_be_shown(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


def import_module_of_user(name: str) -> None:
    """Import a module by its dotted name, from the current folder or from where Python looks.

    Raises:
        ConfigError: there is no such module, or it fails as it is imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        import_module(name)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"--import {name}: cannot be imported ({type(error).__name__}: {error})") from error
