"""LoRA (arXiv 2106.09685), by PEFT: small matrices beside the layers of a model are trained, and its own weights are not.

PEFT is imported where it is used, for it is an extra.
"""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from hf_maskclip.errors import fail
from training.model.copying import unwrapped
from training.model.freezing import PARTS, tower_of

if TYPE_CHECKING:
    from peft import LoraConfig

FOLDER, WEIGHTS = "adapter", "adapter_model.safetensors"  # the latter is PEFT's name
PREFIX = "base_model.model."  # of PEFT's keys


def check_peft(rank: int) -> None:
    """Raise a ConfigError where PEFT is not installed."""
    if find_spec("peft") is None:
        fail(f"lora_rank={rank}: needs PEFT (pip install 'peft>=0.18')")


class Adapters:
    """Adapters on the attention and the MLP of a model's towers; everything else in it is frozen, the logit scale too.

    They change nothing at first. Then they add to a layer's weights a matrix of their rank.

    Args:
        model: gets the adapters in place, and stays of its class.
        rank: of the adapters; their alpha is the same, so that what they add is not scaled.
        frozen_tower: `vision` or `text`, which gets none; of another name both get them.
        base: a folder or Hub id of the weights that the adapters are for.
    """

    def __init__(self, model: PreTrainedModel, rank: int, frozen_tower: str, base: str):
        from peft import get_peft_model

        self.rank, self.base = rank, base
        self.layers = layers_of(model, [tower for tower in PARTS if tower != frozen_tower])
        self.adapted = get_peft_model(model, self._config())

    def _config(self) -> "LoraConfig":
        from peft import LoraConfig

        return LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=self.layers)

    def merged(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of a model with these adapters, in which what they add is part of its own weights."""
        with unwrapped(self.adapted.get_base_model()):
            adapted = copy.deepcopy(self.adapted)
        adapted.get_base_model().load_state_dict(model.state_dict())
        return adapted.merge_and_unload()

    def save(self, model: PreTrainedModel, folder: Path, share: float = 1.0) -> None:
        """Write the adapters of a model in PEFT's form, which `PeftModel.from_pretrained(base_model, folder)` loads.

        Args:
            share: of what the adapters add to the weights.
        """
        from peft import get_peft_model_state_dict

        keyed = {f"{PREFIX}{key}": weight for key, weight in model.state_dict().items()}
        adapters = get_peft_model_state_dict(self.adapted, keyed, save_embedding_layers=False)
        scaled = {key: weight * share if ".lora_B." in key else weight for key, weight in adapters.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: weight.cpu().contiguous() for key, weight in scaled.items()}, folder / WEIGHTS, {"format": "pt"})
        config = self._config()
        config.base_model_name_or_path, config.inference_mode = self.base, True
        config.save_pretrained(str(folder))

    def keep_in_checkpoints(self, model: PreTrainedModel, accelerator: Accelerator) -> None:
        """Let Accelerate's checkpoints hold the adapters of the model in place of all weights, which are there merged."""
        from peft import set_peft_model_state_dict

        def save(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
            weights.clear()
            if accelerator.is_main_process:
                self.save(model, Path(folder) / FOLDER)

        def load(models: list[nn.Module], folder: str) -> None:
            models.clear()
            set_peft_model_state_dict(self.adapted, load_file(Path(folder) / FOLDER / WEIGHTS))

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)


def layers_of(model: nn.Module, towers: list[str]) -> str:
    """A pattern for the names of all linear layers in the encoders of some towers: attention and MLP, no head.

    Raises:
        ConfigError: there is none.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".encoder." in name]
    kinds = {name.rpartition(".")[2] for name in linear if tower_of(name) in towers}
    if not kinds:
        fail(f"lora_rank: a {type(model).__name__} has no linear layers in the encoders of {' and '.join(towers)}")
    models = "|".join(PARTS[tower][0] for tower in towers)
    return rf"({models})\.(.*\.)?encoder\..*\.({'|'.join(sorted(kinds))})"
