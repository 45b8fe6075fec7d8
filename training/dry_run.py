"""What a run would take, before it is started: its data, parameters, memory and FLOPs, and one step of a few pairs.

Shapes: B pairs of a step on one process.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from training.config import TrainingConfig
from training.data.batches import Batch
from training.data.loader import start_workers
from training.loop import expect_batch, training_step
from training.run import Run, prepare

DRY_PAIRS = 4  # of the one step


def dry_run(config: TrainingConfig) -> dict[str, float]:
    """Build everything that a run needs, take one step of at most `DRY_PAIRS` pairs, and print what the whole run would take.

    FLOPs and activations grow in proportion to the pairs (of the logits, which grow with their square, only the first order is
    counted). Nothing is written.

    Returns:
        What is printed, as numbers: FLOPs, and memory in bytes on each process.

    Raises:
        ConfigError: as [`training.run.prepare`].
        TrainingStopped: the data gives no batch.
    """
    pairs = min(DRY_PAIRS, config.batch_size)
    run = prepare(replace(config, batch_size=pairs, chunk_size=0, max_steps=1, samples_seen=0, warmup_steps=0, resume="none"))
    processes = run.accelerator.num_processes
    num_steps, warmup_steps = config.schedule(processes)
    batch = expect_batch(next(start_workers(run.data.loader)), config.train_data)
    model = run.learner.model
    start = time.perf_counter()
    with FlopCounterMode(display=False) as counter, saved_activations(model) as sizes:
        result = training_step(run, batch, step=1)
    seconds = time.perf_counter() - start

    parameters, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    # In chunks each pair is encoded forwards twice and backwards once, which takes as much as two times forwards.
    flops = counter.get_total_flops() * config.batch_size / pairs * (4 / 3 if config.chunk_size else 1)
    numbers = {
        "parameters": parameters,
        "trained_parameters": trained,
        "steps": num_steps,
        "flops_per_step": flops * processes,
        "flops": flops * processes * num_steps,
        "state_bytes": 4 * (parameters + 3 * trained),  # float32: weights; of those trained, gradients and two moments
        "activation_bytes": sum(sizes.values()) * (config.chunk_size or config.batch_size) / pairs,
        "kept_patches": result.kept_patches,
        "loss": result.loss,
    }
    if run.accelerator.is_main_process:
        print(in_words(config, run, numbers, batch, warmup_steps, seconds))
    return numbers


def in_words(
    config: TrainingConfig, run: Run, numbers: dict[str, float], batch: Batch, warmup_steps: int, seconds: float
) -> str:
    """The table of a run that takes these numbers; `batch` is that of the one step, which took so many seconds."""
    processes, num_patches = run.accelerator.num_processes, run.learner.model.vision_model.embeddings.num_patches
    parameters, trained = numbers["parameters"] / 1e6, numbers["trained_parameters"] / 1e6
    return f"""
model       {config.model}, {parameters:.1f} million parameters, {trained:.1f} million of them trained
data        {config.train_data}: {run.data.source.stream.num_shards} shards, first batch read: {", ".join(batch.keys[:2])}, ...
run         {numbers["steps"]:,} steps of {config.batch_size} pairs x {processes} processes, {warmup_steps:,} of them warm-up
patches     {numbers["kept_patches"]:.0f} of {num_patches} visible
FLOPs       {numbers["flops_per_step"] / 1e12:.3g} TFLOP a step, {numbers["flops"] / 1e18:.3g} EFLOP in all
memory      {numbers["state_bytes"] / 1e9:.2f} GB for weights, gradients and optimizer on each process,
            {numbers["activation_bytes"] / 1e9:.2f} GB for activations
one step    of {run.config.batch_size} pairs: loss {numbers["loss"]:.3f}, {seconds:.1f} s
"""


@contextmanager
def saved_activations(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """The bytes of each tensor that autograd keeps for the backward pass, weights left out, by address."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept_alive: list[torch.Tensor] = []  # so that no address is used twice
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept_alive.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes
