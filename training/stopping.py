"""When training ends before its budget: a signal to end, data that gives out, a loss that is not finite.

All processes come to the same decision at the same step, so that they can save a checkpoint together.
"""

import os
import signal
import sys
import threading

import torch

from hf_maskclip.distributed import largest
from training.data.batches import Batch, Stopped


class StopRequest:
    """SIGTERM, by which schedulers announce the end of a job, as something to ask about between two steps.

    A context manager: the signal's former handler is back at its end.
    """

    NONE, SIGTERM, DATA = range(3)

    def __enter__(self) -> "StopRequest":
        self._is_terminated = False
        # Python lets the main thread alone handle signals; a run in another one, as in a notebook's server, goes without.
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._former = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._former)

    def _note(self, *frame) -> None:
        self._is_terminated = True

    def agreed(self, item: Batch | Stopped) -> int:
        """What ends the training of this or another process: `NONE`, `SIGTERM`, or `DATA` where one has no more batch."""
        return largest(self.DATA if isinstance(item, Stopped) else self.SIGTERM if self._is_terminated else self.NONE)


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
    """Let a data worker end by the SIGTERM of its training process, and not by one that goes to all processes of a job."""
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_the_training_process_says_so, daemon=True).start()


def _exit_when_the_training_process_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
