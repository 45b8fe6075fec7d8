"""When training ends before its budget: a signal to end, a launcher or a process that is gone, data that gives out.

All processes come to the same decision at the same step, so that they can save a checkpoint together.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import ClassVar

import torch
import torch.distributed as dist

from hf_maskclip.distributed import largest, world_size
from hf_maskclip.errors import TrainingStopped
from training.data.batches import Batch, Stopped

# After so long without an answer another process is taken for lost. Evaluation and checkpoints are waited for as well.
PATIENCE_WITH_PROCESSES = timedelta(minutes=30)
# Of these `accelerate launch` sets the first for each process, `torchrun` the other.
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK")


class StopRequest:
    """SIGTERM, by which schedulers announce the end of a job, Ctrl-C, or the end of the launcher that had started this process
    when this was made, as something to ask about between two steps.

    A second Ctrl-C is a `KeyboardInterrupt` at once. A context manager: the signals' former handlers are back at its end.
    """

    NONE, SIGTERM, INTERRUPT, LAUNCHER, DATA = range(5)
    TITLES: ClassVar = {SIGTERM: "SIGTERM", INTERRUPT: "Ctrl-C", LAUNCHER: "the launcher was killed: it ends"}

    def __init__(self) -> None:
        self._asked = self.NONE
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    def __enter__(self) -> "StopRequest":
        # Python lets the main thread alone handle signals; a run in another one, as in a notebook's server, goes without.
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._former = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        if self._handles:
            for number, handler in self._former.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked == self.INTERRUPT:
            raise KeyboardInterrupt
        self._asked = self.INTERRUPT if number == signal.SIGINT else self.SIGTERM
        if number == signal.SIGINT:
            print("Ctrl-C: this step is finished and saved; a second Ctrl-C ends at once", file=sys.stderr)

    def agreed(self, item: Batch | Stopped) -> int:
        """What ends the training of this or another process: `NONE`, a signal, `LAUNCHER`, or `DATA` where one has no more
        batch."""
        if self._launcher not in (None, os.getppid()):  # a killed one ends nobody, and signals nobody
            self._asked = self._asked or self.LAUNCHER
        return largest(self.DATA if isinstance(item, Stopped) else self._asked)


@contextmanager
def lost_processes_in_words() -> Iterator[None]:
    """Turn what PyTorch raises where another process has ended, or is silent, into a TrainingStopped."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        is_of_processes = isinstance(error, dist.DistError) or "gloo" in text or "pair closure" in text
        if world_size() == 1 or not is_of_processes:
            raise
        minutes = PATIENCE_WITH_PROCESSES.total_seconds() / 60
        raise TrainingStopped(
            f"another process of this run has ended, or has not answered for {minutes:.0f} minutes ({text}); "
            "--resume auto goes on from the last checkpoint"
        ) from error


def leave_worker_deaths_to_the_loader() -> None:
    """Undo what starting data workers does to SIGCHLD: a handler of PyTorch, which raises wherever the program is.

    In the middle of a step that leaves half a step. Without it the loader finds the death where it waits for a batch.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return
    if getattr(signal.getsignal(signal.SIGCHLD), "__module__", "") == "torch.utils.data._utils.signal_handling":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def next_item(batches: Iterator[Batch | Stopped]) -> Batch | Stopped:
    """The next batch, or a [`Stopped`] where a data worker was killed."""
    try:
        return next(batches)
    except (RuntimeError, EOFError, ConnectionError) as error:
        # PyTorch finds the death itself, or while it fetches a batch from there. What a worker raises comes as "Caught ...".
        is_death = any(words in str(error) for words in ("DataLoader worker", "Pin memory thread"))
        if str(error).startswith("Caught ") or (isinstance(error, RuntimeError) and not is_death):
            raise
        reason = str(error) or type(error).__name__
        return Stopped(f"a data worker was killed ({reason}); where memory ran out, fewer num_workers take less")


class NumbersOnHost:
    """A tensor (N,) on its way to the host. Reading it waits for the tensor, but not for what the device was given after it."""

    def __init__(self, numbers: torch.Tensor):
        self.copy = numbers.detach().to("cpu", non_blocking=True)
        self.arrival = torch.cuda.Event() if numbers.is_cuda else None
        if self.arrival:
            self.arrival.record()

    def read(self) -> list[float]:
        if self.arrival:
            self.arrival.synchronize()
        return self.copy.tolist()


def all_finite(model: torch.nn.Module) -> bool:
    """Whether every weight is a number. This waits for the device."""
    return bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all())


def obey_only_the_training_process(worker: int) -> None:
    """Let a data worker end by the SIGTERM of its training process, and not by a signal to all processes of a job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_the_training_process_says_so, daemon=True).start()


def _exit_when_the_training_process_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
