"""How far the data of a run is, so that a resumed run goes on with the next batch."""

import json
from collections import Counter
from pathlib import Path

from accelerate import Accelerator

from hf_maskclip.errors import fail
from training.data.batches import Batch, Position


def step_of(checkpoint: Path | None) -> int:
    """The step after which a checkpoint `step-<n>` was saved; 0 where there is none."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


class LoaderState:
    """Where the data workers of this process are, what they skipped, and how long training took.

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

    def use(self, batch: Batch) -> None:
        """Count a batch that training uses."""
        self.use_again(batch)
        self.skipped += batch.skipped

    def use_again(self, batch: Batch) -> None:
        """Count a batch that a resumed loader makes again: training has used it, and what it skipped is counted."""
        self.starts[batch.worker], self.ends[batch.worker] = batch.start, batch.end
        self.used_in_round = (self.used_in_round + 1) % self.num_readers

    def save(self, folder: Path) -> None:
        in_round = range(self.used_in_round)
        positions = {worker: self.starts[worker] if worker in in_round else end for worker, end in self.ends.items()}
        state = self.split | {"used_in_round": self.used_in_round, "positions": positions}
        state |= {"skipped": self.skipped, "train_seconds": self.train_seconds}
        self._file(folder).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> tuple[dict[int, Position], int]:
        """The positions at which a loader's workers begin, and how many of its first batches had been used.

        Raises:
            ConfigError: the checkpoint is of another number of processes or workers, whose shards were split in another way.
        """
        file = self._file(folder)
        state = (
            json.loads(file.read_text(encoding="utf-8"))
            if file.exists()
            else {"num_processes": f"fewer than {self.process + 1}"}
        )
        self.skipped, self.train_seconds = Counter(state.get("skipped")), state.get("train_seconds", 0.0)
        if not self.exact:
            return dict.fromkeys(range(self.num_readers), (step_of(folder), 0)), 0
        for key, value in self.split.items():
            if state.get(key) != value:
                fail(f"resume: {folder} is of {key} {state.get(key)}, this run has {value}: use as many")
        positions = {int(worker): tuple(position) for worker, position in state["positions"].items()}
        self.ends = dict(positions)
        return positions, state["used_in_round"]

    def _file(self, folder: Path) -> Path:
        return folder / f"data_process_{self.process}.json"
