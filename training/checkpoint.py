"""Checkpoints that are complete or invisible: written aside, then renamed."""

import shutil
from pathlib import Path

from accelerate import Accelerator
from transformers import CLIPProcessor

from hf_maskclip import MaskCLIPModel


def save_checkpoint(
    accelerator: Accelerator, model: MaskCLIPModel, processor: CLIPProcessor, output_dir: Path, step: int
) -> None:
    """Write `checkpoints/step-<n>`: the model as a folder that `from_pretrained` loads, and the optimizer's state."""
    final = output_dir / "checkpoints" / f"step-{step:06d}"
    partial = final.with_name(f"{final.name}.partial")
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model.config.save_pretrained(partial)
        processor.save_pretrained(partial)
        partial.rename(final)


def prepare_output_dir(output_dir: Path) -> Path | None:
    """Make the run's folder. A run that is already there is moved aside; its new place is returned."""
    moved = None
    if (output_dir / "metrics.jsonl").exists():
        number = 1
        while (moved := output_dir.with_name(f"{output_dir.name}.{number}")).exists():
            number += 1
        output_dir.rename(moved)
    output_dir.mkdir(parents=True, exist_ok=True)
    return moved
