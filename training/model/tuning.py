"""What a run trains of a model that others have trained, and what it keeps of it: a frozen tower, adapters, first weights."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from hf_maskclip.errors import fail
from hf_maskclip.evaluation.encoder import hash_of_weights
from hf_maskclip.texts import family_of
from training.config import TrainingConfig
from training.model.adapters import FOLDER, Adapters, check_peft
from training.model.freezing import freeze
from training.model.interpolation import Weights, between
from training.model.presets import PRESETS, build_model
from training.saving.record import read_record


@dataclass
class Tuning:
    """What of a model is trained, and how its result is made.

    Attributes:
        first_hash: of the weights that the run began with; `""` for random ones.
        frozen: modules that stay as they are, in evaluation mode: without dropout, and in CLIP's own precision.
        adapters: what is trained in place of the model's own weights, or None.
        first: the weights that the run began with, where the result lies between them and the tuned ones.
        share: of the tuned weights in the result.
    """

    first_hash: str = ""
    frozen: list[nn.Module] = field(default_factory=list)
    adapters: Adapters | None = None
    first: Weights | None = None
    share: float = 1.0

    def merged(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model under its own keys: a copy with its adapters merged, where it has some."""
        return self.adapters.merged(model) if self.adapters else model

    def result(self, model: PreTrainedModel) -> PreTrainedModel:
        """What of a tuned model is evaluated and exported."""
        merged = self.merged(model)
        return merged if self.first is None else between(self.first, merged, self.share)

    def save_adapters(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the adapters of a tuned model into a folder; on the first weights they give the result."""
        if self.adapters:
            self.adapters.save(model, folder / FOLDER, self.share)


def check_tuning(config: TrainingConfig) -> None:
    """Raise a ConfigError for options of tuning where there is nothing to tune, or where nothing would come of them."""
    rates = {"vision": config.learning_rate_vision, "text": config.learning_rate_text}
    is_used = {
        f"freeze={config.freeze!r}": config.freeze != "none",
        f"lora_rank={config.lora_rank}": config.lora_rank,
        f"interpolate_weights={config.interpolate_weights}": config.interpolate_weights != 1,
    }
    for option in (option for option, is_on in is_used.items() if is_on and config.model in PRESETS):
        fail(f"{option}: model={config.model!r} begins with random weights; give a folder or Hub id by --model")
    if rate := rates.get(config.freeze):
        fail(f"learning_rate_{config.freeze}={rate}: nothing of that tower learns, for freeze={config.freeze!r}; leave out one")
    if config.lora_rank:
        check_peft(config.lora_rank)


def prepare_tuning(model: PreTrainedModel, config: TrainingConfig, checkpoint: Path | None) -> Tuning:
    """Freeze, and add adapters to, a model that was loaded from `--model` or from a checkpoint, in place.

    A checkpoint has the tuned weights. The first ones are read again, where they are needed.

    Raises:
        ConfigError: the first weights are no longer those that the run began with.
    """
    if config.model in PRESETS:
        return Tuning()
    first, first_hash = None, read_record(checkpoint).get("first_weights", "") if checkpoint else ""
    if not checkpoint:
        first = model.state_dict()
        first_hash = hash_of_weights(first)
    elif config.lora_rank or config.interpolate_weights != 1:
        first = read_first_weights(config.model, first_hash, checkpoint)
    frozen = freeze(model, config.freeze)
    kept = None
    if config.interpolate_weights != 1:
        kept = {key: weight.clone() for key, weight in first.items()}
    adapters = None
    if config.lora_rank:
        check_has_bias(model, config)
        model.load_state_dict(first)  # a checkpoint has the adapters merged into its own
        adapters = Adapters(model, config.lora_rank, config.freeze, config.model)
    return Tuning(first_hash, frozen, adapters, kept, config.interpolate_weights)


def check_has_bias(model: PreTrainedModel, config: TrainingConfig) -> None:
    """Raise a ConfigError for a loss that needs a weight which neither the model nor adapters have."""
    if config.loss == "sigmoid" and family_of(model.config).loss != "sigmoid":
        fail(f"lora_rank={config.lora_rank} and loss='sigmoid': adapters hold no bias, and this model has none; leave out one")


def read_first_weights(name: str, first_hash: str, checkpoint: Path) -> Weights:
    """The weights of a folder or Hub id, which have to be those that the run of a checkpoint began with."""
    weights = build_model(name, "none", None).state_dict()
    if (found := hash_of_weights(weights)) != first_hash:
        fail(
            f"resume: model={name!r} has other weights (hash {found}) than {checkpoint} began with ({first_hash or 'unknown'})"
        )
    return weights


def tuning_in_words(config: TrainingConfig, model: PreTrainedModel, sees_whole_pictures: bool) -> str:
    """What of a model is trained, for the line of a run's start; empty where all of it is."""
    parts = []
    if config.freeze != "none":
        sees = {True: ", which sees whole pictures", False: ", which sees what the patch mask leaves"}[sees_whole_pictures]
        parts.append(f"frozen {config.freeze} tower{sees if config.freeze == 'vision' else ''}")
    if config.lora_rank:
        parts.append(f"adapters of rank {config.lora_rank}")
    if not parts:
        return ""
    return f" ({', '.join(parts)}: {model.num_parameters(only_trainable=True) / 1e6:.1f} million are trained)"
