"""What lies in a folder for open_clip's `local-dir:`, or beside a file of weights: the file, and open_clip_config.json."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, fail
from .open_clip_families import CLIP, Family, check_same_architecture, family_of, known_models, named_model_cfg
from .open_clip_pixels import other_size
from .tokens import lacks_tokenizer

OPEN_CLIP_WEIGHTS, OPEN_CLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
# The order in which open_clip looks for them in a folder.
PREFERRED = (
    OPEN_CLIP_WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)


@dataclass(frozen=True)
class OpenClipModel:
    """Where a model of open_clip lies, and what is said of it.

    Attributes:
        weights: the file.
        name: what messages call the architecture.
        model_cfg: open_clip's architecture.
        preprocess_cfg: how open_clip prepares pictures; None where no file says so.
    """

    weights: Path
    name: str
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any] | None

    @property
    def family(self) -> Family:
        """What kind of model it is."""
        return family_of(self.model_cfg)

    def remarks(self, image_size: int) -> list[str]:
        """What was taken otherwise than a file says, or without a file that says it."""
        if self.preprocess_cfg is None:
            return [f"pictures are prepared {self.family.preparation}: no {OPEN_CLIP_CONFIG} lies beside the weights"]
        if size := other_size(self.preprocess_cfg, image_size):
            return [f"pictures have {image_size} pixels, the model's size, which open_clip takes too: not {size}"]
        return []

    def tokenizer(self) -> str:
        """The folder or Hub id of its own tokenizer; empty where it is CLIP's."""
        folder, named = str(self.weights.parent), self.model_cfg["text_cfg"].get("hf_tokenizer_name") or ""
        if self.preprocess_cfg is None:
            return "" if self.family is CLIP else named
        return named if lacks_tokenizer(folder) else folder


def find_open_clip_model(source: str | Path, model_name: str = "") -> OpenClipModel:
    """The model in a folder, or in a file of weights.

    Args:
        model_name: the architecture, where no open_clip_config.json says it. It must not contradict one.

    Raises:
        ConfigError: there is no such file, or nothing says what it is of, or two say different things.
    """
    source = Path(source).expanduser()
    weights = _weights_in(source) if source.is_dir() else source
    if not weights.is_file():
        fail(f"{source}: no such file")
    file = weights.with_name(OPEN_CLIP_CONFIG)
    if file.is_file():
        model_cfg, preprocess_cfg = _read_config(file)
        if model_name:
            check_same_architecture(model_name, model_cfg, str(file))
        return OpenClipModel(weights, model_name or OPEN_CLIP_CONFIG, model_cfg, preprocess_cfg)
    if not model_name:
        fail(f"--open_clip_model: say what {source} is of, {known_models()}; no {OPEN_CLIP_CONFIG} lies beside it")
    return OpenClipModel(weights, model_name, named_model_cfg(model_name), None)


def _weights_in(folder: Path) -> Path:
    """The file of weights that open_clip would take, or the only one."""
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        hint = ": it is a model of Transformers, for open_clip by --to open_clip" if (folder / "config.json").is_file() else ""
        fail(f"{folder}: is a folder without {OPEN_CLIP_CONFIG}{hint or '; give a file of weights'}")
    found = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    found = [path for path in found if not re.search(r"-\d{5}-of-\d{5}$", path.stem)] + sorted(folder.glob("*.index.json"))
    if preferred := [folder / name for name in PREFERRED if (folder / name).is_file()]:
        return preferred[0]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        fail(f"{folder}: give one file of weights; it has {names}")
    return found[0]


def _read_config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model_cfg, preprocess_cfg = content["model_cfg"], content.get("preprocess_cfg") or {}
        if not all(isinstance(part, dict) for part in (model_cfg, model_cfg["text_cfg"], preprocess_cfg)):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{file}: is no configuration of open_clip, with model_cfg and preprocess_cfg") from None
    return model_cfg, preprocess_cfg
