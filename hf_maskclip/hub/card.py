"""Model cards: every number in one is read from the files of a run."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file

from ..data.mix import specs_of
from ..data.specs import HUB_DATA, hub_ids_of, is_hub_id
from ..dual_encoders import load_dual_encoder
from ..errors import as_config_error, fail
from ..evaluation.report import make_tables
from ..evaluation.report_files import read_result_file
from ..models.patch_mask_registry import find_patch_mask, resolve_patch_mask
from .card_model import words_of_model
from .card_results import check_own, eval_results, notes_on, read_records
from .licenses import check_license

WEIGHTS = "model.safetensors"
TEMPLATE = files(__package__).joinpath("template.md")
PICTURES = {"masks.png": "Training pictures under the masks", "curves.png": "Curves of the training"}
EXAMPLE = ("example.json", "example.png")  # a picture with captions, which a run leaves
# What a card says of the training, of the options in config.yaml or a recipe.
OPTIONS = (
    "model",
    "train_data",
    "patch_mask",
    "views",
    "image_size",
    "phases",
    "mask_schedule",
    "text_mask",
    "text_tokens",
    "freeze",
    "lora_rank",
    "samples_seen",
    "max_steps",
    "batch_size",
    "learning_rate",
    "learning_rate_vision",
    "learning_rate_text",
    "warmup_steps",
    "weight_decay",
    "unmasked_tuning_steps",
    "ema_momentum",
    "interpolate_weights",
    "mixed_precision",
    "seed",
)


def card_of_run(run_dir: Path, repo_id: str, license: str) -> ModelCard:
    """The card of a finished run; every number in it is from the run's files.

    Raises:
        ConfigError: a result beside them is of other weights, or not on whole pictures.
    """
    summary = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    architecture = json.loads((run_dir / "export" / "config.json").read_text(encoding="utf-8"))
    weights = _weights(run_dir / "export", architecture["model_type"])
    model, mask = words_of_model(architecture, weights), _resolved(architecture["vision_config"].get("patch_mask", "none"))
    files = [read_result_file(path) for path in sorted(run_dir.glob("eval*.json"))]
    check_own(files, weights)
    records = read_records(run_dir)
    name, example = repo_id.split("/")[1], _example(run_dir, repo_id)
    tables = [
        table.markdown().replace("## ", "### ") + "\n" + notes_on(table.family, table.source, [r for _, r in records])
        for table in make_tables(files, name=name)
    ]
    return _render(
        repo_id,
        mask,
        card_data(repo_id, license, mask, _hub_names(summary, config, run_dir), records, example, model.tag),
        model=model,
        example=example,
        training=_training(config | {"patch_mask": mask}) | _measured(summary),
        samples_seen=summary["samples_seen"],
        pictures={name: caption for name, caption in PICTURES.items() if (run_dir / name).is_file()},
        results="\n".join(tables),
        hashes=sorted({record["model_hash"] for _, record in records}),
        is_trained=True,
    )


def _weights(export: Path, model_type: str) -> dict[str, torch.Tensor]:
    """The weights under the names that evaluations hash. Some text towers are saved under others than they have in memory."""
    return load_file(export / WEIGHTS) if model_type == "clip" else load_dual_encoder(str(export), "none").state_dict()


def _measured(summary: dict[str, Any]) -> dict[str, str]:
    """What the run itself wrote down; an older one did not say on what it ran."""
    measured = {"pairs seen": f"{summary['samples_seen']:,} in {summary['steps']:,} steps"}
    measured["seconds of training"] = f"{summary['train_seconds']:,}"
    versions = summary.get("versions", {})
    return measured | {
        key: value
        for key, value in {
            "hardware": summary.get("hardware"),
            "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        }.items()
        if value
    }


class HubNames(NamedTuple):
    """What of a run lies on the Hub: the ids of its data sets and of the model that it began with."""

    data_sets: list[str]
    model: str


def _hub_names(summary: dict[str, Any], config: dict[str, Any], run_dir: Path) -> HubNames:
    """What the run found on the Hub; of an older run, which did not write it down, what nothing here speaks against.

    There a name goes whose path, or first folder, is here or above the run: it may have been a path.
    """
    if "hub" in summary:
        return HubNames(summary["hub"]["train_data"], summary["hub"]["model"] or "")
    places = (Path.cwd(), *run_dir.resolve().parents)

    def is_local(name: str) -> bool:
        return not name.startswith(HUB_DATA) and any((place / name.split("/")[0]).exists() for place in places)

    specs = [spec for spec in specs_of(config.get("train_data", "")) if not is_local(spec)]
    model = str(config.get("model", ""))
    return HubNames(hub_ids_of(specs), model if is_hub_id(model) and not is_local(model) else "")


def hub_names_of(config: dict[str, Any]) -> HubNames:
    """What options name on the Hub."""
    model = str(config.get("model", ""))
    return HubNames(hub_ids_of(specs_of(config.get("train_data", ""))), model if is_hub_id(model) else "")


def card_of_recipe(recipe: Path) -> ModelCard:
    """The card that a recipe's run would have: without a number, and it says that there are no weights."""
    with as_config_error("recipe", recipe):
        config = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        fail(f"recipe={str(recipe)!r}: must hold 'key: value' lines")
    mask = _resolved(config.get("patch_mask", "none"))
    repo_id = f"org/{recipe.stem}"
    return _render(
        repo_id,
        mask,
        card_data(repo_id, "apache-2.0", mask, hub_names_of(config), []),
        training=_training(config | {"patch_mask": mask}),
        recipe=f"training/recipes/{recipe.name}",
        is_trained=False,
    )


class ShownExample(NamedTuple):
    """A picture to classify: its address on the Hub, captions for it, its own first, and their scores in words."""

    address: str
    captions: list[str]
    scores: list[str]


def _example(run_dir: Path, repo_id: str) -> ShownExample | None:
    """What the run left to classify; None where it left nothing."""
    if not all((run_dir / name).is_file() for name in EXAMPLE):
        return None
    about = json.loads((run_dir / EXAMPLE[0]).read_text(encoding="utf-8"))
    scores = [f"{score:.0%} {caption}" for caption, score in about["scores"].items()]
    return ShownExample(f"https://huggingface.co/{repo_id}/resolve/main/{EXAMPLE[1]}", about["captions"], scores)


def card_data(
    repo_id: str,
    license: str,
    mask: dict[str, Any],
    hub: HubNames,
    records: list[tuple[str, dict[str, Any]]],
    example: ShownExample | None = None,
    family: str = "clip",
) -> ModelCardData:
    """The front matter: what the Hub searches by, the example for its page, and the measured results as a `model-index`."""
    results = [result for name, record in records for result in eval_results(name, record)]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=[family, "hf_maskclip", f"patch-mask-{mask['name']}"],
        datasets=hub.data_sets or None,
        base_model=hub.model or None,
        model_name=repo_id.split("/")[1] if results else None,
        eval_results=results or None,
        widget=[{"src": example.address, "candidate_labels": ", ".join(example.captions)}] if example else None,
    )


def check_card(card: ModelCard) -> ModelCard:
    """Return a card whose front matter can be read back and has what the Hub asks for; without asking it.

    Raises:
        ConfigError: a key is missing, or the Hub does not know the license.
    """
    front_matter = ModelCard(str(card)).data.to_dict()
    needed = ("license", "library_name", "pipeline_tag", "tags")
    if absent := [key for key in needed if not front_matter.get(key)]:
        fail(f"model card: its front matter has no {', '.join(absent)}")
    check_license(front_matter["license"])
    return card


def _render(repo_id: str, mask: dict[str, Any], data: ModelCardData, **about: Any) -> ModelCard:
    about |= {
        "repo_id": repo_id,
        "name": repo_id.split("/")[1],
        "mask": mask["name"],
        "paper": find_patch_mask(mask["name"]).citation,
    }
    return ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), **about)


def _training(config: dict[str, Any]) -> dict[str, str]:
    """The options that say how it was trained, as the cells of a table; what is off is left out, a seed of 0 is not."""
    unset = (None, "", "none", "one")
    chosen = {name: config[name] for name in OPTIONS if config.get(name) not in unset}
    if chosen.get("interpolate_weights") == 1:
        del chosen["interpolate_weights"]  # the result is the tuned weights
    return {name.replace("_", " "): _cell(name, value) for name, value in chosen.items() if value != 0 or name == "seed"}


def _cell(name: str, value: Any) -> str:
    if name == "warmup_steps" and value == -1:
        return "a tenth of the steps"
    if name == "interpolate_weights":
        return f"`{value}` of the tuned weights, the rest of those that it began with"
    if isinstance(value, list):  # of phases, or of sources
        return "; ".join(", ".join(f"{key} `{option}`" for key, option in phase.items()) for phase in value)
    if isinstance(value, dict):
        options = ", ".join(f"{key} {option}" for key, option in value.items() if key != "name")
        return f"`{value['name']}{': ' if options else ''}{options}`"
    return f"`{value}`"


def _resolved(patch_mask: dict[str, Any] | str) -> dict[str, Any]:
    with as_config_error("patch_mask", patch_mask):
        return resolve_patch_mask(patch_mask)
