"""Proves that a run can be trusted for days: killed at any time, on one process or two, with or without data workers, it goes
on as if nothing had been."""

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


def test_a_checkpoint_of_another_split_is_refused(run):
    _, _, folder = run(checkpoint_every=2)
    with pytest.raises(ConfigError, match="is of num_workers 0, this run has 2: use as many"):
        run(checkpoint_every=2, num_workers=2, resume="auto")
    assert (folder / "export").is_dir()


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
