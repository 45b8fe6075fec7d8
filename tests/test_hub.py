"""Proves that a run becomes a model repository with one command: all files, private; pushed over HTTP by the real client; and
loaded from there, by name, in a process without this package. That its demo becomes a Space whose files, alone in a folder,
show it. And that Transformers' own `push_to_hub` pushes a masked model that loads by its name, as one with its code does."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from huggingface_hub.utils import httpx
from packaging.requirements import Requirement

from hf_maskclip import export_to_clip, model_folder
from hf_maskclip.cli import main
from hf_maskclip.hub import repository
from hf_maskclip.hub.repository import ModelRepository
from hf_maskclip.hub.space import PACKAGE, SpaceRepository, requirements

ROOT = Path(__file__).resolve().parents[1]


def test_a_dry_run_lists_what_would_go_and_sends_nothing(finished_run, capsys):
    assert main(["push", str(finished_run), "org/name", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "would go to org/name (private), with the card above:" in printed
    assert "pipeline_tag: zero-shot-image-classification" in printed
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


def test_what_is_no_run_is_refused(finished_run, tmp_path, capsys):
    assert main(["push", str(tmp_path), "org/name", "--dry_run"]) == 2
    assert "is no finished run, it has no config.yaml, eval.json, export/model.safetensors" in capsys.readouterr().err
    assert main(["push", str(finished_run), "name", "--dry_run"]) == 2
    assert "repository 'name': must be in the form org/name" in capsys.readouterr().err


@pytest.mark.parametrize("is_edited", [False, True])
def test_a_push_makes_the_card_once_and_asks_for_it_once(is_edited, finished_run, monkeypatch, tmp_path, capsys):
    done = []
    (tmp_path / "README.md").write_text("written on the Hub")

    def note(name, answer):
        return lambda *arguments, **options: done.append((name, arguments)) or answer

    monkeypatch.setattr(repository, "file_exists", note("asked", is_edited))
    monkeypatch.setattr(repository, "hf_hub_download", note("read", str(tmp_path / "README.md")))
    monkeypatch.setattr(repository, "upload", note("sent", "https://hub/org/name"))
    made, card_of_run = [], repository.card_of_run
    monkeypatch.setattr(repository, "card_of_run", lambda *a: made.append(a) or card_of_run(*a))
    assert main(["push", str(finished_run), "org/name"]) == 0
    assert len(made) == 1
    assert [name for name, _ in done] == ["asked", *(["read"] if is_edited else []), "sent"]
    assert ("README.md" in done[-1][1][1]) is not is_edited  # an edited card is kept
    printed = capsys.readouterr().out
    assert ("org/name has a card that was edited on the Hub: it is kept" in printed) is is_edited
    assert "pushed to https://hub/org/name" in printed


def test_without_network_a_dry_run_goes_on_and_a_push_is_one_line_at_once(finished_run, monkeypatch, capsys):
    tries = []

    def no_answer(*arguments):
        tries.append(arguments)
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(repository, "file_exists", no_answer)
    monkeypatch.setattr(repository, "hf_hub_download", lambda *a: pytest.fail("it tries for half a minute"))
    assert main(["push", str(finished_run), "org/name", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "the Hub cannot be asked whether the card of org/name was edited there (ConnectError: no network); a push" in printed
    assert "would go to org/name (private)" in printed
    assert main(["push", str(finished_run), "org/name"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert len(tries) == 2


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_without_network_a_model_of_the_hub_is_one_line_at_once(command, monkeypatch, tmp_path, capsys):
    def no_answer(*arguments):
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(model_folder, "file_exists", no_answer)
    out = str(tmp_path / "out.json")
    options = {"evaluate": ["--model", "org/name", "--suite", "scenes", "--output", out], "export": ["org/name", out]}[command]
    assert main([command, *options]) == 2
    error = capsys.readouterr().err
    assert "org/name: no such folder, nor kept here of the Hub, which cannot be asked (ConnectError)" in error
    assert error.count("\n") == 1


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
def push(python, finished_run, tmp_path):
    """Runs a command of the README that pushes, as it is written there, beside a run of four steps."""
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "quickstart").symlink_to(finished_run)
    commands = {
        line.partition("#")[0].strip()
        for line in (ROOT / "docs" / "hub.md").read_text().splitlines()
        if line.startswith("hf-maskclip push")
    }

    def run(command: str) -> str:
        assert command in commands
        return python("-m", "hf_maskclip", *command.split()[1:])

    return run


@pytest.mark.slow
def test_the_readmes_commands_push_a_run_that_is_loaded_by_its_name_without_the_package(finished_run, hub, python, push):
    push("hf-maskclip push runs/quickstart org/clip-pgs-tiny --dry_run")
    assert all(request.startswith(("GET ", "HEAD ")) for request in hub.requests)  # it asks for the card that is there
    assert not hub.repositories
    printed = push("hf-maskclip push runs/quickstart org/clip-pgs-tiny")
    assert f"pushed to {hub.address}/org/clip-pgs-tiny" in printed
    assert hub.private == {"org/clip-pgs-tiny"}
    there = hub.repositories["org/clip-pgs-tiny"]
    assert there["model.safetensors"] == (finished_run / "export" / "model.safetensors").read_bytes()
    assert set(there) == {"README.md", *ModelRepository(finished_run, "org/clip-pgs-tiny").files()}
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


@pytest.mark.slow
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


# ---- Spaces ---------------------------------------------------------------------------------------------------------------


SHOW = """
import json
import app, hf_maskclip
tabs = [block["props"]["label"] for block in app.demo.get_config_file()["components"] if block["type"] == "tabitem"]
print(json.dumps({"tabs": tabs, "package": hf_maskclip.__file__}))
"""


@pytest.mark.slow
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
    assert expected | front_matter == front_matter
    assert len(front_matter["short_description"]) <= 60  # the Hub's limit

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


def test_a_dry_run_of_a_space_lists_both(finished_run, capsys):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'hf_maskclip[demo]'")
    assert main(["push", str(finished_run), "org/name", "--space", "--dry_run"]) == 0
    model, space = capsys.readouterr().out.split("would go to the Space org/name (private)")
    assert "would go to org/name (private)" in model
    assert "sdk: gradio" in model
    assert "  model.safetensors  " in model
    assert all(f"  {name}  " in space for name in ("README.md", "app.py", "requirements.txt", "hf_maskclip/demo/page.py"))


def test_without_gradio_a_space_is_refused(monkeypatch):
    def no_version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("hf_maskclip.hub.space.version", no_version)
    with pytest.raises(ValueError, match=r"push --space: needs Gradio, whose version it records: pip install"):
        SpaceRepository("org/name").content()
