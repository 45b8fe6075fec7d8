"""The data loader: worker processes that make batches, and outlive a SIGTERM until training has saved."""

import signal
import sys
from collections.abc import Iterator

from torch.utils.data import DataLoader

from hf_maskclip.data.remote import close_connections
from training.data.batches import Batch, PairBatches, Stopped
from training.stopping import obey_only_the_training_process


def usable_workers(num_shards: int, num_readers: int, num_workers: int) -> int:
    """As many of `num_workers` as there are shards for, where `num_readers` processes share the shards; at least 1 of any."""
    return min(num_workers, max(1, num_shards // num_readers))


def build_loader(batches: PairBatches, num_workers: int, pins_memory: bool = False) -> DataLoader:
    """The loader of ready batches. It is not for `accelerator.prepare`, which would split the stream a second time.

    Args:
        pins_memory: let a thread put batches where a GPU copies them from while it computes.
    """
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        collate_fn=_unchanged,
        pin_memory=pins_memory,
        worker_init_fn=obey_only_the_training_process,
    )


def _unchanged(batch: Batch | Stopped) -> Batch | Stopped:
    return batch


def start_workers(loader: DataLoader) -> Iterator[Batch | Stopped]:
    """The batches of a loader, from workers that a SIGTERM to all processes of a job does not end: training needs them until it
    has saved."""
    close_connections()  # before the workers are forked
    if sys.platform != "linux":
        return iter(loader)
    # Some libraries start threads in a forked process at once, which have to inherit the mask.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
