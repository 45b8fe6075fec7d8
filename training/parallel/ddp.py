"""A whole model on every process, whose gradients are averaged (DDP); also a single process."""

from pathlib import Path

from training.config import TrainingConfig
from training.model.optimization import build_optimizer
from training.parallel.interface import Parallel


class DataParallel(Parallel):
    title = "DDP or one process"

    def wrap(self, config: TrainingConfig) -> None:
        self.wrapped_model = self.accelerator.prepare(self.model)
        self.optimizer = self.accelerator.prepare(build_optimizer(self.model, config))

    @staticmethod
    def has_saved(checkpoint: Path) -> bool:
        return (checkpoint / "optimizer.bin").is_file()
