"""What a run would take, before it is started: its data, parameters, memory and FLOPs, and a step of a few pairs of each phase.

Shapes: B pairs of a step on one process.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate.utils import get_int_from_env
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from hf_maskclip.data.mix import mix_in_words
from hf_maskclip.phases import Timeline
from training.config import TrainingConfig
from training.data.batches import Batch
from training.data.loader import start_workers
from training.loop import expect_batch, training_step
from training.run import Run, prepare
from training.stopping import next_item
from training.tracking import StepResult

DRY_PAIRS = 4  # of each step
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # where launchers say it


@dataclass(frozen=True)
class Trial:
    """One step of few pairs: what it gave, its FLOPs, the bytes that it kept for the backward pass, and its seconds."""

    result: StepResult
    batch: Batch
    flops: int
    activation_bytes: int
    seconds: float


def dry_run(config: TrainingConfig) -> dict[str, float]:
    """Build all that a run needs, take a step of at most `DRY_PAIRS` pairs of each phase, and print what the run would take.

    FLOPs and activations grow in proportion to the pairs (of the logits, which grow with their square, only the first order is
    counted). A ramp is tried half-way. Nothing is written.

    Returns:
        What is printed, as numbers: FLOPs, and memory in bytes on each process; patches and loss are of the first phase.

    Raises:
        ConfigError: as [`training.run.prepare`].
        TrainingStopped: the data gives no batch.
    """
    pairs = min(DRY_PAIRS, config.batch_size)
    processes = get_int_from_env(WORLD_SIZES, 1)  # before they know of each other
    num_steps, warmup_steps = config.schedule(processes)
    timeline = config.timeline(processes, num_steps)
    trials_of = [replace(phase, share=1 / len(timeline.phases)) for phase in timeline.phases]
    # Two steps of each phase, for the second one of a ramp is half-way.
    alone = {"samples_seen": 0, "max_steps": 2 * len(trials_of), "warmup_steps": 0, "unmasked_tuning_steps": 0}
    run = prepare(replace(config, batch_size=pairs, chunk_size=0, resume="none", **alone), phases=trials_of)
    trials = list(try_phases(run))

    model = run.learner.model
    parameters, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    # In chunks each pair is encoded forwards twice and backwards once, which takes as much as two times forwards.
    factor = processes * config.batch_size / pairs * (4 / 3 if config.chunk_size else 1)
    flops = sum(factor * trial.flops * len(timeline.steps_of(number)) for number, trial in enumerate(trials))
    numbers = {
        "parameters": parameters,
        "trained_parameters": trained,
        "steps": num_steps,
        "flops_per_step": flops / num_steps,
        "flops": flops,
        "state_bytes": 4 * (parameters + 3 * trained),  # float32: weights; of those trained, gradients and two moments
        "activation_bytes": max(trial.activation_bytes for trial in trials) * (config.chunk_size or config.batch_size) / pairs,
        "kept_patches": trials[0].result.kept_patches,
        "loss": trials[0].result.loss,
    }
    if run.accelerator.is_main_process:
        phases = [phase_in_words(number, trial, timeline, factor) for number, trial in enumerate(trials)]
        print(in_words(config, run, numbers, trials[0], phases, warmup_steps))
    return numbers


def try_phases(run: Run) -> Iterator[Trial]:
    """The second of the two steps of each phase, taken."""
    batches = start_workers(run.data.loader)
    for number in range(len(run.timeline.phases)):
        _, batch = (expect_batch(next_item(batches), run.config.train_data) for _ in range(2))
        start = time.perf_counter()
        with FlopCounterMode(display=False) as counter, saved_activations(run.learner.model) as sizes:
            result = training_step(run, batch, step=2 * number + 2)
        yield Trial(result, batch, counter.get_total_flops(), sum(sizes.values()), time.perf_counter() - start)


def phase_in_words(number: int, trial: Trial, timeline: Timeline, factor: float) -> str:
    """The line of a phase; `factor` leads from the FLOPs of its trial to those of a step on all processes."""
    steps, result = timeline.steps_of(number), trial.result
    size = f"{result.image_size} pixels, " if result.image_size else ""
    ramp = " half-way" if timeline.phases[number].ramp else ""
    encoded = f"{result.patches_in_words} visible{ramp}, {result.text_tokens} text tokens"
    flops = factor * trial.flops
    which = f"steps {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f"step {steps[0]:,}"
    return (
        f"phase {number + 1:<5} {which}: {size}{encoded}, {flops / 1e12:.3g} TFLOP a step, "
        f"{flops * len(steps) / 1e18:.3g} EFLOP"
    )


def in_words(
    config: TrainingConfig, run: Run, numbers: dict[str, float], trial: Trial, phases: list[str], warmup_steps: int
) -> str:
    """The table of a run that takes these numbers; `trial` is that of its first phase, `phases` has a line for each."""
    processes = run.accelerator.num_processes
    parameters, trained = numbers["parameters"] / 1e6, numbers["trained_parameters"] / 1e6
    lines, keys = "\n".join(phases), ", ".join(trial.batch.keys[:2])
    return f"""
model       {config.model}, {parameters:.1f} million parameters, {trained:.1f} million of them trained
data        {mix_in_words(config.train_data)}: {run.data.mix.num_shards} shards, first pairs read: {keys}, ...
run         {numbers["steps"]:,} steps of {config.batch_size} pairs x {processes} processes, {warmup_steps:,} of them warm-up
{lines}
FLOPs       {numbers["flops_per_step"] / 1e12:.3g} TFLOP a step, {numbers["flops"] / 1e18:.3g} EFLOP in all
memory      {numbers["state_bytes"] / 1e9:.2f} GB for weights, gradients and optimizer on each process,
            {numbers["activation_bytes"] / 1e9:.2f} GB for activations
one step    of {run.config.batch_size} pairs: loss {numbers["loss"]:.3f}, {trial.seconds:.1f} s
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
