"""When training ends before its budget: a signal to end, data that gives out, a loss that is not finite.

All processes come to the same decision at the same step, so that they can save a checkpoint together.
"""

import signal

import torch
import torch.distributed as dist

from hf_maskclip.losses import cpu_group, world_size


class StopRequest:
    """SIGTERM, by which schedulers announce the end of a job, as something to ask about between two steps.

    A context manager: the signal's former handler is back at its end.
    """

    NONE, SIGTERM, DATA = range(3)

    def __enter__(self) -> "StopRequest":
        self._is_terminated = False
        self._former = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGTERM, self._former)

    def _note(self, *frame) -> None:
        self._is_terminated = True

    def agreed(self, batch: dict) -> int:
        """What ends the training of this or another process: `NONE`, `SIGTERM`, or `DATA` where its batch has "stopped"."""
        reason = torch.tensor(self.DATA if "stopped" in batch else self.SIGTERM if self._is_terminated else self.NONE)
        if world_size() > 1:
            dist.all_reduce(reason, dist.ReduceOp.MAX, group=cpu_group())
        return int(reason)


class NumberOnHost:
    """A 0-d tensor on its way to the host. Reading it waits for the tensor, but not for what the device was given after it."""

    def __init__(self, number: torch.Tensor):
        self.copy = number.detach().to("cpu", non_blocking=True)
        self.arrival = torch.cuda.Event() if number.is_cuda else None
        if self.arrival:
            self.arrival.record()

    def read(self) -> float:
        if self.arrival:
            self.arrival.synchronize()
        return self.copy.item()


def all_finite(model: torch.nn.Module) -> bool:
    """Whether every weight is a number. This waits for the device."""
    return bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all())
