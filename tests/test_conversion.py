"""Proves that an export needs nothing: a process that cannot import this package loads it completely, and its pipeline gives
the same scores without an error in its log; and that the export trains on here with the mask it records."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import random_picture
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, CLIPProcessor, CLIPTokenizer, pipeline

from hf_maskclip import MaskCLIPModel, export_to_clip

# Runs in a new process in which `import hf_maskclip` fails. Prints one JSON line.
CLEAN_PROCESS = """
import json, logging, sys
sys.modules["hf_maskclip"] = None
class Errors(logging.Handler):
    records = []
    def emit(self, record):
        self.records.append(record.getMessage())
handler = Errors(level=logging.WARNING)
import transformers
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
transformers.utils.logging.add_handler(handler)
logging.getLogger().addHandler(handler)
folder = sys.argv[1]
model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
classify = pipeline("zero-shot-image-classification", model=folder)
scores = classify(Image.open(sys.argv[2]), candidate_labels=["red ball", "blue fish", "house"])
image = AutoProcessor.from_pretrained(folder)(images=Image.open(sys.argv[2]), return_tensors="pt")
print(json.dumps({
    "class": type(model).__name__,
    "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
    "scores": {row["label"]: row["score"] for row in scores},
    "features": model.get_image_features(**image).pooler_output[0].tolist(),
    "log": Errors.records,
}))
"""


@pytest.fixture
def export(make_model, processor, tmp_path):
    model = make_model({"name": "pgs", "min_mask_ratio": 0.4, "max_mask_ratio": 0.4}, seed=4).eval()
    export_to_clip(model, tmp_path / "export", processor)
    return model, tmp_path / "export"


@pytest.mark.slow
def test_a_process_without_the_package_loads_it_and_gives_equal_scores(export, processor, tmp_path):
    model, folder = export
    picture = random_picture(1)
    picture.save(tmp_path / "picture.png")
    command = [sys.executable, "-c", CLEAN_PROCESS, str(folder), str(tmp_path / "picture.png")]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["class"] == "CLIPModel"
    assert result["missing"] == []
    assert result["unexpected"] == []
    assert result["log"] == []
    assert "ERROR" not in finished.stderr

    here = pipeline(
        "zero-shot-image-classification", model=model, tokenizer=processor.tokenizer, image_processor=processor.image_processor
    )
    expected = {row["label"]: row["score"] for row in here(picture, candidate_labels=["red ball", "blue fish", "house"])}
    assert np.ptp(list(expected.values())) > 1e-3
    assert result["scores"] == pytest.approx(expected, abs=1e-6)
    with torch.no_grad():
        features = model.get_image_features(**processor(images=picture, return_tensors="pt")).pooler_output[0]
    torch.testing.assert_close(torch.tensor(result["features"]), features, rtol=0, atol=1e-6)


def test_the_export_trains_on_with_the_recorded_mask(export, inputs):
    model, folder = export
    again = MaskCLIPModel.from_pretrained(folder).train()
    assert again.config.vision_config.patch_mask == model.config.vision_config.patch_mask
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert again(**inputs).patch_selection.indices.shape == (4, 10)


def test_the_exported_folder_says_it_is_clip_and_has_its_tokenizer(export, tokenizer):
    _, folder = export
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "clip"
    assert config["architectures"] == ["CLIPModel"]
    assert config["vision_config"]["model_type"] == "clip_vision_model"
    assert config["vision_config"]["patch_mask"]["name"] == "pgs"
    assert not list(folder.glob("*.bin"))
    assert (folder / "model.safetensors").is_file()
    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, CLIPTokenizer)
    assert loaded("a red Ünïcode 漢字")["input_ids"] == tokenizer("a red Ünïcode 漢字")["input_ids"]


def test_a_maskclip_folder_has_its_processor_and_pipeline_once_the_package_is_imported(make_model, processor, tmp_path, caplog):
    model = make_model("random")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), CLIPTokenizer)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), CLIPProcessor)
    assert AutoImageProcessor.from_pretrained(tmp_path).crop_size["height"] == 32
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path))
    transformers_log.removeHandler(caplog.handler)
    assert type(classify.model) is MaskCLIPModel
    assert not classify.model.training
    first, second = (classify(random_picture(0), candidate_labels=["ball", "fish"]) for _ in range(2))
    assert first == second
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_exporting_leaves_the_model_as_it_was(export, inputs):
    model, _ = export
    assert type(model) is MaskCLIPModel
    assert model.config.model_type == "maskclip"
    assert model.train()(**inputs).patch_selection is not None
