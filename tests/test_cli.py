"""Proves that the command line does what its help says, and that what it cannot do is one line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_picture
from PIL import Image
from transformers import AutoModel, CLIPProcessor

from hf_maskclip import export_to_clip
from hf_maskclip.cli import main
from hf_maskclip.conversion_open_clip import MODELS

SIZES = ["--image_size", "32", "--patch_size", "8"]


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    paths = [tmp_path / f"{seed}.jpg" for seed in range(2)]
    for seed, path in enumerate(paths):
        random_picture(seed).save(path)
    return [str(path) for path in paths]


def test_masks_draws_every_mask_that_needs_no_model(pictures, tmp_path, capsys):
    output = tmp_path / "masks.png"
    assert main(["masks", *pictures, "-o", str(output), *SIZES]) == 0
    with Image.open(output) as drawn:
        assert drawn.width > 2 * drawn.height  # a row for each of two pictures, a column for each of many masks
    assert "attentive is left out" in capsys.readouterr().out


def test_masks_draws_the_attentive_mask_of_a_model_and_the_stages_of_pgs(pictures, tmp_path, make_model, processor):
    export_to_clip(make_model(), tmp_path / "export", processor)
    attentive, steps = tmp_path / "attentive.png", tmp_path / "steps.pdf"
    # The sizes are the model's: 32 pixels, patches of 8.
    command = ["masks", *pictures, "--mask", "attentive", "--model", str(tmp_path / "export")]
    assert main([*command, "-o", str(attentive)]) == 0 and attentive.stat().st_size > 5_000
    assert main([*command, "--patch_size", "16"]) == 2
    assert main(["masks", *pictures, *SIZES, "--mask", "pgs", "--steps", "-o", str(steps)]) == 0
    assert steps.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.png"], "absent.png: no such file"),
        (["{picture}", "--patch_size", "0"], "both sides must be multiples of the patch size 0"),
        (["{picture}", "--mask", "pgs", "--model", "somewhere"], "only the attentive mask goes by a model's attention"),
        ([__file__], "is no picture that can be read"),
        (["{picture}", "--steps"], "--steps draws the stages of pgs: give --mask pgs"),
        (["{picture}", "--mask", "attentive"], "goes by a model's attention: give --model"),
        (["{picture}", "--patch_size", "15"], "both sides must be multiples of the patch size 15"),
        (["{picture}", "-o", "masks.xyz"], "xyz"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["masks", *(word.format(picture=pictures[0]) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("masks.*"))


def test_the_installed_command_runs():
    program = Path(sys.executable).with_name("hf-maskclip")
    finished = subprocess.run([program, "masks", "--help"], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0 and "--steps" in finished.stdout


def test_without_gradio_the_demo_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hf_maskclip.demo", raising=False)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == 'error: hf-maskclip demo: needs Gradio: pip install "hf_maskclip[demo]"\n'


def test_convert_goes_to_open_clip_and_back(make_clip, processor, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model, plain = make_clip(), tmp_path / "plain"
    model.save_pretrained(plain)
    processor.save_pretrained(plain)
    assert main(["convert", str(plain), str(tmp_path / "there"), "--to", "open_clip"]) == 0
    assert "local-dir:" in capsys.readouterr().out
    weights = tmp_path / "there" / "open_clip_model.safetensors"

    back = ["convert", str(weights), str(tmp_path / "back"), "--tokenizer", str(plain)]
    assert main(back) == 2
    assert "--open_clip_model: say what" in capsys.readouterr().err
    assert main([*back, "--open_clip_model", "ViT-B-16"]) == 2
    assert "does not fit ViT-B-16" in capsys.readouterr().err and not (tmp_path / "back").exists()
    monkeypatch.setitem(MODELS, "ViT-tiny", json.loads((weights.parent / "open_clip_config.json").read_text())["model_cfg"])
    assert main([*back, "--open_clip_model", "ViT-tiny-quickgelu"]) == 0
    again, info = AutoModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and all(torch.equal(w, model.state_dict()[n]) for n, w in again.state_dict().items())
    picture = random_picture(0)
    pixels = [
        CLIPProcessor.from_pretrained(p)(images=picture, return_tensors="pt")["pixel_values"]
        for p in (plain, tmp_path / "back")
    ]
    assert torch.equal(*pixels)
