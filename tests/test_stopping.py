"""Proves that what is asked to end, or cannot go on, ends in time and on all processes, with what it had learnt saved, and that
it goes on from there."""

import json
import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers import FailingLoss, encode_image, losses_of, random_picture, same, words, write_shard
from processes import Processes, wait_for_steps

from hf_maskclip import MaskCLIPModel
from hf_maskclip.errors import TrainingStopped
from training import loop, stopping
from training import run as run_module
from training.data import skipping
from training.model import loss as loss_module
from training.saving.checkpoint import latest_checkpoint
from training.stopping import StopRequest
from training.train import program


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "ranks"), [(1, None), (2, [1])])
def test_sigterm_saves_and_exits_with_0_and_the_run_goes_on_exactly(num_processes, ranks, options, tmp_path):
    """Sent to the whole group, data workers too, as schedulers do; or to one of two processes, which takes the other along."""
    options |= {"max_steps": 20, "num_workers": 2, "shuffle_buffer": 5, "resume": "auto"}
    processes = Processes(num_processes, tmp_path / "printed", program, words(options))
    wait_for_steps(processes, options["output_dir"], 4)
    processes.signal(signal.SIGTERM, ranks)
    assert set(processes.wait()) == {0}, processes.printed()[-3000:]
    stopped_at = len(losses_of(options["output_dir"]))
    assert 4 <= stopped_at < 20
    assert not (Path(options["output_dir"]) / "export").exists()
    where = Path(options["output_dir"]) / "checkpoints" / f"step-{stopped_at:08d}"
    assert f"SIGTERM after step {stopped_at}; saved {where}; the same command with --resume auto" in processes.printed()
    assert set(Processes(num_processes, tmp_path / "printed", program, words(options)).wait()) == {0}
    whole = options | {"output_dir": tmp_path / "whole"}
    assert set(Processes(num_processes, tmp_path / "printed", program, words(whole)).wait()) == {0}
    assert same(losses_of(options["output_dir"])) == same(losses_of(whole["output_dir"]))


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_a_loss_that_is_not_a_number_ends_the_run_with_the_state_before_it(chunk_size, run, tmp_path, monkeypatch):
    _, expected, whole = run(output_dir=str(tmp_path / "whole"), checkpoint_every=2, chunk_size=chunk_size)
    monkeypatch.setattr(loss_module, "ContrastiveLoss", FailingLoss)
    FailingLoss.fails_at = 3
    with pytest.raises(TrainingStopped) as error:
        run(resume="auto", chunk_size=chunk_size)
    folder = tmp_path / "run"
    assert str(error.value) == (
        f"step 3: the loss is nan; the state before it is {folder}/checkpoints/step-00000002, "
        f"the keys of its batch are in {folder}/nonfinite_step_3.json"
    )
    report = json.loads((folder / "nonfinite_step_3.json").read_text())
    assert report["step"] == 3
    assert len(report["keys"]) == 1
    assert len(set(report["keys"][0])) == 4
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
    assert len(steps) == 4
    assert latest_checkpoint(folder).name == "step-00000004"


@pytest.mark.slow
def test_too_many_bad_samples_end_the_run_name_the_shard_and_save_what_was_learnt(options, data, tmp_path):
    bad = {"png": b"not a picture", "txt": b"a ball"}
    write_shard(data / "train-4.tar", {f"bad-{n}": bad for n in range(skipping.WINDOW)})
    options |= {"max_steps": 10_000, "max_skipped_share": 0.9}
    processes = Processes(1, tmp_path, program, words(options))
    assert processes.wait() == [2]
    last = processes.printed().splitlines()[-1]
    assert last.startswith(f"error: train_data='{data}/train-*.tar': ")
    assert "gave no image-text pair (image_undecodable 9" in last
    assert f"of them in {data}/train-4.tar; max_skipped_share=0.9 are allowed; saved {tmp_path}/run/checkpoints/step-" in last
    assert "Traceback" not in processes.printed()
    assert latest_checkpoint(tmp_path / "run")
    logged = [line for line in processes.printed().splitlines() if line.startswith("skipped: ")]
    assert len(logged) == 1
    assert "image_undecodable (number 1)" in logged[0]
    assert "key bad-" in logged[0]


def with_a_small_window(arguments: list[str]) -> int:
    skipping.WINDOW = 100
    return program(arguments)


@pytest.mark.slow
def test_a_process_whose_data_gives_out_ends_all_of_them(options, data, tmp_path):
    """Of two shards one has no usable picture, so that one of two processes finds nothing."""
    for number in range(1, 4):
        (data / f"train-{number}.tar").unlink()
    files = {"png": encode_image(random_picture(0))[:100], "txt": b"a ball"}
    write_shard(data / "train-1.tar", {str(n): files for n in range(5)})
    processes = Processes(2, tmp_path, with_a_small_window, words(options | {"max_steps": 10_000}))
    assert processes.wait(60) == [2, 2]
    printed = processes.printed()
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(set(errors)) == 1  # both know why, whichever of them is heard
    assert "of the last 100 samples gave no image-text pair" in errors[0]
    assert f"of them in {data}/train-1.tar" in errors[0]


@pytest.mark.slow
def test_the_end_of_one_process_ends_the_other(options, tmp_path):
    processes = Processes(2, tmp_path, program, words(options | {"max_steps": 10_000}))
    wait_for_steps(processes, options["output_dir"], 3)
    processes.signal(signal.SIGKILL, [1])
    codes = processes.wait(60)
    assert codes == [2, -signal.SIGKILL]
    last = processes.outputs[0].read_text().splitlines()[-1]
    assert last.startswith("error: another process of this run has ended, or has not answered for 30 minutes (")
    assert last.endswith("; --resume auto goes on from the last checkpoint")


def train_with_little_patience(arguments: list[str]) -> int:
    run_module.PATIENCE_WITH_PROCESSES = timedelta(seconds=5)
    return program(arguments)


@pytest.mark.slow
def test_a_process_that_is_frozen_is_not_waited_for_without_end(options, tmp_path):
    processes = Processes(2, tmp_path, train_with_little_patience, words(options | {"max_steps": 10_000}))
    wait_for_steps(processes, options["output_dir"], 3)
    processes.signal(signal.SIGSTOP, [1])
    processes.processes[0].join(60)
    assert processes.processes[0].exitcode == 2
    processes.signal(signal.SIGKILL)
    assert "error: another process of this run has ended, or has not answered for " in processes.printed()
    assert "Traceback" not in processes.printed()


def test_another_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(stopping, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="^mat1 and mat2") as error, stopping.lost_processes_in_words():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not isinstance(error.value, TrainingStopped)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_first_ctrl_c_saves_as_sigterm_does(num_processes, options, tmp_path):
    """Sent to the whole group, data workers too, as a terminal does."""
    options |= {"max_steps": 2000, "num_workers": 2}
    processes = Processes(num_processes, tmp_path / "printed", program, words(options))
    wait_for_steps(processes, options["output_dir"], 3)
    processes.signal(signal.SIGINT)
    assert set(processes.wait()) == {0}, processes.printed()[-3000:]
    stopped_at = latest_checkpoint(Path(options["output_dir"])).name.removeprefix("step-").lstrip("0")
    assert f"Ctrl-C after step {stopped_at}; saved " in processes.printed()
    assert "Traceback" not in processes.printed()


@pytest.fixture
def python_handles_ctrl_c():
    """As in a terminal; where tests run in the background of a shell, it is ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_a_second_ctrl_c_ends_at_once(python_handles_ctrl_c):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed(None) == StopRequest.INTERRUPT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupted_program_ends_with_code_130_and_without_a_traceback(python_handles_ctrl_c, options, monkeypatch, capsys):
    monkeypatch.setattr(run_module.Mix, "open", lambda *a, **k: signal.raise_signal(signal.SIGINT))
    assert program(words(options)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize(
    ("error", "is_death"),
    [
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), True),
        (RuntimeError("Pin memory thread exited unexpectedly"), True),  # it had fetched a batch from the worker
        (EOFError(), True),  # while a batch was fetched from the worker
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), False),
        (ConnectionError("Caught ConnectionError in DataLoader worker process 0."), False),
    ],
)
def test_the_death_of_a_data_worker_is_told_from_its_errors(error, is_death):
    batches = map(lambda item: (_ for _ in ()).throw(item), [error])
    if is_death:
        assert "a data worker was killed (" in stopping.next_item(batches).reason
    else:
        with pytest.raises(type(error), match="^(mat1|Caught)"):
            stopping.next_item(batches)


@pytest.mark.slow
def test_a_killed_data_worker_is_one_line_after_the_state_is_saved(options, tmp_path):
    options |= {"max_steps": 100_000, "num_workers": 2}
    processes = Processes(1, tmp_path / "printed", program, words(options))
    wait_for_steps(processes, options["output_dir"], 3)
    children = Path(f"/proc/{processes.processes[0].pid}/task/{processes.processes[0].pid}/children").read_text().split()
    assert len(children) >= 2
    os.kill(int(children[-1]), signal.SIGKILL)
    assert processes.wait() == [2], processes.printed()[-3000:]
    last = processes.printed().splitlines()[-1]
    where = latest_checkpoint(Path(options["output_dir"]))
    assert "a data worker was killed (" in last
    assert last.endswith(f"saved {where}")
    assert "Traceback" not in processes.printed()
