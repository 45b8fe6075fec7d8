"""The order of samples, and which of them each process reads."""

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node

from hf_maskclip.errors import ConfigError


def shard_stream(
    stream: datasets.IterableDataset,
    epoch: int = 0,
    *,
    process: int,
    num_processes: int,
    num_workers: int,
    seed: int,
    resampled: bool = False,
    name: str = "",
) -> datasets.IterableDataset:
    """Shuffle the shards of a stream, as fits an epoch, and give this process its own; the DataLoader splits them over workers.

    Each shard goes to one process, so that none reads what another uses, and every sample is seen once an epoch. Where shards
    do not divide, some processes have one more; the order, and so the split, differs from epoch to epoch.

    Args:
        resampled: give each process all shards instead, in an order of its own.
        name: of the source, for messages.

    Raises:
        ConfigError: fewer shards than processes x workers, or than workers where resampled.
    """
    order = [seed, epoch, process] if resampled else [seed, epoch]  # the same on all processes that share the shards
    num_processes = 1 if resampled else num_processes
    workers, shards = max(1, num_workers), stream.num_shards
    if shards < num_processes * workers:
        data = f"train_data={name!r}" if name else "train_data"
        raise ConfigError(
            f"{data} has {shards} shards for {num_processes} processes x {workers} workers: "
            f"use --num_workers {shards // num_processes} or split the data into at least {num_processes * workers} shards"
            if shards >= num_processes
            else f"{data} has {shards} shards for {num_processes} processes: split the data into more shards, or let each "
            "process read all of them in an order of its own by --stream resampled"
        )
    stream = stream.shuffle(seed=int(np.random.default_rng(order).integers(2**31)), buffer_size=1, max_buffer_input_shards=1)
    return stream if resampled else split_dataset_by_node(stream, rank=process, world_size=num_processes, strategy="shards")
