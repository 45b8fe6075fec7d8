"""Proves that the options are read as meant, and that what cannot be meant is one clear line and exit code 2."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_maskclip.errors import ConfigError
from training.config import TrainingConfig, load_config, option_name
from training.launch.option_names import OTHER_NAMES
from training.model import precision as fastest

ROOT = Path(__file__).resolve().parents[1]


def test_defaults_are_the_quickstart():
    config = load_config([])
    assert (config.train_data, config.model, config.output_dir) == ("scenes", "tiny", "runs/quickstart")
    assert config.max_steps > 0
    assert config.log_every == 1


def test_each_option_says_what_it_is():
    options = dataclasses.fields(TrainingConfig)
    assert all(len(option.metadata["help"]) > 10 for option in options)


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: small\nlearning_rate: 5e-4\npatch_mask: {name: cluster, mask_ratio: 0.4}\nmixed_precision: no\n")
    config = load_config(["--config", str(file), "--model", "tiny", "--max-steps=7", "--learning_rate", "1e-3"])
    assert (config.model, config.max_steps, config.learning_rate, config.mixed_precision) == ("tiny", 7, 1e-3, "no")
    assert config.patch_mask["name"] == "cluster"
    assert config.patch_mask["mask_ratio"] == 0.4


def test_a_mask_is_a_name_or_a_mapping():
    assert load_config(["--patch_mask", "random"]).patch_mask == {"name": "random", "mask_ratio": 0.5}
    assert load_config(["--patch_mask", "{name: random, mask_ratio: 0.75}"]).patch_mask["mask_ratio"] == 0.75


@pytest.mark.parametrize("name", [name for names in OTHER_NAMES.values() for name in names.split()])
def test_what_other_programs_call_an_option_is_no_option_and_leads_to_one(name):
    with pytest.raises(ConfigError, match=f"unknown option '{name}': did you mean '\\w+' "):
        load_config([f"--{name}", "1"])
    assert OTHER_NAMES.keys() <= {option_name(item) for item in dataclasses.fields(TrainingConfig)}


def test_a_switch_alone_is_true():
    assert load_config(["--compile"]).compile
    assert load_config(["--compile", "--model", "small"]).compile


def test_text_that_looks_like_a_number_stays_text():
    assert load_config(["--train_data", "2024", "--output_dir", "1e3"]).train_data == "2024"


def test_the_budget_is_in_steps_or_samples():
    assert load_config(["--max_steps", "40"]).schedule(2) == (40, 4)
    assert load_config(["--samples_seen", "1000", "--batch_size", "64", "--warmup_steps", "3"]).schedule(2) == (8, 3)
    with pytest.raises(ConfigError, match="unmasked_tuning_steps=50: the run has only 40 steps"):
        load_config(["--max_steps", "40", "--unmasked_tuning_steps", "50"]).schedule(1)


BAD = [
    (["--learning_rat", "1"], "unknown option 'learning_rat': did you mean 'learning_rate'?"),
    (["--lr", "1e-3"], "unknown option 'lr': did you mean 'learning_rate' (peak of the cosine schedule)?"),
    (["--epochs", "3"], "unknown option 'epochs': did you mean 'samples_seen' (image-text pairs over all processes; 0:"),
    (["--name", "x"], "unknown option 'name': did you mean 'output_dir' (folder of the run; an earlier run"),
    (["--val-frequency", "2"], "unknown option 'val_frequency': did you mean 'eval_every' (steps between evaluations;"),
    (["--accum-freq", "2"], "unknown option 'accum_freq': did you mean 'chunk_size' (pairs encoded at a time"),
    (["--siglip", "true"], "unknown option 'siglip': did you mean 'loss'"),
    (["--lr_scheduler", "constant"], "unknown option 'lr_scheduler': must be one of output_dir"),
    (["--image_depth", "96"], "unknown option 'image_depth': must be one of output_dir"),
    (
        ["--config", str(ROOT / "training/launch/ddp.yaml")],
        f"config='{ROOT}/training/launch/ddp.yaml': is for accele",
    ),
    (["--config"], "--config: needs a value"),
    (["--qqq", "1"], "unknown option 'qqq': must be one of output_dir"),
    (["--max_steps", "many"], "max_steps='many': must be a whole number"),
    (["--max_steps", "1.5"], "max_steps=1.5: must be a whole number"),
    (["--max_steps", "true"], "max_steps=True: must be a whole number"),
    (["--max_steps", "-1"], "max_steps=-1: must be at least 0"),
    (["--learning_rate", "nan"], "learning_rate=nan: must be at least 0"),
    (["--max_steps"], "--max_steps: needs a value"),
    (["max_steps", "3"], "unexpected argument 'max_steps': options are given as --key value"),
    (["--mixed_precision", "fp16"], "mixed_precision='fp16': must be one of 'auto', 'bf16', 'no'"),
    (["--max_steps", "3", "--samples_seen", "9"], "max_steps=3 and samples_seen=9: give one of the two budgets"),
    (["--patch_mask", "pqs"], "unknown patch mask 'pqs': must be one of none, random, gaussian, block"),
    (["--patch_mask", "{name: pgs, ratio: 1}"], "patch mask 'pgs' has no option 'ratio'"),
    (["--patch_mask", "3"], "patch_mask=3: must be text or a mapping such as {name: pgs}"),
    (["--crop_scale", "0"], "crop_scale=0.0: must be above 0 and at most 1"),
    (["--mask_schedule", "2"], "mask_schedule=2.0: must be at least 0 and at most 1"),
    (["--text_mask", "random"], "text_mask='random' and text_tokens=0: a text mask and its tokens go together"),
    (["--text_tokens", "9"], "text_mask='none' and text_tokens=9: a text mask and its tokens go together"),
    (["--text_mask", "block", "--text_tokens", "2"], "text_tokens=2: must be at least 3"),
    (
        ["--text_mask", "random", "--text_tokens", "9", "--word_frequencies", "words.json"],
        "word_frequencies='words.json' and text_mask='random': only text_mask frequency goes by words",
    ),
    (["--word_threshold", "1e-5"], "word_threshold=1e-05 and text_mask='none': only text_mask frequency goes by words"),
    (["--text_mask", "syntax"], "text_mask='syntax': must be one of 'none', 'random', 'truncate', 'block', 'frequency'"),
    (["--compile", "1"], "compile=1: must be true or false"),
    (["--flip", "2"], "flip=2.0: must be at least 0 and at most 1"),
    (["--stream", "endless"], "stream='endless': must be one of 'exact', 'resampled'"),
    (["--max_skipped_share", "1.5"], "max_skipped_share=1.5: must be at least 0 and at most 1"),
    (["--ema_momentum", "1"], "ema_momentum=1.0: must be at least 0 and below 1"),
    (["--freeze", "both"], "freeze='both': must be one of 'none', 'vision', 'text'"),
    (["--lora_rank", "-1"], "lora_rank=-1: must be at least 0"),
    (["--lock_image"], "unknown option 'lock_image': did you mean 'freeze' (tower that stays as it is, with its projection"),
    (["--batch_size", "1"], "batch_size=1: must be at least 2"),
    (["--vocab_size", "10"], "vocab_size=10: must be at least 1000"),
    (["--config", "absent.yaml"], "config='absent.yaml': no such file"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_what_cannot_be_meant_is_one_line(arguments, message):
    with pytest.raises(ConfigError) as error:
        load_config(arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["model: [", "- 3", "model small", "modell: small", "max_steps: yes"])
def test_a_bad_file_is_one_line(content, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_config(["--config", str(file)])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_program_ends_with_code_2_and_the_line_and_writes_nothing(tmp_path):
    output_dir = tmp_path / "run"
    command = [sys.executable, str(ROOT / "training" / "train.py"), "--output_dir", str(output_dir), "--batchsize", "3"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1] == "error: unknown option 'batchsize': did you mean 'batch_size'?"
    assert "Traceback" not in finished.stderr
    assert not output_dir.exists()


@pytest.mark.parametrize(
    ("info", "precision"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f amx_bf16 amx_tile\n", "bf16"),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", "bf16"),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", "no"),
        ("Features\t: fp asimd bf16 i8mm\n", "bf16"),
        ("", "no"),
    ],
)
def test_the_precision_is_the_fastest_of_the_machine_and_the_record_says_which(info, precision, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(fastest, "CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(info)
    assert TrainingConfig().as_options()["mixed_precision"] == precision
    assert TrainingConfig(mixed_precision="bf16").mixed_precision == "bf16"
