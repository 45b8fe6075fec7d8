"""When training ends before its budget: a signal to end, data or a data worker that gives out, a loss that is not finite.

All processes come to the same decision at the same step, so that they can save a checkpoint together.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import ClassVar

import torch

from hf_maskclip.distributed import largest
from training.data.batches import Batch, Stopped


class StopRequest:
    """SIGTERM, by which schedulers announce the end of a job, or Ctrl-C, as something to ask about between two steps.

    A second Ctrl-C is a `KeyboardInterrupt` at once. A context manager: the signals' former handlers are back at its end.
    """

    NONE, SIGTERM, INTERRUPT, DATA = range(4)
    TITLES: ClassVar = {SIGTERM: "SIGTERM", INTERRUPT: "Ctrl-C"}

    def __enter__(self) -> "StopRequest":
        self._asked = self.NONE
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
        """What ends the training of this or another process: `NONE`, a signal, or `DATA` where one has no more batch."""
        return largest(self.DATA if isinstance(item, Stopped) else self._asked)


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
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        return Stopped(f"a data worker was killed ({error}); where memory ran out, fewer num_workers take less")


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
