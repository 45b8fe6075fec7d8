"""Modules of a user's own, which make known what they hold: `--import my_masks` in front of a mask that is named."""

import os
import sys
from importlib import import_module

from .errors import ConfigError


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
