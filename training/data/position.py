"""How far the data of a run is, so that a resumed run goes on with the next batch."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_maskclip.errors import fail
from training.data.batches import Batch, Places
from training.data.windows import Place


def step_of(checkpoint: Path | None) -> int:
    """The step after which a checkpoint `step-<n>` was saved; 0 where there is none."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


class LoaderState:
    """Where the data workers of this process are, what they skipped, and how long training took.

    Positions are those of the batches that training has used, not of those that were prepared. A DataLoader asks its workers in
    turn, from the first one on. So a resumed loader starts each worker at the beginning of the round that was under way; the
    batches of that round that had been used are read again and dropped.

    A stream that cannot go on there begins the epoch whose number is the step's, which no run has been in yet.

    Args:
        is_exact: whether to go on at these positions, which another number of processes or workers does not have.
        may_begin_anew: whether to begin an epoch where the numbers differ.
    """

    def __init__(self, accelerator: Accelerator, num_workers: int, is_exact: bool = True, may_begin_anew: bool = False):
        self.is_exact, self.may_begin_anew = is_exact, may_begin_anew
        self.split = {"num_processes": accelerator.num_processes, "num_workers": num_workers}
        self.process = accelerator.process_index
        self.num_readers = max(1, num_workers)
        self.starts: dict[int, Places] = {}  # of each worker's last batch
        self.ends: dict[int, Places] = {}
        self.used_in_round = 0
        self.skipped: Counter[str] = Counter()
        self.of_sources: Counter[str] = Counter()
        self.train_seconds = 0.0

    def use(self, batch: Batch) -> None:
        """Count a batch that training uses."""
        self.use_again(batch)
        self.skipped += batch.skipped
        self.of_sources += batch.of_sources

    def use_again(self, batch: Batch) -> None:
        """Count a batch that a resumed loader makes again: training has used it, and what it skipped is counted."""
        self.starts[batch.worker], self.ends[batch.worker] = batch.starts, batch.ends
        self.used_in_round = (self.used_in_round + 1) % self.num_readers

    def save(self, folder: Path) -> None:
        in_round = range(self.used_in_round)
        places = {worker: self.starts[worker] if worker in in_round else ends for worker, ends in self.ends.items()}
        state = self.split | {"used_in_round": self.used_in_round, "places_in_sources": places}
        state |= {"skipped": self.skipped, "of_sources": self.of_sources, "train_seconds": self.train_seconds}
        _file(folder, self.process).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path, num_sources: int) -> tuple[dict[int, Places], int]:
        """Where a loader's workers begin in each source, and how many of its first batches had been used.

        Raises:
            ConfigError: the checkpoint is of another number of processes or workers, whose shards were split in another way.
        """
        saved = _read(folder, 0)
        if "places_in_sources" not in saved:
            fail(f"resume: {folder} is of an older version, whose rows have another order; give another output_dir")
        # Of more processes than there are now, each takes over what several have counted.
        taken_over = range(self.process, saved["num_processes"], self.split["num_processes"])
        states = [_read(folder, process) for process in taken_over]
        self.skipped, self.of_sources = (
            sum((Counter(state[name]) for state in states), Counter()) for name in ("skipped", "of_sources")
        )
        self.train_seconds = max((state["train_seconds"] for state in states), default=0.0)
        is_split_alike = all(saved[key] == value for key, value in self.split.items())
        if self.is_exact and is_split_alike:
            (state,) = states
            places = {
                int(worker): tuple(Place(*place) for place in of_sources)
                for worker, of_sources in state["places_in_sources"].items()
            }
            num_batches_used = state["used_in_round"]
        else:
            if self.is_exact:
                self._begin_anew(folder, saved)
            begin = (Place(epoch=step_of(folder)),) * num_sources
            places, num_batches_used = dict.fromkeys(range(self.num_readers), begin), 0
        self.ends = dict(places)
        return places, num_batches_used

    def _begin_anew(self, folder: Path, saved: dict[str, Any]) -> None:
        """Say that the order of samples is another from here on. Raises ConfigError where nobody has asked for that."""
        there, here = (f"{split['num_processes']} processes x {split['num_workers']} workers" for split in (saved, self.split))
        if not self.may_begin_anew:
            fail(
                f"resume: {folder} is of {there}, this run has {here}: use as many, or --resume fresh_pass, which begins a new "
                "pass over the data (a run of --stream resampled goes on with any)"
            )
        if self.process == 0:
            print(f"{folder} is of {there}, this run has {here}: it begins a fresh pass over the data")


def _read(folder: Path, process: int) -> dict[str, Any]:
    return json.loads(_file(folder, process).read_text(encoding="utf-8"))


def _file(folder: Path, process: int) -> Path:
    return folder / f"data_process_{process}.json"
