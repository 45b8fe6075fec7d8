"""A run as a model repository: a card of what was measured, the files, and the push to the Hub."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData

from .evaluation.report import read_results
from .models.patch_mask_registry import resolve_patch_mask

TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"
PICTURES = {"masks.png": "Training pictures under the masks", "curves.png": "Loss and learning rate over training"}
WEIGHTS = "model.safetensors"
HUB_ID = r"(\w[\w.-]*/[\w.-]+)"


class Paper(NamedTuple):
    key: str
    title: str
    authors: str
    arxiv: str


MAE = Paper("he2021mae", "Masked Autoencoders Are Scalable Vision Learners", "He, Kaiming and others", "2111.06377")
PAPERS = {
    "none": Paper(
        "radford2021clip",
        "Learning Transferable Visual Models From Natural Language Supervision",
        "Radford, Alec and others",
        "2103.00020",
    ),
    "random": Paper("li2022flip", "Scaling Language-Image Pre-training via Masking", "Li, Yanghao and others", "2212.00794"),
    "gaussian": Paper(
        "liang2024glip", "Centered Masking for Language-Image Pre-Training", "Liang, Mingliang and Larson, Martha", "2403.15837"
    ),
    "block": MAE,
    "grid": MAE,
    "cluster": Paper(
        "wei2024cluster",
        "Efficient Vision-Language Pre-training by Cluster Masking",
        "Wei, Zihao and Pan, Zixuan and Owens, Andrew",
        "2405.08815",
    ),
    "attentive": Paper("yang2022aclip", "Attentive Mask CLIP", "Yang, Yifan and others", "2212.08653"),
    "pgs": Paper(
        "pei2025clippgs",
        "Seeing What Matters: Empowering CLIP with Patch Generation-to-Selection",
        "Pei, Gensheng and others",
        "2503.17080",
    ),
}
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


@dataclass
class ModelRepository:
    """The files of a run as they lie in its model repository: the export, its card, results and pictures.

    Args:
        run_dir: a run's folder, with `config.yaml`, `export/`, `eval.json`, and further `eval*.json`.
        repo_id: `org/name`.
        license: of the weights, as the Hub names it.

    Raises:
        ValueError: the folder lacks a part of a run.
    """

    run_dir: Path
    repo_id: str
    license: str = "apache-2.0"
    repo_type = "model"

    def __post_init__(self):
        if not re.fullmatch(HUB_ID, self.repo_id):
            raise ValueError(f"repository {self.repo_id!r}: must be in the form org/name")
        needed = ("config.yaml", "eval.json", f"export/{WEIGHTS}")
        if absent := [name for name in needed if not (self.run_dir / name).is_file()]:
            raise ValueError(f"{self.run_dir}: is no finished run, it has no {', '.join(absent)}")

    def files(self) -> dict[str, Path]:
        """The files but the card: path in the repository, path here."""
        export = {path.name: path for path in sorted((self.run_dir / "export").iterdir()) if path.is_file()}
        others = [*sorted(self.run_dir.glob("eval*.json")), *(self.run_dir / name for name in PICTURES)]
        return export | {path.name: path for path in others if path.is_file()}

    def card(self) -> ModelCard:
        """The card; every number in it is from the run's files."""
        summary = json.loads((self.run_dir / "eval.json").read_text())
        config = yaml.safe_load((self.run_dir / "config.yaml").read_text())
        vision = json.loads((self.run_dir / "export" / "config.json").read_text())["vision_config"]
        mask = resolve_patch_mask(vision["patch_mask"])
        evaluations = sorted(self.run_dir.glob("eval*.json"))
        tables = read_results(evaluations)
        records = {k: v for path in evaluations for k, v in json.loads(path.read_text())["results"].items()}
        measured = {
            "pairs seen": f"{summary['samples_seen']:,} in {summary['steps']:,} steps",
            "seconds of training": summary["train_seconds"],
        }
        return _render(
            self.repo_id,
            mask,
            card_data(self.repo_id, self.license, mask, config, records),
            model=_size(vision),
            training=_training(config | {"patch_mask": mask}) | measured,
            samples_seen=summary["samples_seen"],
            pictures={name: caption for name, caption in PICTURES.items() if (self.run_dir / name).is_file()},
            results="\n".join(table.markdown().replace("## ", "### ") for table in tables),
            hashes=sorted({record["model_hash"] for record in records.values()}),
            is_trained=True,
        )

    def content(self) -> dict[str, bytes | Path]:
        """All files, the checked card first: path in the repository, and the file's bytes or its path here."""
        return {"README.md": str(check_card(self.card())).encode()} | self.files()

    def push(self, private: bool = True) -> str:
        """Create the repository where it is not there, and upload everything in one commit. Returns its address."""
        return upload(self.repo_id, self.content(), private=private, repo_type=self.repo_type)


def upload(
    repo_id: str, content: dict[str, bytes | Path], *, private: bool, repo_type: str, space_sdk: str | None = None
) -> str:
    """Create a repository where it is not there, and send it files in one commit. Returns its address."""
    api = HfApi()
    repo = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=space_sdk)
    api.create_commit(
        repo_id,
        operations=[CommitOperationAdd(name, source) for name, source in content.items()],
        commit_message="Upload from hf_maskclip",
        repo_type=repo_type,
    )
    return str(repo)


def card_of_recipe(recipe: Path) -> ModelCard:
    """The card that a recipe's run would have: without a number, and it says that there are no weights."""
    config = yaml.safe_load(recipe.read_text())
    mask = resolve_patch_mask(config.get("patch_mask", "none"))
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
    data = str(config.get("train_data", "scenes"))
    hub_data = re.match(rf"hf://datasets/{HUB_ID}/", data) or re.fullmatch(HUB_ID, data)
    model = re.fullmatch(HUB_ID, str(config.get("model", "")))
    results = [result for name, record in records.items() for result in _eval_results(name, record)]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "hf_maskclip", f"patch-mask-{mask['name']}"],
        datasets=[hub_data[1]] if hub_data and not Path(data).exists() else None,
        base_model=model[1] if model and not Path(model[1]).exists() else None,
        model_name=repo_id.split("/")[1] if results else None,
        eval_results=results or None,
    )


def _eval_results(name: str, record: dict[str, Any]) -> list[EvalResult]:
    place = {"dataset_type": Path(record["data"]).name, "dataset_config": record["column"], "dataset_split": record["split"]}
    place["dataset_name"] = f"{record['column']}, {record['family'].replace('_', ' ')}"
    shares = {key: value for key, value in record.items() if isinstance(value, float) and 0 <= value <= 1}
    task = record["task"].replace("_", "-")
    return [
        EvalResult(task_type=task, task_name=name, metric_type=metric, metric_name=metric, metric_value=value, **place)
        for metric, value in shares.items()
    ]


def check_card(card: ModelCard) -> ModelCard:
    """Return a card whose front matter can be read back and has what the Hub asks for; without asking it.

    Raises:
        ValueError: a key is missing.
    """
    front_matter = ModelCard(str(card)).data.to_dict()
    needed = ("license", "library_name", "pipeline_tag", "tags")
    if absent := [key for key in needed if not front_matter.get(key)]:
        raise ValueError(f"model card: its front matter has no {', '.join(absent)}")
    return card


def _render(repo_id: str, mask: dict[str, Any], data: ModelCardData, **about: Any) -> ModelCard:
    if not TEMPLATE.is_file():
        raise ValueError(f"{TEMPLATE}: cards are made in a clone of the repository, which has this template")
    about |= {
        "repo_id": repo_id,
        "name": repo_id.split("/")[1],
        "mask": mask["name"],
        "paper": PAPERS.get(mask["name"], PAPERS["none"]),
    }
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **about)


def _training(config: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): config[name] for name in OPTIONS if config.get(name) not in (None, "", 0, "none")}


def _size(vision: dict[str, Any]) -> str:
    layers, width = vision["num_hidden_layers"], vision["hidden_size"]
    return f"{layers} layers x {width}, {vision['image_size']} pixels, {vision['patch_size']}-pixel patches"
