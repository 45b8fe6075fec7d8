"""Proves that the package works where a part is missing or different: without kornia, without `torch.distributed`, from a
thread, and where text files have another default encoding; and that type checkers and `help` see what is its own."""

import ast
import inspect
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
from model_classes import ALL_CLASSES

import hf_maskclip
from hf_maskclip import MaskCLIPModel
from hf_maskclip.models.patch_mask_registry import BUILT_IN
from training.config import TrainingConfig
from training.train import main

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("hf_maskclip/**/*.py"), *ROOT.glob("training/**/*.py")])

WITHOUT_KORNIA = 'import sys\nsys.modules["kornia"] = None\n'
# In a build without it, `torch.distributed` is a module that says so and has next to nothing else.
WITHOUT_DISTRIBUTED = """
import sys, types
import accelerate, torch, torch._dynamo, transformers.models.clip.modeling_clip
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
stub = types.ModuleType("torch.distributed")
stub.is_available = stub.is_initialized = lambda: False
sys.modules["torch.distributed"] = torch.distributed = stub
"""
TRAIN = """
import torch
from hf_maskclip import ContrastiveLoss, MaskCLIPConfig, MaskCLIPModel
tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
text = tower | {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49}
vision = tower | {"image_size": 32, "patch_size": 8}
for mask in MASKS:
    model = MaskCLIPModel(MaskCLIPConfig(text_config=text, vision_config=vision, patch_mask=mask)).train()
    scores = {"patch_scores": torch.rand(2, 16)} if mask == "attentive" else {}
    outputs = model(input_ids=torch.tensor([[1, 49], [2, 49]]), pixel_values=torch.randn(2, 3, 32, 32), **scores)
    ContrastiveLoss()(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp()).backward()
    assert mask == "none" or outputs.patch_selection is not None
print("trained", *MASKS)
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", cwd=ROOT)


@pytest.mark.slow
def test_without_kornia_all_masks_work_but_those_that_need_its_edges():
    masks = [*(name for name in BUILT_IN if name != "pgs"), {"name": "pgs", "edges": "none"}]
    done = run(f"{WITHOUT_KORNIA}\nMASKS = {masks!r}\n{TRAIN}\nMASKS = ['pgs']\n{TRAIN}")
    assert f"trained {' '.join(map(str, masks))}" in done.stdout, done.stderr[-2000:]
    assert done.returncode == 1
    assert "kornia" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_without_torch_distributed_a_model_trains():
    done = run(f"{WITHOUT_DISTRIBUTED}\nMASKS = ['random', 'pgs']\n{TRAIN}")
    assert "trained random pgs" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_a_run_starts_from_a_thread(options):
    """As in the server of a notebook, where signals belong to another thread."""
    ended = []
    thread = threading.Thread(target=lambda: ended.append(main(TrainingConfig(**options))))
    thread.start()
    thread.join()
    assert ended
    assert (Path(options["output_dir"]) / "export" / "model.safetensors").is_file()


def text_files_of(tree: ast.AST) -> list[ast.Call]:
    """The calls that open a text file."""
    calls = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        is_binary = any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)
        if name in ("read_text", "write_text") or (name == "open" and isinstance(node.func, ast.Name) and not is_binary):
            calls.append(node)
    return calls


def test_every_text_file_is_opened_as_utf_8():
    calls = {f"{file}:{call.lineno}": call for file in SOURCES for call in text_files_of(ast.parse(file.read_bytes()))}
    assert len(calls) > 20
    encodings = {where: [key.value for key in call.keywords if key.arg == "encoding"] for where, call in calls.items()}
    assert {where for where, given in encodings.items() if not given or ast.literal_eval(given[0]) != "utf-8"} == set()


def test_type_checkers_read_the_types_of_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["hf_maskclip"]
    assert (ROOT / "hf_maskclip" / "py.typed").is_file()


# ---- Help ------------------------------------------------------------------------------------------------------------------

CHOICE = {"patch_selection", "apply_patch_mask", "patch_mask", "progress", "generator", "patch_scores"}


@pytest.mark.parametrize("kind", ALL_CLASSES, ids=lambda kind: kind.__name__)
def test_help_shows_the_arguments_of_ours(kind):
    loading = inspect.signature(kind.from_pretrained)
    assert "patch_mask" in loading.parameters
    assert "patch_mask:" in inspect.getdoc(kind.from_pretrained)
    assert "patch_mask" in inspect.signature(kind).parameters
    documented = inspect.getdoc(kind.forward)
    assert "PatchMaskedTower" in documented or all(name in documented for name in CHOICE)


@pytest.mark.parametrize("function", [MaskCLIPModel.forward, MaskCLIPModel.get_image_features], ids=lambda f: f.__name__)
def test_help_of_the_whole_model_names_each_of_them(function):
    assert all(name in inspect.getdoc(function) for name in CHOICE)


def test_the_package_offers_its_own_names_alone():
    assert {"PatchMaskCallback", "class_attention", "resolve_patch_mask"} <= set(hf_maskclip.__all__) <= set(dir(hf_maskclip))
    assert all(getattr(hf_maskclip, name).__module__.startswith("hf_maskclip.") for name in hf_maskclip.__all__)
