"""Model cards: every number in one is read from the files of a run."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.specs import is_hub_id
from ..errors import as_config_error, fail
from ..evaluation.report import read_results
from ..models.patch_mask_registry import find_patch_mask, resolve_patch_mask

HUB_DATA = "hf://datasets/"
TEMPLATE = files(__package__).joinpath("template.md")
PICTURES = {"masks.png": "Training pictures under the masks", "curves.png": "Curves of training"}
# What a card says of the training, of the options in config.yaml or a recipe.
OPTIONS = (
    "model",
    "train_data",
    "patch_mask",
    "mask_schedule",
    "text_mask",
    "samples_seen",
    "max_steps",
    "batch_size",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "unmasked_tuning_steps",
    "ema_momentum",
    "mixed_precision",
    "seed",
)


def card_of_run(run_dir: Path, repo_id: str, license: str) -> ModelCard:
    """The card of a finished run; every number in it is from the run's files."""
    summary = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    vision = json.loads((run_dir / "export" / "config.json").read_text(encoding="utf-8"))["vision_config"]
    mask = _resolved(vision["patch_mask"])
    evaluations = sorted(run_dir.glob("eval*.json"))
    tables = read_results(evaluations)
    records = {k: v for path in evaluations for k, v in json.loads(path.read_text(encoding="utf-8"))["results"].items()}
    measured = {
        "pairs seen": f"{summary['samples_seen']:,} in {summary['steps']:,} steps",
        "seconds of training": summary["train_seconds"],
    }
    return _render(
        repo_id,
        mask,
        card_data(repo_id, license, mask, _without_local_names(config, run_dir), records),
        model=_size(vision),
        training=_training(config | {"patch_mask": mask}) | measured,
        samples_seen=summary["samples_seen"],
        pictures={name: caption for name, caption in PICTURES.items() if (run_dir / name).is_file()},
        results="\n".join(table.markdown().replace("## ", "### ") for table in tables),
        hashes=sorted({record["model_hash"] for record in records.values()}),
        is_trained=True,
    )


def _without_local_names(config: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The options without data and model that lie on a disk: their path, or its first folder, is here or above the run."""
    places = (Path.cwd(), *run_dir.resolve().parents)

    def is_local(name: str) -> bool:
        return not name.startswith(HUB_DATA) and any((place / name.split("/")[0]).exists() for place in places)

    return {key: "" if key in ("train_data", "model") and is_local(str(value)) else value for key, value in config.items()}


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
        card_data(repo_id, "apache-2.0", mask, config, {}),
        training=_training(config | {"patch_mask": mask}),
        recipe=f"training/recipes/{recipe.name}",
        is_trained=False,
    )


def card_data(
    repo_id: str, license: str, mask: dict[str, Any], config: dict[str, Any], records: dict[str, dict[str, Any]]
) -> ModelCardData:
    """The front matter: what the Hub searches by, and the measured results as a `model-index`."""
    data, model = (str(config.get(name, "")) for name in ("train_data", "model"))
    hub_data = "/".join(data.removeprefix(HUB_DATA).split("/")[:2]) if data.startswith(HUB_DATA) else data
    results = [result for name, record in records.items() for result in _eval_results(name, record)]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "hf_maskclip", f"patch-mask-{mask['name']}"],
        datasets=[hub_data] if is_hub_id(hub_data) else None,
        base_model=model if is_hub_id(model) else None,
        model_name=repo_id.split("/")[1] if results else None,
        eval_results=results or None,
    )


def _eval_results(name: str, record: dict[str, Any]) -> list[EvalResult]:
    data = {"dataset_type": Path(record["data"]).name, "dataset_config": record["column"], "dataset_split": record["split"]}
    data["dataset_name"] = f"{record['column']}, {record['family'].replace('_', ' ')}"
    shares = {key: value for key, value in record.items() if isinstance(value, float) and 0 <= value <= 1}
    task = record["task"].replace("_", "-")
    return [
        EvalResult(task_type=task, task_name=name, metric_type=metric, metric_name=metric, metric_value=value, **data)
        for metric, value in shares.items()
    ]


def check_card(card: ModelCard) -> ModelCard:
    """Return a card whose front matter can be read back and has what the Hub asks for; without asking it.

    Raises:
        ConfigError: a key is missing.
    """
    front_matter = ModelCard(str(card)).data.to_dict()
    needed = ("license", "library_name", "pipeline_tag", "tags")
    if absent := [key for key in needed if not front_matter.get(key)]:
        fail(f"model card: its front matter has no {', '.join(absent)}")
    return card


def _render(repo_id: str, mask: dict[str, Any], data: ModelCardData, **about: Any) -> ModelCard:
    about |= {
        "repo_id": repo_id,
        "name": repo_id.split("/")[1],
        "mask": mask["name"],
        "paper": find_patch_mask(mask["name"]).citation,
    }
    return ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), **about)


def _training(config: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): config[name] for name in OPTIONS if config.get(name) not in (None, "", 0, "none")}


def _size(vision: dict[str, Any]) -> str:
    layers, width = vision["num_hidden_layers"], vision["hidden_size"]
    return f"{layers} layers x {width}, {vision['image_size']} pixels, {vision['patch_size']}-pixel patches"


def _resolved(patch_mask: dict[str, Any] | str) -> dict[str, Any]:
    with as_config_error("patch_mask", patch_mask):
        return resolve_patch_mask(patch_mask)
