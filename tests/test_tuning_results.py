"""Proves that tuning can be trusted: it goes on to the last bit on one process and two, its result lies between old and new
weights where that is asked for, and what the model could do before stands beside what it can now."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TOWERS, as_killed_at, losses_of, same, unchanged, weights_of, without_speed, words
from processes import Processes
from test_parallel import train_sharded, train_with_deepspeed

from hf_maskclip import MaskCLIPModel, export_to_clip
from hf_maskclip.errors import ConfigError
from hf_maskclip.evaluation import evaluate
from hf_maskclip.evaluation.datasets.find import Request, find_evaluations
from hf_maskclip.hub.repository import ModelRepository
from training.tracking import read_metrics
from training.train import program

MANY = {"learning_rate": 0.01, "warmup_steps": 0}  # so that few steps change much


# ---- Going on --------------------------------------------------------------------------------------------------------------

TUNINGS = (
    {"freeze": "vision", "learning_rate_text": 0.02},
    {"freeze": "text", "ema_momentum": 0.5, "interpolate_weights": 0.5},
    {"lora_rank": 2},
    {"lora_rank": 2, "freeze": "vision", "ema_momentum": 0.5, "gradient_checkpointing": True},
    {"lora_rank": 2, "interpolate_weights": 0.5, "patch_mask": "cluster"},
)


def needs(tuning: dict) -> None:
    if "lora_rank" in tuning:
        pytest.importorskip("peft", reason="peft is of the test extra")


def assert_same_result(folder: Path, whole: Path) -> None:
    weights, expected = weights_of(folder / "export"), weights_of(whole / "export")
    assert [key for key, value in weights.items() if not torch.equal(value, expected[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_a_resumed_tuning_is_the_uninterrupted_one_to_the_last_bit(tuning, run, base, data, tmp_path):
    needs(tuning)
    options = MANY | tuning | {"model": base, "max_steps": 6, "eval_data": f"{data}/val-0.tar"}
    expected_summary, expected, whole = run(**options, output_dir=str(tmp_path / "whole"))
    _, _, folder = run(**options, checkpoint_every=2)
    as_killed_at(folder, 2)
    summary, steps, _ = run(**options, checkpoint_every=2, resume="auto")
    assert same(steps) == same(expected)
    assert_same_result(folder, whole)
    assert without_speed(summary["results"]) == without_speed(expected_summary["results"])
    assert summary["before_training"] == expected_summary["before_training"]
    checkpoint = MaskCLIPModel.from_pretrained(folder / "checkpoints" / "step-00000006").state_dict()
    assert checkpoint.keys() == weights_of(base).keys()
    if (
        tuning.keys() <= {"lora_rank", "freeze", "learning_rate_text", "gradient_checkpointing"}
        and "ema_momentum" not in tuning
    ):
        assert all(torch.equal(value, checkpoint[key]) for key, value in weights_of(folder / "export").items())


@pytest.mark.slow
@pytest.mark.parametrize("tuning", TUNINGS[::2], ids=str)
def test_two_processes_tune_as_one_and_go_on_exactly(tuning, options, base, tmp_path):
    needs(tuning)
    options |= MANY | tuning | {"model": base, "max_steps": 4, "checkpoint_every": 2, "resume": "auto", "chunk_size": 2}
    processes = Processes(2, tmp_path / "a", program, words(options | {"output_dir": tmp_path / "whole"}))
    assert processes.wait() == [0, 0], processes.printed()[-3000:]
    for number in range(2):
        processes = Processes(2, tmp_path / f"b{number}", program, words(options))
        assert processes.wait() == [0, 0], processes.printed()[-3000:]
        if not number:
            as_killed_at(tmp_path / "run", 2)
    assert same(losses_of(tmp_path / "run")) == same(losses_of(tmp_path / "whole"))
    assert_same_result(tmp_path / "run", tmp_path / "whole")
    frozen = TOWERS.get(tuning.get("freeze"), ("logit_scale",))
    assert unchanged(tmp_path / "run" / "export", base) >= {key for key in weights_of(base) if key.startswith(frozen)}
    assert unchanged(tmp_path / "run" / "export", base) != weights_of(base).keys()


@pytest.mark.slow
@pytest.mark.parametrize("train", [train_sharded, train_with_deepspeed])
def test_a_tower_stays_frozen_where_processes_share_weights_or_moments(train, options, base, tmp_path):
    if train is train_with_deepspeed:
        pytest.importorskip("deepspeed", reason="deepspeed is of the test extra")
    options |= MANY | {"model": base, "freeze": "vision", "learning_rate_text": 0.02, "max_steps": 4, "checkpoint_every": 2}
    options |= {"resume": "auto", "max_grad_norm": 0.5}
    whole = options | {"output_dir": tmp_path / "whole"}
    assert Processes(2, tmp_path / "a", program, words(whole)).wait() == [0, 0]
    split = Processes(2, tmp_path / "b", train, words(options))
    assert split.wait() == [0, 0], split.printed()[-3000:]
    steps = losses_of(options["output_dir"])
    assert [r["loss"] for r in steps] == pytest.approx([r["loss"] for r in losses_of(whole["output_dir"])], rel=1e-3)
    same_weights = unchanged(tmp_path / "run" / "export", base)
    assert same_weights == {key for key in weights_of(base) if key.startswith(TOWERS["vision"])}
    as_killed_at(tmp_path / "run", 2)
    split = Processes(2, tmp_path / "c", train, words(options))
    assert split.wait() == [0, 0], split.printed()[-3000:]
    assert same(losses_of(options["output_dir"])) == same(steps)


# ---- Between the weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "ema_momentum"), [(0.25, 0.0), (0.8, 0.5)])
def test_the_result_lies_between_the_first_weights_and_the_tuned(share, ema_momentum, run, base, data, tmp_path):
    options = MANY | {"model": base, "ema_momentum": ema_momentum, "eval_data": f"{data}/val-0.tar"}
    _, steps, tuned_folder = run(**options, output_dir=str(tmp_path / "tuned"))
    summary, same_steps, folder = run(**options, interpolate_weights=share)
    assert same(steps) == same(same_steps)  # training is the same
    first, tuned, found = (weights_of(place) for place in (base, tuned_folder / "export", folder / "export"))
    for key, value in found.items():
        torch.testing.assert_close(value, share * tuned[key] + (1 - share) * first[key], rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["visual_projection.weight"], tuned["visual_projection.weight"])
    assert summary["interpolate_weights"] == share
    (record,) = summary["results"].values()
    evaluations = find_evaluations(f"{data}/val-0.tar", Request(image_size=32))
    (of_export,) = evaluate(str(folder / "export"), evaluations).values()
    assert of_export["model_hash"] == record["model_hash"]
    card = ModelRepository(folder, "org/name").card().text
    assert f"| interpolate weights | `{share}` of the tuned weights, the rest of those that it began with |" in card
    assert "interpolate" not in ModelRepository(tuned_folder, "org/name").card().text


def test_another_share_of_a_finished_run_needs_no_step(run, base):
    _, steps, folder = run(**MANY, model=base, checkpoint_every=4)
    tuned = weights_of(folder / "export")
    _, again, _ = run(**MANY, model=base, checkpoint_every=4, interpolate_weights=0.5, resume="auto")
    assert same(again) == same(steps)
    first = weights_of(base)
    for key, value in weights_of(folder / "export").items():
        torch.testing.assert_close(value, (tuned[key] + first[key]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tuning", [{"lora_rank": 2}, {"interpolate_weights": 0.5}], ids=str)
def test_first_weights_that_are_others_now_are_refused(tuning, run, base, make_model, processor):
    needs(tuning)
    _, _, folder = run(**tuning, model=base, checkpoint_every=2)
    as_killed_at(folder, 2)
    shutil.rmtree(base)
    export_to_clip(make_model("random", seed=1), base, processor)
    with pytest.raises(ConfigError, match=r"resume: model='.*base' has other weights \(hash \w{16}\) than .*step-00000002 beg"):
        run(**tuning, model=base, checkpoint_every=2, resume="auto")
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match=r"model='.*base': "):
        run(**tuning, model=base, checkpoint_every=2, resume="auto")


# ---- Before and after ------------------------------------------------------------------------------------------------------


def test_what_the_model_could_do_before_stands_beside_what_it_can_now(run, base, data, capsys):
    options = MANY | {"model": base, "eval_data": f"{data}/val-0.tar", "eval_every": 2}
    summary, _, folder = run(**options)
    (now,) = summary["results"].values()
    ((name, before),) = summary["before_training"].items()
    expected = evaluate(base, find_evaluations(f"{data}/val-0.tar", Request(image_size=32)))
    assert before == {key: expected[name][key] for key in now["standard_errors"]}
    assert json.loads((folder / "eval.json").read_text())["before_training"] == summary["before_training"]
    records = read_metrics(folder / "metrics.jsonl")
    assert records[0] == {"step": 0, "before_training_on": f"{data}/val-0.tar"} | {
        f"before_training/{name}/{key}": value for key, value in before.items()
    }
    assert [record["step"] for record in records if any(key.startswith("eval/") for key in record)] == [2, 4]
    printed = capsys.readouterr()
    key = "image_to_text_recall@1" if "image_to_text_recall@10" not in now else "image_to_text_recall@10"
    assert f"before training -> now\n{name}: {key} {before[key]:.1%} -> {now[key]:.1%}, " in printed.out
    assert f"before training: {name}: {key} {before[key]:.1%}, " in printed.err
    ModelRepository(folder, "org/name").card()  # which refuses results of other weights


def test_a_preset_and_other_evaluation_data_have_nothing_to_compare_with(run, base, data, tmp_path, capsys):
    summary, _, _ = run(eval_data=f"{data}/val-0.tar", output_dir=str(tmp_path / "preset"))
    assert summary["before_training"] == {}
    assert "->" not in capsys.readouterr().out
    run(model=base, eval_data=f"{data}/val-0.tar", checkpoint_every=4)
    other = shutil.copy(data / "train-0.tar", data / "other.tar")
    summary, _, _ = run(model=base, eval_data=str(other), checkpoint_every=4, resume="auto")
    assert summary["before_training"] == {}
    assert f"was evaluated on eval_data='{data}/val-0.tar', and now on '{other}': not compared" in capsys.readouterr().out
