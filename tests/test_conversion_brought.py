"""Proves what becomes of the checkpoints, folders and processors that people bring: read as they are, or refused
in one line."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPForImageClassification, CLIPImageProcessor, CLIPProcessor, SiglipConfig, SiglipModel

from hf_maskclip.cli import main
from hf_maskclip.conversion.checkpoint import read_checkpoint
from hf_maskclip.conversion.open_clip import export_to_open_clip
from hf_maskclip.conversion.open_clip_architecture import clip_config
from hf_maskclip.evaluation.report import draw_report, make_tables
from hf_maskclip.evaluation.report_files import read_result_file

WEIGHTS = {"visual.proj": torch.ones(2, 3), "positional_embedding": torch.zeros(4, 2)}
LR = {"param_groups": [{"lr": np.float64(0.1), "betas": (np.float32(0.9), 0.98)}]}
CONTENTS = {
    "numpy scalars": {"state_dict": WEIGHTS, "optimizer": LR},
    "namespace": {"model": WEIGHTS, "args": argparse.Namespace(lr=0.1)},
    "compiled, distributed": {"state_dict": {f"module._orig_mod.{k}": v for k, v in WEIGHTS.items()}},
    "nested": {"model": {"state_dict": {f"_orig_mod.module.model.{k}": v for k, v in WEIGHTS.items()}}},
    "compiled inside": {"visual._orig_mod.proj": WEIGHTS["visual.proj"], "text.positional_embedding": torch.zeros(4, 2)},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_real_checkpoints_are_read(name, tmp_path):
    torch.save(CONTENTS[name], tmp_path / "epoch.pt")
    found = read_checkpoint(tmp_path / "epoch.pt").weights
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)


def test_shards_are_read_by_their_index_and_an_average_by_its_key(tmp_path):
    for number, (name, weight) in enumerate(WEIGHTS.items(), 1):
        save_file({name: weight}, tmp_path / f"m-0000{number}-of-00002.safetensors")
    index = {name: f"m-0000{n}-of-00002.safetensors" for n, name in enumerate(WEIGHTS, 1)}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert read_checkpoint(tmp_path / "m.safetensors.index.json").weights.keys() == WEIGHTS.keys()
    with pytest.raises(ValueError, match="is a shard of a checkpoint"):
        read_checkpoint(tmp_path / "m-00001-of-00002.safetensors")
    zeros = {name: torch.zeros_like(weight) for name, weight in WEIGHTS.items()}
    torch.save({"state_dict": zeros, "state_dict_ema": WEIGHTS}, tmp_path / "ema.pt")
    assert read_checkpoint(tmp_path / "ema.pt").averages == ["state_dict_ema"]
    assert read_checkpoint(tmp_path / "ema.pt", "state_dict_ema").weights["visual.proj"].sum() == 6


def test_what_is_refused_says_why(tmp_path):
    torch.save({"visual.proj": torch.full((2, 2), torch.nan)}, tmp_path / "nan.pt")
    save_file(WEIGHTS, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-9])
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "jit.pt")
    for file, words in (("nan.pt", "NaN"), ("cut.safetensors", "damaged or cut off"), ("jit.pt", "openai/clip-vit-")):
        with pytest.raises(ValueError, match=words):
            read_checkpoint(tmp_path / file)


@pytest.mark.parametrize("name", ["vit-b-16", "ViT-B/16", "ViT-B-16", "VIT_B_16"])
def test_sizes_follow_from_weights_and_names_are_understood(name):
    weights = {"visual.positional_embedding": torch.zeros(1 + 8 * 8, 768), "visual.conv1.weight": torch.zeros(768, 3, 16, 16)}
    weights |= {"positional_embedding": torch.zeros(32, 512), "token_embedding.weight": torch.zeros(1000, 512)}
    config = clip_config(name, {}, weights)
    text = config.text_config
    assert (config.vision_config.image_size, text.max_position_embeddings, text.vocab_size) == (128, 32, 1000)


def test_preprocessing_is_written_as_it_is_or_refused(make_clip, tokenizer, tmp_path):
    size = {"height": 32, "width": 32}
    squash = CLIPImageProcessor(size=size, do_center_crop=False, resample=2)
    export_to_open_clip(make_clip(), tmp_path / "a", CLIPProcessor(squash, tokenizer))
    written = json.loads((tmp_path / "a" / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert (written["interpolation"], written["resize_mode"], written["size"]) == ("bilinear", "squash", [32, 32])
    margin = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=size)
    with pytest.raises(ValueError, match="open_clip resizes to the size that it crops"):
        export_to_open_clip(make_clip(), tmp_path / "b", CLIPProcessor(margin, tokenizer))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("command", ["evaluate", "demo", "masks", "convert", "export"])
@pytest.mark.parametrize("kind", ["siglip", "classifier", "missing", "empty"])
def test_each_command_refuses_in_one_line(command, kind, config_parts, processor, tmp_path, capsys):
    folder = tmp_path / "no" / kind
    if kind == "siglip":
        if command in ("export", "masks"):
            pytest.skip("takes a SigLIP")
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        SiglipModel(SiglipConfig(text_config=small | {"vocab_size": 99}, vision_config=small)).save_pretrained(folder)
    elif kind == "classifier":
        if command in ("export", "masks"):
            pytest.skip("takes a classifier")
        CLIPForImageClassification(CLIPConfig(**config_parts())).save_pretrained(folder)
    elif kind == "empty":
        folder.mkdir(parents=True)
    if kind in ("siglip", "classifier"):
        processor.save_pretrained(folder)
    random = tmp_path / "p.png"
    torch_picture = np.zeros((32, 32, 3), dtype=np.uint8)
    from PIL import Image

    Image.fromarray(torch_picture).save(random)
    arguments = {
        "evaluate": ["--model", folder, "--suite", "scenes", "--output", tmp_path / "e.json"],
        "demo": ["--model", folder],
        "masks": [random, "--model", folder, "--mask", "attentive", "-o", tmp_path / "m.png"],
        "convert": [folder, tmp_path / "out", "--to", "open_clip"],
        "export": [folder, tmp_path / "out"],
    }[command]
    assert main([command, *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    words = {"siglip": "siglip", "missing": "no such folder", "empty": "holds no model", "classifier": "no weights for"}
    assert words[kind] in error
    assert [line for line in error.splitlines() if line.startswith("error: ")] == [error.splitlines()[-1]]
    assert not (tmp_path / "out").exists()


def results(folder, name, column, value, **about):
    record = {"family": "zero_shot", "column": column, "data": "d", "top1": value} | about
    (folder / name).write_text(json.dumps({"model": name, "results": {"r": record}}))
    return folder / name


def test_two_models_of_a_folder_are_two_rows_and_no_family_vanishes(tmp_path):
    files = [
        results(tmp_path, "a.json", "Food101", 0.5, model_hash="1"),
        results(tmp_path, "b.json", "Cars", 0.4, model_hash="2"),
    ]
    (table,) = make_tables(map(read_result_file, files))
    assert len(table.rows) == 2
    means, over = table.means()
    assert sorted(means.values()) == [40.0, 50.0]
    assert "no set in common" in over
    labels = [label.get_text() for label in draw_report([table]).axes[0].get_xticklabels()]
    assert "no set in common" in labels[0]


def test_a_nan_and_an_empty_file_are_errors(tmp_path, capsys):
    with pytest.raises(ValueError, match="zero_shot Food101 is no number"):
        make_tables([read_result_file(results(tmp_path, "a.json", "Food101", float("nan")))])
    (tmp_path / "e.json").write_text('{"results": {}}')
    assert main(["report", str(tmp_path / "e.json")]) == 2
    assert "no results in it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_command_that_saves_weights_prints_its_own_line_alone(make_clip, processor, tmp_path):
    """Where DeepSpeed is installed, saving imports it, and it writes to stdout."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is of the test extra")
    make_clip().save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    printed = {}
    for name, code in {
        "command": "import sys; from hf_maskclip.cli import main; main(sys.argv[1:])",
        "library": "import sys; from hf_maskclip import commands; from hf_maskclip.cli import build_parser; "
        "commands.export(build_parser().parse_args(sys.argv[1:]))",
    }.items():
        command = [sys.executable, "-c", code, "export", str(tmp_path / "plain"), str(tmp_path / name)]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert finished.returncode == 0, finished.stderr[-2000:]
        printed[name] = finished.stdout.splitlines()
    if not torch.accelerator.is_available():
        assert len(printed["library"]) == 2  # DeepSpeed's line is there to be kept out
    assert len(printed["command"]) == 1
