"""Files of weights that training programs leave: read without running code, and without the names that wrappers add."""

import argparse
import json
import pickle
import re
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import ConfigError

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # anywhere in a name
OUTER = ("model.", "clip.", "text.")  # at its beginning
HOLDERS = ("state_dict", "model", "model_state_dict", "module")
EMA = ("state_dict_ema", "model_ema", "ema", "ema_state_dict")


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        weights: without the wrappers of training.
        averages: the keys of the averages that lie beside them.
    """

    weights: dict[str, torch.Tensor]
    averages: list[str]


def read_checkpoint(path: Path, key: str = "") -> Checkpoint:
    """The weights in a file, and which averages lie beside them.

    Args:
        path: `.pt`, `.safetensors`, or the `.index.json` of a sharded checkpoint.
        key: which of the file's sets of weights, such as `state_dict_ema`; by default the trained ones.

    Raises:
        ConfigError: it holds none, or other objects, or weights that are no numbers.
    """
    content = _read(path)
    weights = _plain_names(path, _weights_of(path, content, key))
    for name, weight in weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ConfigError(f"{path}: {name} has NaN or infinite values: the training had diverged")
    return Checkpoint(weights, [key for key in EMA if isinstance(content, dict) and isinstance(content.get(key), dict)])


def _read(path: Path) -> Any:
    if re.search(r"-\d{5}-of-\d{5}\.\w+$", path.name):
        raise ConfigError(f"{path}: is a shard of a checkpoint: give its .index.json")
    if path.name.endswith(".index.json"):
        try:
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ConfigError(f"{path}: is no index of a sharded checkpoint, it has no weight_map") from None
        return {key: value for name in sorted(names) for key, value in _read_file(path.with_name(Path(name).name)).items()}
    return _read_file(path)


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path}: is damaged or cut off ({error})") from None
    try:
        with torch.serialization.safe_globals(_plain_values()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {_reason(str(error))}") from None


def _plain_values() -> list:
    """What holds plain values and runs nothing: numbers of NumPy, such as learning rates, options, and paths."""
    scalar = np.float64(0).__reduce__()[0]
    numbers = [np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]
    both = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*numbers, *both, argparse.Namespace, OrderedDict, defaultdict, PosixPath]


def _reason(error: str) -> str:
    if "TorchScript" in error:
        return "is a TorchScript archive, as OpenAI's own files; those models are on the Hub as openai/clip-vit-*"
    found = re.search(r"GLOBAL ([\w.]+)", error)
    what = f"it needs {found[1]}, which could run code" if found else "it may be damaged or cut off"
    return (
        f"holds more than weights, or is no checkpoint, and is not unpickled: {what}; "
        'where it was trained, save its weights alone: torch.save(checkpoint["state_dict"], "weights.pt")'
    )


def _weights_of(path: Path, content: Any, key: str) -> dict[str, torch.Tensor]:
    if key:
        if not isinstance(content, dict) or not isinstance(content.get(key), dict):
            raise ConfigError(f"{path}: has no weights under {key!r}")
        content = content[key]
    for _ in range(3):
        inner = [k for k in HOLDERS if isinstance(content, dict) and isinstance(content.get(k), dict)]
        content = content[inner[0]] if inner else content
    tensors = isinstance(content, dict) and content and all(isinstance(value, torch.Tensor) for value in content.values())
    if not tensors:
        raise ConfigError(f"{path}: holds no weights, nor a state_dict of weights")
    return content


def _plain_names(path: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    plain: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        while prefix := next((prefix for prefix in OUTER if short.startswith(prefix)), ""):
            short = short.removeprefix(prefix)
        if short in plain:
            raise ConfigError(f"{path}: has {short} twice, once as {name}")
        plain[short] = weight
    return plain
