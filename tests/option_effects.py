"""Where the options of a training run have their effects: the run as it is prepared, as it runs, or as a program."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hf_maskclip import export_to_clip
from training.loop import training_step
from training.run import Run


@dataclass
class Effects:
    """What the checks of options look at: a run that is prepared, that is run, or that is called as a program."""

    prepared: Callable[..., Run]
    run: Callable[..., tuple[dict, list[dict], Path]]
    options: dict
    tmp_path: Path
    monkeypatch: pytest.MonkeyPatch

    def batch(self, **changed: Any):
        return next(iter(self.prepared(**changed).data.loader))

    def base(self) -> str:
        """A folder to train on."""
        run = self.prepared()
        export_to_clip(run.learner.model, self.tmp_path / "base", run.learner.processor)
        return str(self.tmp_path / "base")

    def both(self, look: Callable[[Run], Any], **changed: Any) -> tuple[Any, Any]:
        """What is seen of a run with the default, and with an option changed."""
        return look(self.prepared()), look(self.prepared(**changed))


def first_step(run: Run) -> Run:
    run.learner.parallel.wrapped_model.train()
    training_step(run, next(iter(run.data.loader)), step=1)
    return run
