"""Which kind of parallelism the launch file asks for."""

from pathlib import Path

from hf_maskclip.errors import fail
from training.parallel.ddp import DataParallel
from training.parallel.deepspeed import DeepSpeedParallel, deepspeed_requested
from training.parallel.fsdp import FullyShardedParallel, fsdp_requested
from training.parallel.interface import Parallel

KINDS: tuple[type[Parallel], ...] = (DataParallel, FullyShardedParallel, DeepSpeedParallel)


def requested_parallel() -> type[Parallel]:
    """The kind that `accelerate launch` asks for. Called once, before the Accelerator is made.

    Raises:
        ConfigError: it cannot be had as asked for.
    """
    if fsdp_requested():
        return FullyShardedParallel
    return DeepSpeedParallel if deepspeed_requested() else DataParallel


def check_checkpoint(checkpoint: Path, parallel: type[Parallel]) -> None:
    """Raise a ConfigError where a run would go on from a checkpoint of another kind, whose optimizer it cannot read."""
    if parallel.has_saved(checkpoint):
        return
    saved = " or ".join(kind.title for kind in KINDS if kind.has_saved(checkpoint)) or "something else"
    fail(
        f"resume: {checkpoint} was saved by {saved}, and this run is one of {parallel.title}: "
        "go on as it began, or use another output_dir and the export"
    )
