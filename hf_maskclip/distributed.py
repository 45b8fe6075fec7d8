"""The processes of a run: who they are, what they tell each other, and which CPUs they may use.

Shapes: B pairs of this process, W processes, E projection size.
"""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

# Of each default group, the one that talks over the CPU; it goes when its default group goes.
_cpu_groups: "WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = WeakKeyDictionary()


def world_size() -> int:
    """The processes that share a batch: 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if world_size() > 1 else 0


def cpu_group() -> "dist.ProcessGroup":
    """A group of all processes that talks over the CPU, so that comparing numbers never waits for a GPU."""
    backend, default = dist.get_backend(), dist.group.WORLD
    assert default is not None  # or its backend could not be asked for
    if backend == "gloo":
        return default
    if default not in _cpu_groups:
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # of all processes, and so of this one
        _cpu_groups[default] = group
    return _cpu_groups[default]


def gather_with_gradient(features: torch.Tensor) -> torch.Tensor:
    """Features (B, E) of every process in order of rank, (W * B, E), with gradients that flow back to each process.

    `accelerator.gather` carries no gradient, which is why this exists. Without a process group it is the identity.
    """
    if world_size() == 1:
        return features
    from torch.distributed.nn.functional import all_gather  # not in every build of PyTorch

    return torch.cat(all_gather(features.contiguous()))


def largest(number: int) -> int:
    """The largest of a number over all processes."""
    value = torch.tensor(number)
    if world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX, group=cpu_group())
    return int(value)


def gather_numbers(number: int) -> list[int]:
    """A number of each process, in order of rank."""
    if world_size() == 1:
        return [number]
    numbers = [torch.empty(1, dtype=torch.long) for _ in range(world_size())]
    dist.all_gather(numbers, torch.tensor([number]), group=cpu_group())
    return [int(value) for value in numbers]


def sum_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """The sum of the counts of all processes."""
    everywhere = [counts] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everywhere, counts, group=cpu_group())
    return dict(sum(map(Counter, everywhere), Counter()))


def is_mine(number: int) -> bool:
    """Whether the numbered piece of work falls to this process.

    The pieces are the same on any number of processes, so that results do not depend on it.
    """
    state = PartialState()
    return number % state.num_processes == state.process_index


def gather_pieces(pieces: list[tuple]) -> list[tuple]:
    """The pieces of all processes, tuples that begin with their numbers, in order, on every process."""
    everywhere = gather_object(pieces) if PartialState().num_processes > 1 else pieces
    return sorted(everywhere, key=lambda piece: piece[0])


def usable_cpus() -> int:
    """The CPUs that this process may run on: under taskset, SLURM or in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def use_share_of_cpus() -> None:
    """Give PyTorch as many threads as there are CPUs for each process here, of which `accelerate launch` gives it one."""
    torch.set_num_threads(max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
