"""Checkpoints that are complete or invisible (written aside, then renamed), and going on from them exactly.

A checkpoint is a folder `checkpoints/step-<n>` that `MaskCLIPModel.from_pretrained` loads. Beside the model it holds
Accelerate's state (optimizer, random numbers) and, for each process, where its data workers were.
"""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import CLIPProcessor

from hf_maskclip import MaskCLIPModel
from training.data import Position
from training.errors import ConfigError, TrainingStopped
from training.stopping import all_finite


class Progress:
    """How far a run is: where the data workers of this process are, what they skipped, and how long training took.

    Positions are those of the batches that training has used, not of those that were prepared. A DataLoader asks its workers in
    turn, from the first one on. So a resumed loader starts each worker at the beginning of the round that was under way; the
    batches of that round that had been used are read again and dropped.

    Args:
        exact: whether to go on at these positions; else (a resampled stream) with the epoch whose number is the step's.
    """

    def __init__(self, accelerator: Accelerator, num_workers: int, exact: bool):
        self.exact = exact
        self.split = {"num_processes": accelerator.num_processes, "num_workers": num_workers}
        self.process = accelerator.process_index
        self.num_readers = max(1, num_workers)
        self.starts: dict[int, Position] = {}  # of each worker's last batch
        self.ends: dict[int, Position] = {}
        self.used_in_round = 0
        self.skipped: Counter[str] = Counter()
        self.train_seconds = 0.0

    def use(self, batch: dict[str, Any], again: bool = False) -> None:
        """Count a batch that training uses, or, where it comes `again` after a resumption, has used."""
        worker = batch["worker"]
        self.starts[worker], self.ends[worker] = batch["start"], batch["end"]
        self.used_in_round = (self.used_in_round + 1) % self.num_readers
        if not again:
            self.skipped += batch["skipped"]

    def save(self, folder: Path) -> None:
        in_round = range(self.used_in_round)
        positions = {worker: self.starts[worker] if worker in in_round else end for worker, end in self.ends.items()}
        state = self.split | {"used_in_round": self.used_in_round, "positions": positions}
        state |= {"skipped": self.skipped, "train_seconds": self.train_seconds}
        self._file(folder).write_text(json.dumps(state))

    def load(self, folder: Path) -> tuple[dict[int, Position], int]:
        """The positions at which a loader's workers begin, and how many of its first batches had been used.

        Raises:
            ConfigError: the checkpoint is of another number of processes or workers, whose shards were split in another way.
        """
        file = self._file(folder)
        state = json.loads(file.read_text()) if file.exists() else {"num_processes": f"fewer than {self.process + 1}"}
        self.skipped, self.train_seconds = Counter(state.get("skipped")), state.get("train_seconds", 0.0)
        if not self.exact:
            return dict.fromkeys(range(self.num_readers), (checkpoint_step(folder), 0)), 0
        for key, value in self.split.items():
            if state.get(key) != value:
                raise ConfigError(f"resume: {folder} is of {key} {state.get(key)}, this run has {value}: use as many")
        positions = {int(worker): tuple(position) for worker, position in state["positions"].items()}
        self.ends = dict(positions)
        return positions, state["used_in_round"]

    def _file(self, folder: Path) -> Path:
        return folder / f"data_process_{self.process}.json"


def save_checkpoint(
    accelerator: Accelerator,
    model: MaskCLIPModel,
    processor: CLIPProcessor,
    progress: Progress,
    output_dir: Path,
    step: int,
    keep: int,
) -> Path:
    """Write the checkpoint of a step, where it is not there yet, and return it; of all, keep the last `keep` (0: all).

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
    progress.save(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if (partial / "model.safetensors").exists():
            model.config.save_pretrained(partial)
        else:  # the weights are split over the processes, and Accelerate does not know of them
            model.save_pretrained(partial)
        processor.save_pretrained(partial)
        partial.rename(final)
        for old in _complete(output_dir)[:-keep] if keep else []:
            shutil.rmtree(old)
    return final


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The last complete checkpoint of a run, or None."""
    complete = _complete(output_dir)
    return complete[-1] if complete else None


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _complete(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in output_dir.glob("checkpoints/step-*") if path.suffix != ".partial")


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
