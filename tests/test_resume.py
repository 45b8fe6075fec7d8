"""Proves that a run can be trusted for days: killed at any time, on one process or two, with or without data workers, it goes
on as if nothing had been."""

import json
import signal
from pathlib import Path

import pytest
import torch
from helpers import as_killed_at, losses_of, pair, same, words, write_shard
from processes import Processes, wait_for_steps
from transformers import AutoModel

from hf_maskclip.errors import ConfigError
from training.data.position import LoaderState
from training.patch_selection import PatchSelector
from training.train import program


@pytest.mark.slow
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
    assert len(keys) == len(masks) == 13
    assert len({key for batch in keys for key in batch}) == 27
    _, _, folder = run(**options, checkpoint_every=1)
    for step in (10, 7, 2):  # in one round of the workers and between two, from later and earlier starts
        as_killed_at(folder, step)
        keys.clear()
        masks.clear()
        summary, steps, _ = run(**options, checkpoint_every=1, resume="auto")
        assert same(steps) == same(expected)
        assert keys == expected_keys[step:]
        visible = zip(masks, expected_masks[step:], strict=True)
        assert all(torch.equal(mask.visible(64), wanted.visible(64)) for mask, wanted in visible)
    weights, whole_weights = (AutoModel.from_pretrained(f / "export").state_dict() for f in (folder, whole))
    assert all(torch.equal(value, whole_weights[key]) for key, value in weights.items())
    assert summary["skipped"]
    assert not list(tmp_path.glob("run.*"))


@pytest.mark.slow
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
    assert same(steps) == same(expected)
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert steps[0]["step_seconds"] != expected[0]["step_seconds"]  # it is another run
    names = sorted(path.name for path in Path(options["output_dir"]).glob("checkpoints/*"))
    assert [name for name in names if not name.endswith(".partial")] == ["step-00000027", "step-00000030"]


def test_a_checkpoint_of_another_split_is_refused_and_the_way_on_is_named(run):
    _, _, folder = run(checkpoint_every=2)
    there = "is of 1 processes x 0 workers, this run has 1 processes x 2 workers"
    with pytest.raises(ConfigError, match=f"{there}: use as many, or --resume fresh_pass, .* resampled goes on") as error:
        run(checkpoint_every=2, num_workers=2, resume="auto")
    assert "\n" not in str(error.value)
    assert (folder / "export").is_dir()


def test_a_checkpoint_of_an_older_order_is_refused(run):
    _, _, folder = run(checkpoint_every=2)
    (file,) = (folder / "checkpoints" / "step-00000004").glob("data_process_0.json")
    state = json.loads(file.read_text())
    assert state.pop("places_in_sources")
    file.write_text(json.dumps(state | {"positions": {"0": [0, 12]}}))
    with pytest.raises(ConfigError, match="is of an older version, whose rows have another order"):
        run(checkpoint_every=2, resume="auto", max_steps=6)


@pytest.mark.slow
def test_a_fresh_pass_goes_on_with_other_workers_and_from_there_exactly(run, tmp_path, monkeypatch, capsys):
    """What the model has learnt stays, the optimizer and its schedule too; the order of samples alone is new."""
    keys, use = [], LoaderState.use
    monkeypatch.setattr(LoaderState, "use", lambda *a, **k: keys.append(a[1].keys) or use(*a, **k))
    options = {"max_steps": 9, "checkpoint_every": 1, "shuffle_buffer": 5, "crop_scale": 1.0, "flip": 0.0}
    _, expected, folder = run(**options)
    first = list(keys)
    as_killed_at(folder, 4)
    keys.clear()
    assert same(run(**options, resume="fresh_pass")[1]) == same(expected)  # where nothing has changed, nothing changes
    assert keys == first[4:]
    assert "fresh pass" not in capsys.readouterr().out
    as_killed_at(folder, 4)
    keys.clear()
    _, steps, _ = run(**options, num_workers=2, resume="fresh_pass")
    assert "is of 1 processes x 0 workers, this run has 1 processes x 2 workers: it begins a fresh" in capsys.readouterr().out
    assert same(steps[:4]) == same(expected[:4])
    assert [(r["step"], r["samples_seen"]) for r in steps] == [(number, 4 * number) for number in range(1, 10)]
    assert [r["learning_rate"] for r in steps] == [r["learning_rate"] for r in expected]
    assert len(keys) == 5
    assert keys != first[4:]
    fresh = list(keys)
    for step in (5, 7):  # the second worker has made no batch yet, and both have
        as_killed_at(folder, step)
        keys.clear()
        assert same(run(**options, num_workers=2, resume="auto")[1]) == same(steps)
        assert keys == fresh[step - 4 :]


@pytest.mark.slow
def test_a_fresh_pass_goes_on_with_fewer_and_with_more_processes(options, data, tmp_path):
    bad = {f"4-{n}": {"png": b"", "txt": b"a ball"} for n in range(3)}
    write_shard(data / "train-4.tar", bad | {f"4-{n}": pair(n) for n in range(3, 8)})
    options |= {"max_steps": 8, "checkpoint_every": 1, "shuffle_buffer": 5, "resume": "fresh_pass"}
    skipped, seen = [], []
    for number, (num_processes, step) in enumerate(((2, 8), (1, 12), (2, 16))):
        processes = Processes(num_processes, tmp_path / f"printed-{number}", program, words(options | {"max_steps": step}))
        assert set(processes.wait()) == {0}, processes.printed()[-3000:]
        assert processes.printed().count("it begins a fresh pass over the data") == (number > 0)
        last = losses_of(options["output_dir"])[-1]
        assert last["step"] == step
        skipped.append(sum(last["skipped"].values()))
        seen.append(last["samples_seen"])
    assert seen == [64, 80, 112]
    assert 0 < skipped[0] < skipped[1] < skipped[2]  # of all processes, whoever counted it


def test_resuming_where_there_is_no_checkpoint_starts_anew(run, tmp_path):
    _, steps, _ = run(resume="auto")
    _, again, _ = run(resume="auto")
    assert same(again) == same(steps)
    assert (tmp_path / "run.1").is_dir()


def test_a_run_that_goes_on_with_a_longer_budget_has_its_learning_rates(run, tmp_path):
    _, long, _ = run(max_steps=12, warmup_steps=2, output_dir=str(tmp_path / "long"))
    run(max_steps=6, warmup_steps=2, checkpoint_every=6)
    _, steps, _ = run(max_steps=12, warmup_steps=2, checkpoint_every=6, resume="auto")
    assert [r["learning_rate"] for r in steps[6:]] == [r["learning_rate"] for r in long[6:]]
    assert steps[4]["learning_rate"] != long[4]["learning_rate"]
    assert len(steps) == 12


@pytest.mark.slow
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
    assert len(keys) == 5
    assert keys != first[5:]  # nothing was read again


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "tiny-96"}, r"model='tiny-96' \(there 'tiny'\)"),
        ({"seed": 7}, r"seed=7 \(there 0\)"),
        ({"batch_size": 2}, r"batch_size=2 \(there 4\)"),
        ({"shuffle_buffer": 10, "seed": 1}, r"shuffle_buffer=10 \(there 2000\), seed=1 \(there 0\)"),
        ({"patch_mask": "random"}, r"patch_mask=\{'name': 'random', 'mask_ratio': 0.5\} \(there ''\)"),
        ({"stream": "resampled"}, r"stream='resampled' \(there 'exact'\)"),
        ({"weight_decay": 0.1}, r"weight_decay=0.1 \(there 0.2\)"),
        ({"flip": 0.0}, r"flip=0.0 \(there 0.5\)"),
        ({"ema_momentum": 0.9}, r"ema_momentum=0.9 \(there 0.0\)"),
        ({"train_data": "{data}/train-[0-2].tar"}, r"is other data than .*/train-\*.tar', which .* \(3 shards, there 4\)"),
        ({"train_data": "{data}/other/*.tar"}, r"is other data than .*/train-\*.tar', which .* \(its captions are others\)"),
        ({"max_steps": 1}, r"^max_steps=1: .*step-00000002 has 2 steps behind it already"),
        ({"max_steps": 0, "samples_seen": 7}, r"^samples_seen=7: .*step-00000002 has 8 pairs in 2 steps behind it already"),
    ],
)
def test_what_makes_another_run_is_refused_in_one_line(changed, message, two_steps, run, data):
    (data / "other").mkdir()
    for index in range(4):
        write_shard(data / "other" / f"train-{index}.tar", {f"{index}-{n}": pair(50 + 5 * index + n) for n in range(5)})
    changed = {key: value.replace("{data}", str(data)) if isinstance(value, str) else value for key, value in changed.items()}
    before = (two_steps / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=message) as error:
        run(**({"max_steps": 4} | changed), resume="auto")
    assert "\n" not in str(error.value)
    assert (two_steps / "config.yaml").read_text() == before


@pytest.fixture
def two_steps(run) -> Path:
    """A run of two steps, with a checkpoint at its end."""
    return run(max_steps=2, checkpoint_every=2)[2]


def test_what_may_change_passes_and_moved_data_is_the_same_data(run, data):
    _, expected, folder = run(checkpoint_every=2)
    as_killed_at(folder, 2)
    moved = data.rename(data.with_name("moved"))
    free = {"log_every": 1, "eval_data": f"{moved}/val-0.tar", "keep_checkpoints": 1, "gradient_checkpointing": True}
    summary, steps, _ = run(max_steps=4, resume="auto", train_data=f"{moved}/train-*.tar", **free)
    assert same(steps) == same(expected)
    assert (summary["steps"], summary["samples_seen"], summary["model"]) == (4, 16, "tiny")


def test_samples_seen_counts_what_was_seen(two_steps, run):
    """A resampled stream goes on with other processes: 100 pairs of two steps stand for a run on more of them."""
    record = two_steps / "checkpoints" / "step-00000002" / "record.json"
    record.write_text(record.read_text().replace('"samples_seen": 8', '"samples_seen": 100'))
    summary, steps, _ = run(max_steps=0, samples_seen=110, resume="auto")
    assert [record["samples_seen"] for record in steps] == [4, 8, 104, 108, 112]
    assert (summary["steps"], summary["samples_seen"]) == (5, 112)


def test_data_that_cannot_be_read_for_now_is_not_taken_for_other_data(two_steps, run, data):
    (data / "train-1.tar").write_bytes(b"an error page")
    assert len(run(max_steps=4, resume="auto")[1]) == 4


def test_a_checkpoint_of_an_older_version_is_refused_in_one_line(run):
    _, _, folder = run(checkpoint_every=2)
    record = folder / "checkpoints" / "step-00000002" / "record.json"
    assert record.is_file()
    as_killed_at(folder, 2)
    record.rename(record.with_name("run.json"))
    with pytest.raises(ConfigError, match="step-00000002 has no record.json: an older version saved it"):
        run(checkpoint_every=2, resume="auto")
