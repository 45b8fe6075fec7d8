"""Proves that a run becomes a model repository with one command: a card of measured numbers only, all files, private; pushed
over HTTP by the real client; and loaded from there, by name, in a process without this package. That its demo becomes a Space
whose files, alone in a folder, show it. And that Transformers' own `push_to_hub` pushes a masked model that loads by its name,
as one with its code does."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import yaml
from conftest import encode_image, random_picture, write_shard
from hub_server import HubServer
from huggingface_hub import ModelCard
from packaging.requirements import Requirement

from hf_maskclip import export_to_clip
from hf_maskclip.cli import main
from hf_maskclip.data.scene_drawing import STYLES
from hf_maskclip.data.scene_sets import COMPOSITIONALITY_KINDS
from hf_maskclip.hub.card import card_of_recipe, check_card
from hf_maskclip.hub.repository import ModelRepository
from hf_maskclip.hub.space import PACKAGE, SpaceRepository, requirements
from hf_maskclip.models.patch_mask_registry import patch_masks

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


@pytest.fixture
def run_dir(run, tmp_path) -> Path:
    """A run of four steps, evaluated on a clip-benchmark folder."""
    folder = tmp_path / "colours"
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(f"colour {n}" for n in range(7)))
    samples = {f"s{n}": {"png": encode_image(random_picture(n)), "cls": str(n % 7).encode()} for n in range(14)}
    write_shard(folder / "test" / "0.tar", samples)
    return run(eval_data=str(folder))[2]


def test_every_mask_has_a_paper():
    papers = {name: mask.citation for name, mask in patch_masks().items()}
    assert all(paper and paper.title and paper.authors for paper in papers.values())
    assert len({paper.key for paper in papers.values()}) == 7  # block and grid are of one


def test_the_numbers_of_a_card_are_those_of_the_run(run_dir):
    card = check_card(ModelRepository(run_dir, "org/name").card())
    front_matter = ModelCard(str(card)).data.to_dict()
    assert (front_matter["library_name"], front_matter["pipeline_tag"]) == ("transformers", "zero-shot-image-classification")
    assert {"clip", "hf_maskclip", "patch-mask-pgs"} <= set(front_matter["tags"]) and "base_model" not in front_matter
    (record,) = json.loads((run_dir / "eval.json").read_text())["results"].values()
    (result,) = front_matter["model-index"][0]["results"]
    measured = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert measured == {name: record[name] for name in ("top1", "top5", "mean_per_class")}
    assert f"| {run_dir.name} | {100 * record['top1']:.1f} |" in card.text and record["model_hash"] in card.text
    assert "16 in 4 steps" in card.text and "2503.17080" in card.text and "masks.png" in card.text


def test_each_result_has_a_place_of_its_own_in_the_model_index(run_dir):
    summary = json.loads((run_dir / "eval.json").read_text())
    (record,) = summary["results"].values()
    summary["results"] |= {f"zero_shot_{n}": record | {"column": f"colours {n}"} for n in range(3)}
    (run_dir / "eval_more.json").write_text(json.dumps(summary))
    front_matter = ModelCard(str(ModelRepository(run_dir, "org/name").card())).data.to_dict()
    assert [len(result["metrics"]) for result in front_matter["model-index"][0]["results"]] == [3] * 4


def test_data_and_base_model_are_named_where_they_are_on_the_hub(run_dir):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config |= {"train_data": "hf://datasets/org/pairs/train-{0..9}.tar", "model": "openai/clip-vit-base-patch16"}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    front_matter = ModelCard(str(ModelRepository(run_dir, "org/name").card())).data.to_dict()
    assert (front_matter["datasets"], front_matter["base_model"]) == (["org/pairs"], "openai/clip-vit-base-patch16")


def test_a_run_without_an_evaluation_has_a_card_that_says_so(run):
    card = check_card(ModelRepository(run(patch_mask="random")[2], "org/name").card())
    assert "None: the run was not evaluated." in card.text and "2212.00794" in card.text
    assert "model-index" not in ModelCard(str(card)).data.to_dict()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_card_of_each_recipe_is_there_and_has_no_result(recipe):
    card = check_card(card_of_recipe(recipe))
    assert (ROOT / "model_cards" / f"{recipe.stem}.md").read_text() == f"{card}\n"
    assert "Not yet trained" in card.text and "model-index" not in card.data.to_dict()
    assert not re.search(r"\d %|\d\.\d \|", card.text)


def results_of(card: ModelCard) -> dict[str, float]:
    return {f"{result.task_name}/{result.metric_type}": result.metric_value for result in card.data.eval_results}


def test_the_readme_has_the_numbers_of_the_quickstarts_card_which_has_its_pictures():
    card = check_card(ModelCard.load(ROOT / "model_cards" / "clip-pgs-tiny.md"))
    results = results_of(card)
    kinds = ("shape", "colour", "pair")
    scores = {kind: [results[f"zero_shot_{kind}/{metric}"] for metric in ("top1", "mean_per_class")] for kind in kinds}
    recalls = [
        [results[f"retrieval_scenes/{way}_recall@{k}"] for k in (1, 5, 10)] for way in ("image_to_text", "text_to_image")
    ]
    probe = [results[f"linear_probe_{kind}/top1"] for kind in ("shape", "colour")]
    lines = [f"zero_shot_{kind}: top1 {top1:.1%}, mean_per_class {mean:.1%}" for kind, (top1, mean) in scores.items()]
    lines.append(f"image_to_text_recall@10 {recalls[0][2]:.1%}, text_to_image_recall@10 {recalls[1][2]:.1%}")
    lines.append("retrieval, recall at 1/5/10 | text {}/{}/{} (".format(*(f"{100 * value:.1f}" for value in recalls[0])))
    lines.append("image {}/{}/{} (".format(*(f"{100 * value:.1f}" for value in recalls[1])))
    lines.append(f"| linear probe, top-1 | shape {100 * probe[0]:.1f}, colour {100 * probe[1]:.1f} |")
    lines.append(", ".join(f"{style} {100 * results[f'robustness_{style}/top1']:.1f}" for style in STYLES))
    kinds = COMPOSITIONALITY_KINDS
    accuracies = [100 * results[f"compositionality_{kind}/accuracy"] for kind in kinds]
    lines.append(", ".join(f"{kind.replace('_', ' ')} {value:.1f}" for kind, value in zip(kinds, accuracies, strict=True)))
    readme = (ROOT / "README.md").read_text()
    assert [line for line in lines if line not in readme] == []
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", card.text)
    assert pictures and all((ROOT / "model_cards" / name).is_file() for name in pictures)


def test_a_dry_run_lists_what_would_go_and_sends_nothing(run_dir, capsys):
    assert main(["push", str(run_dir), "org/name", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert (
        "would go to org/name (private), with the card above:" in printed
        and "pipeline_tag: zero-shot-image-classification" in printed
    )
    names = (
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
        "eval.json",
        "masks.png",
    )
    assert all(f"  {name}  " in printed for name in names)


def test_what_is_no_run_is_refused(run_dir, tmp_path, capsys):
    assert main(["push", str(tmp_path), "org/name", "--dry_run"]) == 2
    assert "is no finished run, it has no config.yaml, eval.json, export/model.safetensors" in capsys.readouterr().err
    assert main(["push", str(run_dir), "name", "--dry_run"]) == 2
    assert "repository 'name': must be in the form org/name" in capsys.readouterr().err


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def python(hub, tmp_path):
    """Runs Python with this Hub in a new process, for the client reads its settings once, when it is imported."""
    settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HUB_DISABLE_XET": "1"}  # the server takes uploads over plain HTTP

    def run(*arguments: str, folder: Path = tmp_path) -> str:
        environment = os.environ | settings
        finished = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment, timeout=120
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        return finished.stdout

    return run


LOAD = """
import json, sys
sys.modules["hf_maskclip"] = None
from PIL import Image
from transformers import AutoModel, pipeline
model, info = AutoModel.from_pretrained("org/clip-pgs-tiny", output_loading_info=True)
scores = pipeline("zero-shot-image-classification", model="org/clip-pgs-tiny")(
    Image.new("RGB", (40, 40), "red"), candidate_labels=["ball", "fish"])
labels = sorted(score["label"] for score in scores)
print(json.dumps({"class": type(model).__name__, "missing": sorted(info["missing_keys"]), "labels": labels}))
"""


@pytest.fixture
def push(python, run_dir, tmp_path):
    """Runs a command of the README that pushes, as it is written there, beside a run of four steps."""
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "quickstart").symlink_to(run_dir)
    commands = {
        line.partition("#")[0].strip()
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("hf-maskclip push")
    }

    def run(command: str) -> str:
        assert command in commands
        return python("-m", "hf_maskclip", *command.split()[1:])

    return run


def test_the_readmes_commands_push_a_run_that_is_loaded_by_its_name_without_the_package(run_dir, hub, python, push):
    push("hf-maskclip push runs/quickstart org/clip-pgs-tiny --dry_run")
    assert hub.requests == []
    printed = push("hf-maskclip push runs/quickstart org/clip-pgs-tiny")
    assert f"pushed to {hub.address}/org/clip-pgs-tiny" in printed
    assert hub.private == {"org/clip-pgs-tiny"}
    there = hub.repositories["org/clip-pgs-tiny"]
    assert there["model.safetensors"] == (run_dir / "export" / "model.safetensors").read_bytes()
    assert set(there) == {"README.md", *ModelRepository(run_dir, "org/clip-pgs-tiny").files()}
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)  # uploaded as large files are

    loaded = json.loads(python("-c", LOAD).splitlines()[-1])
    assert loaded == {"class": "CLIPModel", "missing": [], "labels": ["ball", "fish"]}


# With the package: Transformers' own push_to_hub, and what it pushed, loaded by its name; then a folder with remote code.
PUSH = """
import json, sys
import torch
import hf_maskclip
from huggingface_hub import HfApi
from transformers import AutoModel, AutoProcessor
model = hf_maskclip.MaskCLIPModel.from_pretrained(sys.argv[1])
model.push_to_hub("org/masked", private=True)
AutoProcessor.from_pretrained(sys.argv[1]).push_to_hub("org/masked")
again, info = AutoModel.from_pretrained("org/masked", output_loading_info=True)
HfApi().create_repo("org/with-code")
HfApi().upload_folder(repo_id="org/with-code", folder_path=sys.argv[2])
print(json.dumps({
    "class": type(again).__name__, "missing": sorted(info["missing_keys"]),
    "equal": all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items()),
    "patch_mask": again.config.vision_config.patch_mask,
    "processor": type(AutoProcessor.from_pretrained("org/masked")).__name__,
}))
"""

# Without it: the masked model by its remote code, in training mode.
LOAD_CODE = """
import json, sys
sys.modules["hf_maskclip"] = None
import torch
from transformers import AutoModel
model, info = AutoModel.from_pretrained("org/with-code", trust_remote_code=True, output_loading_info=True)
kept = model.train().get_image_features(torch.randn(4, 3, 32, 32)).patch_selection.indices.shape[1]
print(json.dumps({"module": type(model).__module__, "missing": sorted(info["missing_keys"]), "kept": kept}))
"""


def test_push_to_hub_of_a_model_gives_what_auto_model_loads_and_so_does_its_code(make_model, processor, hub, python, tmp_path):
    model = make_model({"name": "random", "mask_ratio": 0.75})
    masked, with_code = tmp_path / "masked", tmp_path / "with-code"
    model.save_pretrained(masked)
    processor.save_pretrained(masked)
    export_to_clip(model, with_code, processor, remote_code=True)
    loaded = json.loads(python("-c", PUSH, str(masked), str(with_code)).splitlines()[-1])
    assert loaded == {
        "class": "MaskCLIPModel",
        "missing": [],
        "equal": True,
        "patch_mask": {"name": "random", "mask_ratio": 0.75},
        "processor": "CLIPProcessor",
    }
    assert hub.private == {"org/masked"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(hub.repositories["org/masked"])

    loaded = json.loads(python("-c", LOAD_CODE).splitlines()[-1])
    assert loaded.pop("module").startswith("transformers_modules.org.")
    assert loaded == {"missing": [], "kept": 4}  # of 16 patches


SHOW = """
import json
import app, hf_maskclip
tabs = [block["props"]["label"] for block in app.demo.get_config_file()["components"] if block["type"] == "tabitem"]
print(json.dumps({"tabs": tabs, "package": hf_maskclip.__file__}))
"""


def test_a_pushed_space_shows_the_demo_from_its_files_alone(hub, python, push, tmp_path):
    gradio = pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'hf_maskclip[demo]'")
    printed = push("hf-maskclip push runs/quickstart org/clip-pgs-tiny --space")
    assert f"pushed to {hub.address}/spaces/org/clip-pgs-tiny" in printed
    assert hub.private == {"org/clip-pgs-tiny", "spaces/org/clip-pgs-tiny"}
    there = hub.repositories["spaces/org/clip-pgs-tiny"]
    assert {name for name in there if "/" not in name} == {"README.md", "app.py", "requirements.txt"}
    assert {name for name in there if name.endswith(".py")} > {f"hf_maskclip/{path.name}" for path in PACKAGE.glob("*.py")}
    _, front_matter, _ = there["README.md"].decode().split("---\n", 2)
    expected = {"sdk": "gradio", "sdk_version": gradio.__version__, "app_file": "app.py", "models": ["org/clip-pgs-tiny"]}
    front_matter = yaml.safe_load(front_matter)
    assert expected | front_matter == front_matter and len(front_matter["short_description"]) <= 60  # the Hub's limit

    for name, content in there.items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_bytes(content)
    shown = json.loads(python("-c", SHOW, folder=tmp_path / "space").splitlines()[-1])
    assert shown == {"tabs": ["Masks", "Zero-shot"], "package": str(tmp_path / "space" / "hf_maskclip" / "__init__.py")}


def test_a_space_lists_what_the_package_needs():
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(r'"(.+?)"', re.search(r"dependencies = \[(.*?)\]", project, flags=re.DOTALL)[1])
    assert len(needed) > 5
    assert {Requirement(line) for line in requirements().splitlines()} == {Requirement(line) for line in needed}


def test_a_dry_run_of_a_space_lists_both(run_dir, capsys):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'hf_maskclip[demo]'")
    assert main(["push", str(run_dir), "org/name", "--space", "--dry_run"]) == 0
    model, space = capsys.readouterr().out.split("would go to the Space org/name (private)")
    assert "would go to org/name (private)" in model and "sdk: gradio" in model and "  model.safetensors  " in model
    assert all(f"  {name}  " in space for name in ("README.md", "app.py", "requirements.txt", "hf_maskclip/demo.py"))


def test_without_gradio_a_space_is_refused(monkeypatch):
    def no_version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("hf_maskclip.hub.space.version", no_version)
    with pytest.raises(ValueError, match=r"push --space: needs Gradio, whose version it records: pip install"):
        SpaceRepository("org/name").content()
