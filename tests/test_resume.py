"""Proves that a run can be trusted for days: killed or asked to end at any time, on one process or two, with or without data
workers, it goes on as if nothing had been; and what cannot go on ends in time, with what it had learnt saved."""

import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import encode_image, losses_of, pair, random_picture, write_shard
from processes import Processes
from torch.distributed.tensor import DTensor
from transformers import AutoModel

from hf_maskclip import ContrastiveLoss, MaskCLIPModel
from hf_maskclip.errors import ConfigError, TrainingStopped
from training import loop
from training import run as run_module
from training.checkpoint import latest_checkpoint
from training.data.position import LoaderState
from training.data.skipping import WINDOW
from training.model import optimization
from training.parallel import choose, fsdp
from training.parallel.deepspeed import TAG, DeepSpeedParallel
from training.patch_selection import PatchSelector
from training.tracking import read_metrics
from training.train import program

SAME = ("step", "loss", "learning_rate", "logit_scale", "kept_patches", "samples_seen", "skipped")


def words(options: dict) -> list[str]:
    """Options as on the command line."""
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def same(records: list[dict]) -> list[tuple]:
    """What has to be equal, to the last bit, in two runs of the same options."""
    return [tuple(record[key] for key in SAME) for record in records]


def wait_for_steps(processes: Processes, output_dir: str | Path, count: int) -> None:
    """Wait until a run has logged so many steps, or has ended."""
    metrics, deadline = Path(output_dir) / "metrics.jsonl", time.monotonic() + 100
    while processes.is_alive() and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= count:
            return
        time.sleep(0.005)


# ---- Kills ------------------------------------------------------------------------------------------------------------


def as_killed_at(folder: Path, step: int) -> None:
    """Leave what a run has on its disk when it is killed a step after a checkpoint: later ones, results and half a line."""
    for checkpoint in (folder / "checkpoints").glob("step-????????"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            checkpoint.rename(checkpoint.with_suffix(".partial"))  # not complete
    shutil.rmtree(folder / "export")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("patch_mask", ["pgs", "attentive"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(patch_mask, num_workers, run, data, tmp_path, monkeypatch):
    """Keys of the batches in their order, masks, losses, what was skipped, and the weights at the end."""
    keys, masks = [], []
    use, select = LoaderState.use, PatchSelector.select

    def recorded_use(state, batch):
        keys.append(batch.keys)
        use(state, batch)

    def recorded_select(*args, **kwargs):
        masks.append(select(*args, **kwargs))
        return masks[-1]

    monkeypatch.setattr(LoaderState, "use", recorded_use)
    monkeypatch.setattr(PatchSelector, "select", recorded_select)
    write_shard(data / "train-4.tar", {"4-x": {"png": b"", "txt": b"a ball"}, **{f"4-{n}": pair(n) for n in range(7)}})
    options = {"max_steps": 13, "num_workers": num_workers, "shuffle_buffer": 5, "patch_mask": patch_mask}
    _, expected, whole = run(**options, output_dir=str(tmp_path / "whole"))
    expected_keys, expected_masks = list(keys), list(masks)
    assert len(keys) == len(masks) == 13 and len({key for batch in keys for key in batch}) == 27
    _, _, folder = run(**options, checkpoint_every=1)
    for step in (10, 7, 2):  # in one round of the workers and between two, from later and earlier starts
        as_killed_at(folder, step)
        keys.clear()
        masks.clear()
        summary, steps, _ = run(**options, checkpoint_every=1, resume="auto")
        assert same(steps) == same(expected) and keys == expected_keys[step:]
        visible = zip(masks, expected_masks[step:], strict=True)
        assert all(torch.equal(mask.visible(64), wanted.visible(64)) for mask, wanted in visible)
    weights, whole_weights = (AutoModel.from_pretrained(f / "export").state_dict() for f in (folder, whole))
    assert all(torch.equal(value, whole_weights[key]) for key, value in weights.items())
    assert summary["skipped"] and not list(tmp_path.glob("run.*"))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_killed_three_times_is_the_one_without_kills(num_processes, num_workers, options, tmp_path):
    options |= {"max_steps": 30, "num_workers": num_workers, "shuffle_buffer": 5}
    whole = options | {"output_dir": tmp_path / "whole"}
    assert set(Processes(num_processes, tmp_path / "printed", program, words(whole)).wait()) == {0}
    options |= {"resume": "auto", "checkpoint_every": 3, "keep_checkpoints": 2}
    for number, kill_at in enumerate((5, 13, 23, None)):
        processes = Processes(num_processes, tmp_path / f"printed-{number}", program, words(options))
        if kill_at:
            wait_for_steps(processes, options["output_dir"], kill_at)
            processes.signal(signal.SIGKILL)
        codes = processes.wait()
        assert set(codes) == {-signal.SIGKILL if kill_at else 0}, processes.printed()[-3000:]
    steps, expected = losses_of(options["output_dir"]), losses_of(whole["output_dir"])
    assert same(steps) == same(expected) and [record["step"] for record in steps] == list(range(1, 31))
    assert steps[0]["step_seconds"] != expected[0]["step_seconds"]  # it is another run
    names = sorted(path.name for path in Path(options["output_dir"]).glob("checkpoints/*"))
    assert [name for name in names if not name.endswith(".partial")] == ["step-00000027", "step-00000030"]


def test_a_checkpoint_of_another_split_is_refused(run):
    _, _, folder = run(checkpoint_every=2)
    with pytest.raises(ConfigError, match="is of num_workers 0, this run has 2: use as many"):
        run(checkpoint_every=2, num_workers=2, resume="auto")
    assert (folder / "export").is_dir()


def test_resuming_where_there_is_no_checkpoint_starts_anew(run, tmp_path):
    _, steps, _ = run(resume="auto")
    _, again, _ = run(resume="auto")
    assert same(again) == same(steps) and (tmp_path / "run.1").is_dir()


def test_a_run_that_goes_on_with_a_longer_budget_has_its_learning_rates(run, tmp_path):
    _, long, _ = run(max_steps=12, warmup_steps=2, output_dir=str(tmp_path / "long"))
    run(max_steps=6, warmup_steps=2, checkpoint_every=6)
    _, steps, _ = run(max_steps=12, warmup_steps=2, checkpoint_every=6, resume="auto")
    assert [r["learning_rate"] for r in steps[6:]] == [r["learning_rate"] for r in long[6:]]
    assert steps[4]["learning_rate"] != long[4]["learning_rate"] and len(steps) == 12


def test_a_resampled_stream_goes_on_in_another_order_and_with_other_workers(run, monkeypatch):
    keys = []
    use = LoaderState.use
    monkeypatch.setattr(LoaderState, "use", lambda *a, **k: keys.append(a[1].keys) or use(*a, **k))
    options = {"stream": "resampled", "max_steps": 10, "checkpoint_every": 5, "shuffle_buffer": 0}
    run(**options)
    first, folder = list(keys), run(**options)[2]
    assert keys[10:] == first  # one seed, one order
    as_killed_at(folder, 5)
    keys.clear()
    _, steps, _ = run(**options, resume="auto", num_workers=2)
    assert [record["step"] for record in steps] == list(range(1, 11))
    assert len(keys) == 5 and keys != first[5:]  # nothing was read again


# ---- Ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_processes", "ranks"), [(1, None), (2, [1])])
def test_sigterm_saves_and_exits_with_0_and_the_run_goes_on_exactly(num_processes, ranks, options, tmp_path):
    """Sent to the whole group, data workers too, as schedulers do; or to one of two processes, which takes the other along."""
    options |= {"max_steps": 20, "num_workers": 2, "shuffle_buffer": 5, "resume": "auto"}
    processes = Processes(num_processes, tmp_path / "printed", program, words(options))
    wait_for_steps(processes, options["output_dir"], 4)
    processes.signal(signal.SIGTERM, ranks)
    assert set(processes.wait()) == {0}, processes.printed()[-3000:]
    stopped_at = len(losses_of(options["output_dir"]))
    assert 4 <= stopped_at < 20 and not (Path(options["output_dir"]) / "export").exists()
    where = Path(options["output_dir"]) / "checkpoints" / f"step-{stopped_at:08d}"
    assert f"SIGTERM after step {stopped_at}; saved {where}; the same command with --resume auto" in processes.printed()
    assert set(Processes(num_processes, tmp_path / "printed", program, words(options)).wait()) == {0}
    whole = options | {"output_dir": tmp_path / "whole"}
    assert set(Processes(num_processes, tmp_path / "printed", program, words(whole)).wait()) == {0}
    assert same(losses_of(options["output_dir"])) == same(losses_of(whole["output_dir"]))


class FailingLoss(ContrastiveLoss):
    """Not a number at one of its calls."""

    fails_at = 0

    def forward(self, *args):
        FailingLoss.fails_at -= 1
        return super().forward(*args) * (float("nan") if FailingLoss.fails_at == 0 else 1.0)


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_a_loss_that_is_not_a_number_ends_the_run_with_the_state_before_it(chunk_size, run, tmp_path, monkeypatch):
    _, expected, whole = run(output_dir=str(tmp_path / "whole"), checkpoint_every=2, chunk_size=chunk_size)
    monkeypatch.setattr(run_module, "ContrastiveLoss", FailingLoss)
    FailingLoss.fails_at = 3
    with pytest.raises(TrainingStopped) as error:
        run(resume="auto", chunk_size=chunk_size)
    folder = tmp_path / "run"
    assert str(error.value) == (
        f"step 3: the loss is nan; the state before it is {folder}/checkpoints/step-00000002, "
        f"the keys of its batch are in {folder}/nonfinite_step_3.json"
    )
    report = json.loads((folder / "nonfinite_step_3.json").read_text())
    assert report["step"] == 3 and len(report["keys"]) == 1 and len(set(report["keys"][0])) == 4
    before, wanted = (MaskCLIPModel.from_pretrained(f / "checkpoints" / "step-00000002") for f in (folder, whole))
    assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in before.state_dict().items())
    _, steps, _ = run(resume="auto", chunk_size=chunk_size)
    assert same(steps) == same(expected)


def test_weights_that_are_not_numbers_are_never_saved(run, monkeypatch):
    step = loop.training_step

    def breaking_step(run, batch, number):
        result = step(run, batch, number)
        if number == 3:
            run.learner.model.text_projection.weight.data[0, 0] = float("inf")
        return result

    monkeypatch.setattr(loop, "training_step", breaking_step)
    with pytest.raises(TrainingStopped, match="step 3: its gradient was not finite, .* the last checkpoint is .*step-00000002"):
        run(checkpoint_every=1)
    monkeypatch.setattr(loop, "training_step", step)
    _, steps, folder = run(checkpoint_every=1, resume="auto")
    assert len(steps) == 4 and latest_checkpoint(folder).name == "step-00000004"


def test_too_many_bad_samples_end_the_run_name_the_shard_and_save_what_was_learnt(options, data, tmp_path):
    bad = {"png": b"not a picture", "txt": b"a ball"}
    write_shard(data / "train-4.tar", {f"bad-{n}": bad for n in range(WINDOW)})
    options |= {"max_steps": 10_000, "max_skipped_share": 0.9}
    processes = Processes(1, tmp_path, program, words(options))
    assert processes.wait() == [2]
    last = processes.printed().splitlines()[-1]
    assert (
        last.startswith(f"error: train_data='{data}/train-*.tar': ") and "gave no image-text pair (image_undecodable 9" in last
    )
    assert f"of them in {data}/train-4.tar; max_skipped_share=0.9 are allowed; saved {tmp_path}/run/checkpoints/step-" in last
    assert "Traceback" not in processes.printed() and latest_checkpoint(tmp_path / "run")
    logged = [line for line in processes.printed().splitlines() if line.startswith("skipped: ")]
    assert len(logged) == 1 and "image_undecodable (number 1)" in logged[0] and "key bad-" in logged[0]


def test_a_process_whose_data_gives_out_ends_all_of_them(options, data, tmp_path):
    """Of two shards one has no usable picture, so that one of two processes finds nothing."""
    for number in range(1, 4):
        (data / f"train-{number}.tar").unlink()
    files = {"png": encode_image(random_picture(0))[:100], "txt": b"a ball"}
    write_shard(data / "train-1.tar", {str(n): files for n in range(5)})
    processes = Processes(2, tmp_path, program, words(options | {"max_steps": 10_000}))
    assert processes.wait(60) == [2, 2]
    printed = processes.printed()
    assert f"of the last {WINDOW} samples gave no image-text pair" in printed and f"of them in {data}/train-1.tar" in printed
    assert "error: another process ran out of data after step" in printed


def test_the_end_of_one_process_ends_the_other(options, tmp_path):
    processes = Processes(2, tmp_path, program, words(options | {"max_steps": 10_000}))
    wait_for_steps(processes, options["output_dir"], 3)
    processes.signal(signal.SIGKILL, [1])
    codes = processes.wait(60)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)


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
    optimization.MAX_LOGIT_SCALE = 2.0  # below where it starts
    run_module.ContrastiveLoss, FailingLoss.fails_at = FailingLoss, 3
    return train_with_deepspeed(arguments)


@pytest.mark.parametrize(
    ("train", "line", "more"),
    [
        (train_sharded, "whole weights: ['logit_scale']", {}),
        (train_with_deepspeed, "share of the weights: 0.50", {"max_grad_norm": 0.5, "ema_momentum": 0.9}),
    ],
)
def test_what_processes_share_trains_like_whole_weights_and_goes_on_exactly(train, line, more, options, data, tmp_path):
    """FSDP2 splits the weights, DeepSpeed the moments of AdamW."""
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


def test_deepspeed_keeps_the_bound_of_the_logit_scale_and_the_state_before_a_loss_that_is_not_a_number(options, tmp_path):
    split = Processes(2, tmp_path / "a", train_with_deepspeed_until_the_loss_fails, words(options))
    assert split.wait() == [2, 2], split.printed()[-3000:]
    logit_scales = [float(number) for number in re.findall("logit scale of the optimizer: (.*)", split.printed())]
    assert len(logit_scales) == 4 and all(1.99 < number <= 2 for number in logit_scales)
    before = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert f"error: step 3: the loss is nan; the state before it is {before}" in split.printed()
    records = losses_of(options["output_dir"])
    assert [math.log(record["logit_scale"]) for record in records] == pytest.approx(logit_scales[:2], abs=1e-3)
    assert MaskCLIPModel.from_pretrained(before).logit_scale.item() == pytest.approx(logit_scales[1], abs=1e-3)


def test_a_run_goes_on_with_deepspeed_or_without_as_it_began(run, monkeypatch):
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
