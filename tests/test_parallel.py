"""Proves that processes which share weights (FSDP2) or moments (DeepSpeed) train like whole ones and go on exactly, that none
waits for another between steps, and that what cannot be shared is refused."""

import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import FailingLoss, as_killed_at, losses_of, require, same, words
from processes import Processes
from torch.distributed.tensor import DTensor
from transformers import AutoModel

from hf_maskclip import MaskCLIPModel, losses
from hf_maskclip.errors import ConfigError
from training.model import loss as loss_module
from training.parallel import choose, fsdp
from training.parallel.deepspeed import TAG, DeepSpeedParallel
from training.saving.checkpoint import latest_checkpoint
from training.tracking import read_metrics
from training.train import program


@pytest.mark.slow
def test_two_processes_evaluate_and_save_between_steps_without_waiting_for_each_other(options, data, tmp_path):
    options |= {"eval_data": f"{data}/val-0.tar", "checkpoint_every": 1, "eval_every": 1, "chunk_size": 2, "ema_momentum": 0.9}
    assert Processes(2, tmp_path, program, words(options)).wait() == [0, 0]
    steps = losses_of(options["output_dir"])
    assert [record["samples_seen"] for record in steps] == [8, 16, 24, 32]
    evaluated = [
        r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/retrieval_data/text_to_image_recall@5" in r
    ]
    assert [record["step"] for record in evaluated] == [1, 2, 3, 4]
    assert not AutoModel.from_pretrained(tmp_path / "run" / "export", output_loading_info=True)[1]["missing_keys"]


def train_sharded(arguments: list[str]) -> int:
    """The program as a launch file with `distributed_type: FSDP` starts it."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    shard = fsdp.shard

    def reporting_shard(model, accelerator):
        shard(model, accelerator)
        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        print(f"whole weights: {whole}")
        return model

    fsdp.shard = reporting_shard
    return program(arguments)


def train_with_deepspeed(arguments: list[str]) -> int:
    """The program as a launch file with `distributed_type: DEEPSPEED` starts it."""
    import deepspeed

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile, for CPUs only

    class ReportingDeepSpeed(DeepSpeedParallel):
        def wrap(self, config):
            super().wrap(config)
            parts = self.wrapped_model.optimizer.single_partition_of_fp32_groups
            print(f"share of the weights: {sum(map(torch.numel, parts)) / self.model.num_parameters():.2f}")

        def step(self):
            super().step()
            logit_scale = deepspeed.utils.safe_get_full_fp32_param(self.model.logit_scale)
            print(f"logit scale of the optimizer: {logit_scale.item():.3f}")

    choose.DeepSpeedParallel = ReportingDeepSpeed
    return program(arguments)


def train_with_deepspeed_until_the_loss_fails(arguments: list[str]) -> int:
    losses.MAX_LOGIT_SCALE = 2.0  # below where it starts
    loss_module.ContrastiveLoss, FailingLoss.fails_at = FailingLoss, 3
    return train_with_deepspeed(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "line", "more"),
    [
        (train_sharded, "whole weights: ['logit_scale']", {}),
        (train_with_deepspeed, "share of the weights: 0.50", {"max_grad_norm": 0.5, "ema_momentum": 0.9}),
    ],
)
def test_what_processes_share_trains_like_whole_weights_and_goes_on_exactly(train, line, more, options, data, tmp_path):
    """FSDP2 splits the weights, DeepSpeed the moments of AdamW."""
    if train is train_with_deepspeed:
        require("deepspeed")
    options |= more | {
        "max_steps": 8,
        "eval_data": f"{data}/val-0.tar",
        "checkpoint_every": 4,
        "eval_every": 4,
        "resume": "auto",
        "chunk_size": 2,
    }
    whole = options | {"output_dir": tmp_path / "whole"}
    assert Processes(2, tmp_path / "a", program, words(whole)).wait() == [0, 0]
    split = Processes(2, tmp_path / "b", train, words(options))
    assert split.wait() == [0, 0], split.printed()[-3000:]
    assert split.printed().count(line) == 2
    steps, expected = losses_of(options["output_dir"]), losses_of(whole["output_dir"])
    assert [r["loss"] for r in steps] == pytest.approx([r["loss"] for r in expected], rel=1e-3)
    results = [json.loads((Path(o["output_dir"]) / "eval.json").read_text())["results"] for o in (options, whole)]
    assert results[0].keys() == results[1].keys()
    weights, wanted = (AutoModel.from_pretrained(f / "export").state_dict() for f in (tmp_path / "run", tmp_path / "whole"))
    for key, value in weights.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-2, atol=2e-3)
    MaskCLIPModel.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000004")
    as_killed_at(tmp_path / "run", 4)
    split = Processes(2, tmp_path / "c", train, words(options))
    assert split.wait() == [0, 0], split.printed()[-3000:]
    assert same(losses_of(options["output_dir"])) == same(steps)


@pytest.mark.slow
def test_deepspeed_keeps_the_bound_of_the_logit_scale_and_the_state_before_a_loss_that_is_not_a_number(options, tmp_path):
    require("deepspeed")
    split = Processes(2, tmp_path / "a", train_with_deepspeed_until_the_loss_fails, words(options))
    assert split.wait() == [2, 2], split.printed()[-3000:]
    logit_scales = [float(number) for number in re.findall("logit scale of the optimizer: (.*)", split.printed())]
    assert len(logit_scales) == 4
    assert all(1.99 < number <= 2 for number in logit_scales)
    before = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert f"error: step 3: the loss is nan; the state before it is {before}" in split.printed()
    records = losses_of(options["output_dir"])
    assert math.log(records[1]["logit_scale"]) == pytest.approx(logit_scales[0], abs=1e-3)  # that its loss was taken with
    assert MaskCLIPModel.from_pretrained(before).logit_scale.item() == pytest.approx(logit_scales[1], abs=1e-3)


def test_a_run_goes_on_with_deepspeed_or_without_as_it_began(run, monkeypatch):
    require("deepspeed")
    _, _, folder = run(checkpoint_every=2)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        ConfigError, match="step-00000004 was saved by DDP or one process, and this run is one of DeepSpeed: go on as it began"
    ):
        run(resume="auto")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    (latest_checkpoint(folder) / TAG).mkdir()
    (latest_checkpoint(folder) / "optimizer.bin").unlink()
    with pytest.raises(ConfigError, match="step-00000004 was saved by DeepSpeed, and this run is one of DDP or one process"):
        run(resume="auto")


def test_deepspeed_goes_on_with_as_many_processes_only(tmp_path):
    (tmp_path / TAG).mkdir()
    for rank in range(2):
        (tmp_path / TAG / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    split = object.__new__(DeepSpeedParallel)
    split.accelerator = SimpleNamespace(num_processes=3)
    with pytest.raises(ConfigError, match="was saved by 2 processes of DeepSpeed, which goes on with as many only"):
        split._load([], str(tmp_path))


@pytest.mark.parametrize(
    ("launcher", "changed", "message"),
    [
        ("FSDP", {"ema_momentum": 0.9}, "ema_momentum: needs whole weights on every process, which FSDP splits; use DDP"),
        ("FSDP", {"patch_mask": "attentive"}, "patch_mask attentive: needs whole weights"),
        ("FSDP", {"patch_mask": {"name": "pgs", "embedding_weight": 0.5}}, "patch_mask pgs: needs whole weights"),
        ("FSDP", {"compile": True}, "compile: needs whole weights"),
        ("FSDP", {}, "FSDP: splits a model over processes, and this run is a single one"),
        ("DEEPSPEED", {}, "DeepSpeed: splits a model over processes, and this run is a single one"),
    ],
)
def test_what_cannot_be_split_over_processes_is_refused(launcher, changed, message, monkeypatch, run):
    if launcher == "DEEPSPEED":
        require("deepspeed")
    monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    with pytest.raises(ConfigError, match=message):
        run(**changed)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "DEEPSPEED_ZERO_STAGE",
            "3",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE=3: must be 2; what else DeepSpeed does follows from the",
        ),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "OFFLOAD_OPTIMIZER_DEVICE=cpu: must be none"),
        ("DEEPSPEED_CONFIG_FILE", "zero.json", "ACCELERATE_DEEPSPEED_CONFIG_FILE=zero.json: must be empty"),
        (
            "USE_DEEPSPEED",
            "true",
            r"ACCELERATE_USE_DEEPSPEED=true: needs DeepSpeed 0.19 or later \(pip install 'deepspeed>=0.19'\)",
        ),
    ],
)
def test_deepspeed_is_refused_where_it_is_absent_or_to_do_what_the_options_do_not_say(name, value, message, monkeypatch, run):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    if name == "USE_DEEPSPEED":
        monkeypatch.setattr("training.parallel.deepspeed.is_deepspeed_available", lambda: False)
    else:
        require("deepspeed")
    with pytest.raises(ConfigError, match=message):
        run()


@pytest.mark.parametrize(("value", "reshards"), [("true", True), ("false", False)])
def test_weights_stay_whole_until_the_backward_pass_where_the_launch_file_says_so(value, reshards, monkeypatch, make_model):
    calls = []
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", value)
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **kwargs: calls.append(kwargs["reshard_after_forward"]))
    monkeypatch.setattr(fsdp, "init_device_mesh", lambda *args: None)
    fsdp.shard(make_model(), Accelerator(cpu=True))
    assert calls == [reshards] * 5  # two layers in each tower, and the rest
