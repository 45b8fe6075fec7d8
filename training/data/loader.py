"""The data loader: which part of the stream is whose, and worker processes that make batches of it.

They outlive a SIGTERM until training has saved.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from accelerate import Accelerator
from datasets import IterableDataset
from torch.utils.data import DataLoader

from hf_maskclip.data.remote import close_connections
from hf_maskclip.data.source import Source
from training.config import TrainingConfig
from training.data.batches import Batch, PairBatches, Stopped
from training.data.shuffling import shard_stream
from training.stopping import obey_only_the_training_process


def usable_workers(num_shards: int, num_readers: int, num_workers: int) -> int:
    """As many of `num_workers` as there are shards for, where `num_readers` processes share the shards; at least 1 of any."""
    return min(num_workers, max(1, num_shards // num_readers))


def with_usable_workers(config: TrainingConfig, num_shards: int, accelerator: Accelerator) -> TrainingConfig:
    """The options with no more data workers than there are shards for, which is said."""
    num_readers = accelerator.num_processes if config.stream == "exact" else 1
    num_workers = usable_workers(num_shards, num_readers, config.num_workers)
    if num_workers < config.num_workers and accelerator.is_main_process:
        used = f"uses {num_workers}, for train_data={config.train_data!r} has {num_shards} shards"
        print(f"num_workers={config.num_workers}: {used}")
    return replace(config, num_workers=num_workers)


def epoch_opener(source: Source, config: TrainingConfig, accelerator: Accelerator) -> Callable[[int], IterableDataset]:
    """A function that gives this process its part of the stream in an epoch.

    Raises:
        ConfigError: too few shards.
    """
    open_epoch = partial(
        shard_stream,
        source.stream,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=config.num_workers,
        seed=config.seed,
        buffer_size=config.shuffle_buffer if source.needs_shuffling else 0,
        resampled=config.stream == "resampled",
    )
    open_epoch(0)  # so that it raises now, not in a worker
    return open_epoch


def build_loader(batches: PairBatches, num_workers: int) -> DataLoader:
    """The loader of ready batches. It is not for `accelerator.prepare`, which would split the stream a second time."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        collate_fn=_unchanged,
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
