"""Proves that an export with remote code trains on where this package is not: a process that cannot import it loads every class
completely and without a line in its log, chooses the same patches, takes the same step, and saves what loads again."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import photo_like
from model_classes import VISION_CLASSES
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from hf_maskclip import (
    MaskCLIPConfig,
    MaskCLIPForImageClassification,
    MaskCLIPModel,
    PatchMask,
    export_to_clip,
    register_patch_mask,
)

# Runs in a new process in which `import hf_maskclip` fails. Prints one JSON line.
CLEAN_PROCESS = """
import json, logging, sys
from pathlib import Path
sys.modules["hf_maskclip"] = None
class Records(logging.Handler):
    seen = []
    def emit(self, record):
        self.seen.append(record.getMessage())
import torch, transformers
from safetensors.torch import load_file
from transformers import (AutoModel, AutoModelForImageClassification, AutoModelForZeroShotImageClassification, AutoProcessor,
                          pipeline)
transformers.utils.logging.add_handler(Records(level=logging.WARNING))
logging.getLogger().addHandler(Records(level=logging.WARNING))
folder = Path(sys.argv[1])
trusted = {"trust_remote_code": True}

def load(name, auto_class=AutoModel):
    model, info = auto_class.from_pretrained(folder / name, output_loading_info=True, **trusted)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    weights = load_file(folder / f"{name}.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    return model

classes = {name: type(load(name)).__name__ for name in sys.argv[2:]}
load("MaskCLIPModel", AutoModelForZeroShotImageClassification)
load("MaskCLIPForImageClassification", AutoModelForImageClassification)
model = load("MaskCLIPModel").train()
tower = type(load("MaskCLIPVisionModel")).from_pretrained(folder / "MaskCLIPModel")  # its keys have the prefix vision_model
assert all(torch.equal(tower.state_dict()[key], value) for key, value in model.vision_model.state_dict().items())
inputs = load_file(folder / "inputs.safetensors")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
for seed in range(2):
    torch.manual_seed(seed)
    output = model(**inputs, return_loss=True)
    output.loss.backward()
    optimizer.step()
    losses.append(output.loss.item())
AutoProcessor.from_pretrained(folder / "MaskCLIPModel", **trusted)
classify = pipeline("zero-shot-image-classification", model=str(folder / "MaskCLIPModel"), **trusted)
model.save_pretrained(folder / "again")
again = AutoModel.from_pretrained(folder / "again", **trusted)
assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
print(json.dumps({
    "classes": classes, "pipeline": type(classify.model).__name__, "patch_mask": again.config.vision_config.patch_mask,
    "lengths": output.patch_selection.lengths.tolist(), "indices": output.patch_selection.indices.tolist(),
    "losses": losses, "log": Records.seen,
}))
"""


def two_steps(model, inputs):
    """The losses of two steps, and the patches that the second one saw."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        output = model(**inputs, return_loss=True)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    return losses, output.patch_selection


@pytest.fixture
def inputs(inputs):
    return inputs | {"pixel_values": photo_like(4, 32, 32)}


@pytest.fixture
def exports(make_model, processor, inputs, tmp_path):
    """The four classes, each exported with its code to a folder of its name, their weights beside it, and a batch."""
    model = make_model({"name": "pgs", "min_mask_ratio": 0.1, "max_mask_ratio": 0.8}, seed=3)
    models = [model]
    for kind in VISION_CLASSES:
        config = MaskCLIPConfig(**model.config.to_dict())
        models.append(kind(config if kind is MaskCLIPForImageClassification else config.vision_config))
    for exported in models:
        name = type(exported).__name__
        export_to_clip(exported, tmp_path / name, processor, remote_code=True)
        save_file(exported.state_dict(), tmp_path / f"{name}.safetensors")
    save_file(inputs, tmp_path / "inputs.safetensors")
    return model, tmp_path


@pytest.mark.slow
def test_a_process_without_the_package_loads_its_code_and_trains_the_same(exports, inputs):
    model, folder = exports
    names = ["MaskCLIPModel", *(kind.__name__ for kind in VISION_CLASSES)]
    command = [sys.executable, "-c", CLEAN_PROCESS, str(folder), *names]
    environment = os.environ | {"HF_HOME": str(folder / "home")}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found["classes"] == {name: name for name in names}
    assert found["pipeline"] == "MaskCLIPModel"
    assert found["log"] == []
    assert "ERROR" not in finished.stderr

    assert found["patch_mask"] == model.config.vision_config.patch_mask
    losses, selection = two_steps(model, inputs)
    assert len(set(selection.lengths.tolist())) > 1
    assert losses[0] != losses[1]
    assert (found["lengths"], found["indices"]) == (selection.lengths.tolist(), selection.indices.tolist())
    assert found["losses"] == pytest.approx(losses, abs=1e-5)


def test_with_the_package_its_own_classes_come_first_and_an_export_drops_the_code(exports, processor, tmp_path):
    _, folder = exports
    loaded = AutoModel.from_pretrained(folder / "MaskCLIPModel")
    assert type(loaded) is MaskCLIPModel
    export_to_clip(loaded, tmp_path / "plain", processor)
    assert type(AutoConfig.from_pretrained(tmp_path / "plain")).__name__ == "CLIPConfig"
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_exporting_the_code_leaves_model_and_classes_as_they_were(exports, tmp_path):
    model, _ = exports
    model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_a_mask_of_your_own_cannot_travel(make_model, processor, tmp_path):
    class MyMask(PatchMask):
        def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
            raise NotImplementedError

    register_patch_mask("mine", MyMask)
    with pytest.raises(ValueError, match="patch mask 'mine' is your own, remote code cannot carry it: must be one of none, "):
        export_to_clip(make_model({"name": "mine"}), tmp_path / "export", processor, remote_code=True)
    assert not (tmp_path / "export").exists()
