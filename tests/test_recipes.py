"""Proves that each recipe and each launch file is read as it is meant, with the papers' numbers, and that a dry run of a recipe
says what the run would take."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from helpers import pair, words, write_shard
from processes import Processes

from hf_maskclip import MaskCLIPModel
from training.config import load_config
from training.dry_run import dry_run, saved_activations
from training.model.presets import preset_config
from training.train import program

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
LAUNCH_FILES = sorted((ROOT / "training" / "launch").glob("*.yaml"))
CC12M_PAIRS, EPOCHS = 10_968_539, 32
PGS = {"batch_size": 512, "learning_rate": 1e-3, "warmup_steps": 10_000}
CLUSTER = {"batch_size": 256, "learning_rate": 5e-4, "warmup_steps": 2000}
FREQUENCY = {"text_mask": "frequency", "text_tokens": 8}
# Masks and hyper-parameters of arXiv 2503.17080 and 2405.08815; other reductions with those of the former.
PAPERS = {
    "clip-b16": ({"name": "none"}, PGS),
    "flip-0.5-b16": ({"name": "random", "mask_ratio": 0.5}, PGS),
    "flip-0.75-b16": ({"name": "random", "mask_ratio": 0.75}, PGS),
    "e-clip-b16": ({"name": "cluster", "mask_ratio": 0.5}, CLUSTER),
    "a-clip-b16": ({"name": "attentive", "mask_ratio": 0.5}, PGS),
    "clip-pgs-0.5-b16": ({"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5, "candidate_ratio": 0.05}, PGS),
    "clipf-b16": ({"name": "random", "mask_ratio": 0.5}, PGS | FREQUENCY),
    "clip-pgs-0.5-frequency-b16": ({"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}, PGS | FREQUENCY),
    "resize-112-b16": ({"name": "none"}, PGS | {"phases": [{"share": 0.9, "image_size": 112}, {"share": 0.1}]}),
    "a-clip-two-views-b16": ({"name": "attentive", "mask_ratio": 0.5}, PGS | {"views": "crops", "crop_scale": 0.5}),
    "clip-pgs-0.3-b16": ({"name": "pgs", "min_mask_ratio": 0.3, "max_mask_ratio": 0.5, "candidate_ratio": 0.05}, PGS),
}


def head(file: Path) -> str:
    """The comment at the top of a file, as one line."""
    lines = file.read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines[: lines.index("")] if line.startswith("#"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_has_the_papers_mask_and_hyper_parameters(file):
    config = load_config(["--config", str(file)])
    mask, numbers = PAPERS[file.stem]
    assert mask.items() <= config.patch_mask.items()
    assert numbers == {key: getattr(config, key) for key in numbers}
    assert config.samples_seen == CC12M_PAIRS * EPOCHS
    assert config.weight_decay == 0.2
    assert config.model == "vit-b-16"
    steps, warmup = config.schedule(num_processes=8)
    assert steps == -(-config.samples_seen // (8 * config.batch_size))
    assert warmup == numbers["warmup_steps"]
    assert config.output_dir == f"runs/{file.stem}"
    assert config.resume == "auto"
    assert config.checkpoint_every


def test_every_published_run_has_a_recipe():
    assert {file.stem for file in RECIPES} == PAPERS.keys()


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_says_how_to_run_it_on_what_how_long_and_with_which_data(file):
    text = head(file)
    for part in ("Command:", "Hardware:", "Time:", "Expected numbers:", "Data:", "img2dataset --url_list", "hf download"):
        assert part in text
    command = text.partition("Command: ")[2].partition(" Hardware:")[0]
    arguments = shlex.split(command)
    assert arguments[:2] == ["accelerate", "launch"]
    assert arguments[-1] == f"training/recipes/{file.name}"
    assert all((ROOT / word).is_file() for word in arguments if word.endswith((".yaml", ".py")))


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_a_launch_file_is_one_that_accelerate_takes(file, monkeypatch):
    """As far as that can be seen where there is no GPU: Accelerate reads it and would start these processes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = load_config_from_file(str(file))
    values = yaml.safe_load(file.read_text())
    assert values.items() <= {**vars(config), "distributed_type": config.distributed_type.value}.items()
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "training/train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == values["num_processes"]
    assert arguments.num_machines == values["num_machines"]
    assert arguments.multi_gpu == (values["distributed_type"] == "MULTI_GPU")
    assert bool(arguments.use_cpu or arguments.cpu) == values["use_cpu"]
    assert arguments.use_deepspeed == (values["distributed_type"] == "DEEPSPEED") == (file.stem == "deepspeed-zero2")
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(values["deepspeed_config"])  # as `launch_command` does
        command, environment = prepare_deepspeed_cmd_env(arguments)
        assert not command
        assert int(arguments.nproc_per_node) == values["num_processes"]
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    if arguments.multi_gpu:
        environment = prepare_multi_gpu_env(arguments)
        assert int(arguments.nproc_per_node) == values["num_processes"] // values["num_machines"]
        assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (values["distributed_type"] == "FSDP")
        if file.stem in ("fsdp2", "zero2"):
            assert environment["FSDP_VERSION"] == "2"
            assert environment["FSDP_RESHARD_AFTER_FORWARD"] == str(file.stem == "fsdp2").lower()


def test_there_are_launch_files_for_one_machine_and_several():
    names = ["cpu-2-processes", "ddp", "deepspeed-zero2", "fsdp2", "multi-node", "one-gpu", "zero2"]
    assert [file.stem for file in LAUNCH_FILES] == names
    script = (ROOT / "training" / "launch" / "multi-node.sbatch").read_text()
    for word in shlex.split(script, comments=True):
        assert not word.endswith(".yaml") or (ROOT / word).is_file(), word


@pytest.fixture
def small_data(tmp_path, tokenizer):
    """What takes the place of a recipe's data and tokenizer, which are on the Hub."""
    write_shard(tmp_path / "a.tar", {str(n): pair(n) for n in range(12)})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return [
        "--train_data",
        f"{tmp_path}/a.tar",
        "--tokenizer",
        f"{tmp_path}/tokenizer",
        "--num_workers",
        "0",
        "--resume",
        "none",
    ]


@pytest.mark.slow
def test_a_dry_run_of_a_recipe_says_what_it_takes_and_writes_nothing(small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = ROOT / "training" / "recipes" / "clip-pgs-0.5-b16.yaml"
    config = load_config(["--config", str(file), *small_data])
    numbers = dry_run(config)
    printed = capsys.readouterr().out
    model = MaskCLIPModel(preset_config("vit-b-16", "none", vocab_size=1000))
    assert abs(numbers["parameters"] - sum(p.numel() for p in model.parameters())) < 2e6  # another vocabulary
    assert numbers["steps"] == -(-350_993_248 // 512)
    assert numbers["kept_patches"] == 98
    # 12 x (24 D^2 + 4 S D) a token and three times that with the backward pass; the patch embedding and the texts on top.
    towers = 3 * 12 * 99 * (24 * 768**2 + 4 * 99 * 768) * 512
    assert towers < numbers["flops_per_step"] < 1.3 * towers
    assert numbers["state_bytes"] == 16 * numbers["parameters"]
    assert 10e9 < numbers["activation_bytes"] < 60e9
    assert "98 of 196 patches visible" in printed
    assert "vit-b-16" in printed
    assert not (tmp_path / "runs").exists()


def test_activations_are_counted_once_and_without_the_weights():
    linear = torch.nn.Linear(10, 20)
    inputs = torch.randn(4, 10, requires_grad=True)
    with saved_activations(linear) as sizes:
        hidden = linear(inputs).exp()  # keeps its inputs, and the exponential its result
        (hidden * hidden).sum().backward()
    assert sorted(sizes.values()) == [4 * 10 * 4, 4 * 20 * 4]


def test_a_dry_run_is_a_word_on_the_command_line(small_data, capsys, tmp_path):
    sizes = ["--model", "tiny", "--batch_size", "16", "--chunk_size", "4"]
    arguments = ["--dry_run", *sizes, "--output_dir", str(tmp_path / "run"), *small_data]
    assert program(arguments) == 0
    printed = capsys.readouterr().out
    assert "600 steps of 16 pairs x 1 processes" in printed
    assert "one step    of 4 pairs" in printed
    assert program([*arguments, "--train_data", "absent.tar"]) == 2
    assert capsys.readouterr().err == "error: 'absent.tar': there is no 'absent.tar'\n"


@pytest.mark.slow
def test_the_table_of_a_dry_run_on_two_processes_is_printed_once(options, tmp_path):
    processes = Processes(2, tmp_path, program, words(options | {"dry_run": True}))
    assert processes.wait() == [0, 0], processes.printed()
    assert processes.printed().count("4 steps of 4 pairs x 2 processes") == 1
    assert processes.printed().count("FLOPs ") == 1


def test_under_slurm_each_process_gets_the_signal_itself_and_minutes_to_save():
    """`accelerate launch` would kill it after 30 seconds."""
    script = (ROOT / "training" / "launch" / "multi-node.sbatch").read_text(encoding="utf-8")
    seconds = re.search(r"^#SBATCH --signal=TERM@(\d+)$", script, re.MULTILINE)
    assert seconds
    assert int(seconds[1]) >= 300
    (command,) = [word for word in shlex.split(script, comments=True) if "exec python training/train.py" in word]
    given = set(re.findall(r"(\w+)=", script))
    assert {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= given
    assert "--resume auto" in command
    assert "accelerate" not in " ".join(shlex.split(script, comments=True))


def test_launch_files_of_several_processes_say_what_the_launcher_does_at_sigterm():
    several = [file for file in LAUNCH_FILES if file.stem != "one-gpu"]
    assert len(several) == 6
    assert all("killed 30 s later, and the launcher exits with 1" in file.read_text(encoding="utf-8") for file in several)
