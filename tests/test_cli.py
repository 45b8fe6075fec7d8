"""Proves that the command line does what its help says, and that what it cannot do is one line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import random_picture
from PIL import Image
from transformers import AutoModel, CLIPModel, CLIPProcessor, CLIPVisionModel, ViTConfig

from hf_maskclip import MaskCLIPModel, MaskCLIPVisionModel, export_to_clip
from hf_maskclip.cli import EXAMPLES, build_parser, main
from hf_maskclip.conversion.open_clip_architecture import MODELS

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
    assert main([*command, "-o", str(attentive)]) == 0
    assert attentive.stat().st_size > 5_000
    assert main([*command, "--patch_size", "16"]) == 2
    assert main(["masks", *pictures, *SIZES, "--mask", "pgs", "--steps", "-o", str(steps)]) == 0
    assert steps.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.png"], "absent.png: no such file"),
        (["{picture}", "--patch_size", "0"], "both sides must be multiples of the patch size 0"),
        (["{picture}", "--mask", "pgs", "--model", "somewhere"], "none of the masks goes by a model's attention"),
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
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("masks.*"))


@pytest.mark.slow
def test_the_installed_command_runs():
    program = Path(sys.executable).with_name("hf-maskclip")
    finished = subprocess.run([program, "masks", "--help"], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0
    assert "--steps" in finished.stdout


def test_the_help_has_an_example_of_every_command():
    (commands,) = [action.choices for action in build_parser()._actions if action.choices]
    assert len(commands) >= 6
    assert [name for name in commands if f"    hf-maskclip {name} " not in EXAMPLES] == []


@pytest.mark.slow
def test_the_help_does_not_wait_for_what_single_commands_need():
    code = "import sys, hf_maskclip.cli; print({'datasets', 'evaluate', 'matplotlib'} & set(sys.modules))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert finished.stdout.strip() == "set()"


@pytest.fixture
def run_dir(make_model, processor, tmp_path):
    """The folder of a run that has not ended: two checkpoints, and a third that is not complete."""
    for step, name in enumerate(("step-00000002", "step-00000010", "step-00000012.partial")):
        folder = tmp_path / "run" / "checkpoints" / name
        make_model({"name": "random", "mask_ratio": 0.75}, seed=step).save_pretrained(folder)
        processor.save_pretrained(folder)
    return tmp_path / "run"


def weights_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(weight, second.state_dict()[name]) for name, weight in first.state_dict().items())


def test_export_makes_a_plain_clip_of_a_checkpoint_and_of_a_run(run_dir, make_model, tmp_path, capsys):
    second = make_model(seed=1)
    assert not weights_equal(second, make_model(seed=0))
    checkpoints = run_dir / "checkpoints"
    for source, seed in ((checkpoints / "step-00000002", 0), (checkpoints / "step-00000010", 1), (run_dir, 1)):
        output = tmp_path / f"export of {source.name}"
        assert main(["export", str(source), str(output)]) == 0
        assert f'AutoModel.from_pretrained("{output}")' in capsys.readouterr().out
        plain = AutoModel.from_pretrained(output)
        assert type(plain) is CLIPModel
        assert weights_equal(plain, make_model(seed=seed))
        assert plain.config.vision_config.patch_mask == {"name": "random", "mask_ratio": 0.75}
        CLIPProcessor.from_pretrained(output)
    assert main(["export", str(checkpoints / "step-00000002"), str(run_dir / "export")]) == 0
    assert main(["export", str(run_dir), str(tmp_path / "ended")]) == 0  # a run's export comes before its checkpoints
    assert weights_equal(AutoModel.from_pretrained(tmp_path / "ended"), make_model(seed=0))


def test_export_writes_the_code_too_and_takes_plain_folders_and_towers(run_dir, tmp_path, capsys):
    plain, code, tower = tmp_path / "plain", tmp_path / "code", tmp_path / "tower"
    assert main(["export", str(run_dir), str(plain)]) == 0
    assert main(["export", str(plain), str(code), "--remote_code"]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    assert (code / "modeling_maskclip.py").is_file()
    masked = AutoModel.from_pretrained(code)
    assert type(masked) is MaskCLIPModel
    assert masked.config.vision_config.patch_mask["mask_ratio"] == 0.75
    MaskCLIPVisionModel.from_pretrained(plain).save_pretrained(tower)
    CLIPProcessor.from_pretrained(plain).image_processor.save_pretrained(tower)
    assert main(["export", str(tower), str(tmp_path / "plain tower")]) == 0
    assert type(AutoModel.from_pretrained(tmp_path / "plain tower")) is CLIPVisionModel


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    ViTConfig(architectures=["ViTModel"]).save_pretrained(tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    for source, message in (
        ("vit", "is a 'vit', no model of a known family; known are CLIP (clip), "),
        ("empty", "holds no model, it has neither config.json nor export/ nor checkpoints/"),
    ):
        assert main(["export", str(tmp_path / source), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


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
    weights = (tmp_path / "there" / "open_clip_model.safetensors").rename(tmp_path / "weights.safetensors")

    back = ["convert", str(weights), str(tmp_path / "back"), "--tokenizer", str(plain)]
    assert main(back) == 2
    assert "--open_clip_model: say what" in capsys.readouterr().err
    assert main([*back, "--open_clip_model", "ViT-B-16"]) == 2
    assert "does not fit ViT-B-16" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
    monkeypatch.setitem(MODELS, "ViT-tiny", json.loads((tmp_path / "there" / "open_clip_config.json").read_text())["model_cfg"])
    assert main([*back, "--open_clip_model", "ViT-tiny-quickgelu"]) == 0
    again, info = AutoModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"]
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in again.state_dict().items())
    picture = random_picture(0)
    pixels = [
        CLIPProcessor.from_pretrained(p)(images=picture, return_tensors="pt")["pixel_values"]
        for p in (plain, tmp_path / "back")
    ]
    assert torch.equal(*pixels)


def test_a_folder_without_a_whole_clip_is_not_filled_with_random_weights(run_dir, processor, tmp_path, capsys):
    tower, plain = tmp_path / "tower", tmp_path / "plain"
    assert main(["export", str(run_dir), str(plain)]) == 0
    MaskCLIPVisionModel.from_pretrained(plain).save_pretrained(tower)
    processor.save_pretrained(tower)
    capsys.readouterr()
    assert main(["convert", str(tower), str(tmp_path / "out"), "--to", "open_clip"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(plain), str(tmp_path / "out"), "--to", "open_clip", "--open_clip_model", "ViT-B-16"]) == 2
    assert "are of a checkpoint of open_clip" in capsys.readouterr().err
    assert main(["convert", str(run_dir), str(tmp_path / "out"), "--to", "open_clip"]) == 0
