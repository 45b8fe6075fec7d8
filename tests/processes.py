"""Processes for tests: forked from a server that has imported the training program once, so that each starts at once."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from matplotlib.figure import Figure

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["training.loop", "training.summary", "processes"])


class Processes:
    """One function in several processes, which find each other as those of `accelerate launch` do; each with its children in a
    group of its own, so that a signal can go to all of them.

    Args:
        function: called in each process; what it returns is the exit code.
        folder: where what they print goes.
    """

    def __init__(self, num_processes: int, folder: Path, function: Callable[..., int], *arguments):
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"process_{rank}.txt" for rank in range(num_processes)]
        port = _free_port()
        self.processes = [
            context.Process(target=_run, args=(rank, num_processes, port, self.outputs[rank], function, arguments))
            for rank in range(num_processes)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 100) -> list[int]:
        """The exit codes, negative for a signal. What has not ended in that time is killed, and the test fails."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.signal(signal.SIGKILL)
        assert not late, f"processes {late} did not end in {seconds} s: {self.printed()[-3000:]}"
        return [process.exitcode for process in self.processes]

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            if process.is_alive() and (ranks is None or rank in ranks):
                os.killpg(process.pid, number)

    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def printed(self) -> str:
        return "".join(output.read_text() for output in self.outputs if output.exists())


def in_two_processes(function: Callable[[int], object], tmp_path) -> list:
    """Run a function of the rank in two processes with a gloo group; their results, or the errors they raised."""
    with context.Manager() as manager:
        results = manager.dict()
        arguments = (function, str(tmp_path / "init"), results)
        mp.start_processes(_run_in_group, arguments, nprocs=2, start_method="forkserver")
        return [results[rank] for rank in range(2)]


def wait_for_steps(processes: Processes, output_dir: str | Path, count: int) -> None:
    """Wait until a run has logged so many steps, or has ended."""
    metrics, deadline = Path(output_dir) / "metrics.jsonl", time.monotonic() + 100
    while processes.is_alive() and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= count:
            return
        time.sleep(0.005)


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """Let runs of the training program write empty pictures: to draw them takes longer than the few steps of a test."""
    for name in ("draw_patch_masks", "draw_curves"):
        patch.setattr(f"training.summary.{name}", lambda *args, **kwargs: Figure())
    patch.setattr("training.summary.make_example", lambda *args, **kwargs: None)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(rank: int, num_processes: int, port: int, output: Path, function: Callable[..., int], arguments: tuple) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a process that no server has forked
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if num_processes > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        os.environ |= {key: str(value) for key, value in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    without_pictures(pytest.MonkeyPatch())
    sys.exit(function(*arguments))


def _run_in_group(rank: int, function: Callable[[int], object], init_file: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    try:
        results[rank] = function(rank)
    except ValueError as error:
        results[rank] = str(error)
    torch.distributed.destroy_process_group()
