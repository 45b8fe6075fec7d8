"""The CPUs of a process, and its share of them among the training processes of a machine."""

import os
import sys

import torch


def usable_cpus() -> int:
    """Those that this process may run on: under taskset, SLURM or a container's set of CPUs fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def use_share_of_cpus() -> None:
    """Give PyTorch as many threads as there are CPUs for each process here, of which `accelerate launch` gives it one."""
    torch.set_num_threads(max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
