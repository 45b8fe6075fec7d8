"""Proves what a person sees and gets who starts a run by the real `accelerate launch`: processes that train together, an error
once, whatever their number, and no process that goes on alone after the launcher was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import losses_of, words

from training.saving.checkpoint import latest_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = str(ROOT / "training" / "train.py")
LAUNCHERS = {
    1: [*"--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu".split()],
    2: ["--config_file", str(ROOT / "training" / "launch" / "cpu-2-processes.yaml"), "--main_process_port", "0"],
}


def launch(num_processes: int, options: dict, output: Path) -> subprocess.Popen:
    """The launcher; what it and all of its processes print goes to a file, whose name is in their environment as MARK."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *LAUNCHERS[num_processes], PROGRAM]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MARK": str(output)}
    with output.open("w") as file:
        return subprocess.Popen([*command, *words(options)], stdout=file, stderr=file, env=environment, start_new_session=True)


@pytest.mark.slow
def test_the_launch_file_for_the_cpu_starts_two_processes_that_train_together(options, tmp_path):
    launcher = launch(2, options | {"max_steps": 2}, tmp_path / "printed")
    assert launcher.wait(200) == 0, (tmp_path / "printed").read_text()[-3000:]
    assert [record["samples_seen"] for record in losses_of(options["output_dir"])] == [8, 16]


@pytest.mark.slow
def test_an_error_of_two_processes_is_printed_once(options, tmp_path):
    launcher = launch(2, options | {"image_key": "absent"}, tmp_path / "printed")
    assert launcher.wait(200) == 1
    printed = (tmp_path / "printed").read_text()
    assert "exitcode  : 2" in printed  # the launcher's own lines, of the process that it saw first
    lines = [line for line in printed.splitlines() if "no usable image-text pair" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def processes_of(output: Path) -> list[int]:
    """The processes of a launch that are alive; each is in a session of its own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")  # empty once it has ended
        except OSError:
            continue
        if f"MARK={output}".encode() in environment:
            found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("num_processes", [1, 2])
def test_processes_save_and_end_once_their_launcher_is_killed(num_processes, options, tmp_path):
    options |= {"max_steps": 1_000_000, "num_workers": 1}
    launcher = launch(num_processes, options, tmp_path / "printed")
    run, deadline = Path(options["output_dir"]), time.monotonic() + 200
    try:
        while not (run / "metrics.jsonl").exists() and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(processes_of(tmp_path / "printed")) >= 1 + 2 * num_processes  # with their data workers
        launcher.kill()
        launcher.wait()
        while processes_of(tmp_path / "printed") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert processes_of(tmp_path / "printed") == []
    finally:
        for process in processes_of(tmp_path / "printed"):
            os.kill(process, signal.SIGKILL)
    printed = (tmp_path / "printed").read_text()
    assert printed.count("the launcher was killed") == 1
    assert latest_checkpoint(run).name == f"step-{len(losses_of(run)):08d}"
    assert "Traceback" not in printed
