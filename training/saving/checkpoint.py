"""Checkpoints that are complete or invisible (written aside, then renamed), and going on from them exactly.

A checkpoint is a folder `checkpoints/step-<n>` that `from_pretrained` of the model's class loads. Beside the model it holds
Accelerate's state (optimizer, random numbers) and, for each process, where its data workers were.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, ProcessorMixin

from hf_maskclip.distributed import gather_numbers
from hf_maskclip.errors import TrainingStopped, fail
from training.data.position import LoaderState, step_of
from training.stopping import all_finite


def save_checkpoint(
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    state: LoaderState,
    output_dir: Path,
    step: int,
    keep: int,
    write_record: Callable[[Path], None],
) -> Path:
    """Write the checkpoint of a step, where it is not there yet, and return it; of all, keep the last `keep` (0: all).

    Args:
        write_record: writes what the checkpoint records of its run into the folder that it is given.

    Raises:
        TrainingStopped: a weight is not a number. Nobody can go on from that, so the checkpoints that are there stay.
    """
    final = output_dir / "checkpoints" / f"step-{step:08d}"
    partial = final.with_name(f"{final.name}.partial")
    if not all_finite(model):
        raise TrainingStopped(
            f"step {step}: its gradient was not finite, and the weights are lost; the last checkpoint is "
            f"{latest_checkpoint(output_dir)} (--resume auto goes on from it)"
        )
    if final.exists():
        return final
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=True)
    state.save(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if (partial / "model.safetensors").exists():
            model.config.save_pretrained(partial)
        else:  # Accelerate has not saved them: they are split over the processes, or their adapters lie apart
            model.save_pretrained(partial)
        processor.save_pretrained(partial)
        write_record(partial)
        partial.rename(final)
        for old in _complete(output_dir)[:-keep] if keep else []:
            shutil.rmtree(old)
    return final


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The last complete checkpoint of a run, or None."""
    complete = _complete(output_dir)
    return complete[-1] if complete else None


def check_all_see(checkpoint: Path | None, output_dir: Path) -> None:
    """Raise a ConfigError on all processes where they would go on from different checkpoints."""
    steps = gather_numbers(step_of(checkpoint))
    for process, step in enumerate(steps):
        if step != steps[0]:
            fail(
                f"output_dir={str(output_dir)!r}: process 0 sees a last checkpoint of step {steps[0]} there, process {process} "
                f"of step {step} (0: none); all machines need a shared folder, on one file system"
            )


def _complete(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in output_dir.glob("checkpoints/step-*") if path.suffix != ".partial")


def prepare_output_dir(output_dir: Path) -> Path | None:
    """Make the run's folder. A run that is already there is moved aside; its new folder is returned."""
    moved = None
    if (output_dir / "metrics.jsonl").exists():
        number = 1
        while (moved := output_dir.with_name(f"{output_dir.name}.{number}")).exists():
            number += 1
        output_dir.rename(moved)
    output_dir.mkdir(parents=True, exist_ok=True)
    return moved
