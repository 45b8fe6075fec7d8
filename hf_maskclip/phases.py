"""What changes during a training: phases, each a share of the run's samples, and in which of them a step is."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from .errors import fail


@dataclass(frozen=True)
class Phase:
    """A part of a training.

    Attributes:
        share: of the run's samples.
        image_size: the side of pictures, in pixels; 0: the model's.
        patch_mask: in place of the model's, in all its forms; None: the model's.
        mask_ratio: that the mask's ratios are set to; None: as they are.
        text_tokens: that a text mask leaves a caption; 0: the context length.
        ramp: whether the mask's ratios grow linearly from 0 over the phase.
        name: what messages call it.
    """

    share: float
    image_size: int = 0
    patch_mask: Any = None
    mask_ratio: float | None = None
    text_tokens: int = 0
    ramp: bool = False
    name: str = "the run"


class Allowed(NamedTuple):
    """What an option of a phase may be: its types, its values, and both in words."""

    types: tuple[type, ...]
    holds: Callable[[Any], bool]
    words: str


OPTIONS = {
    "share": Allowed((int, float), lambda value: 0 < value <= 1, "a number above 0 and at most 1, of the run's samples"),
    "image_size": Allowed((int,), lambda value: value >= 0, "a whole number of pixels, or 0 for the model's"),
    "patch_mask": Allowed((str, dict), bool, "a name, or a mapping such as {name: pgs}"),
    "mask_ratio": Allowed((int, float), lambda value: 0 <= value < 1, "a number at least 0 and below 1"),
    "text_tokens": Allowed((int,), lambda value: value >= 0, "a whole number of tokens, or 0 for the context length"),
    "ramp": Allowed((bool,), lambda value: True, "true or false"),
}


def read_phases(given: Any, **defaults: Any) -> list[Phase]:
    """Phases of a list of mappings, as a YAML file has them.

    Args:
        defaults: of options that a phase leaves out.

    Raises:
        ConfigError: another form, an unknown option, a value out of range, or shares that do not add up to 1.
    """
    if not isinstance(given, list) or not given or not all(isinstance(phase, Mapping) for phase in given):
        fail(f"phases={given!r}: must be a list such as [{{share: 0.9, image_size: 112}}, {{share: 0.1}}]")
    phases = [Phase(**(defaults | _checked(phase, f"phases[{number}]"))) for number, phase in enumerate(given)]
    total = sum(phase.share for phase in phases)
    if abs(total - 1) > 1e-6:
        fail(f"phases: their shares add up to {total:g}: must be 1")
    return phases


def _checked(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options of one phase, and its name."""
    for key, value in ({"share": None} | dict(given)).items():
        if key not in OPTIONS:
            fail(f"{name}: unknown option {key!r}: must be one of {', '.join(OPTIONS)}")
        types, holds, words = OPTIONS[key]
        is_of_type = isinstance(value, types) and isinstance(value, bool) == (bool in types)
        if not is_of_type or not holds(value):
            fail(f"{name}: {key}={value!r}: must be {words}")
    return {**given, "name": name}


def phases_of_schedule(ramp: float, unmasked: float, **settings: Any) -> list[Phase]:
    """The phases that short forms stand for: ratios that grow over a share of the run, and whole pictures in its last part.

    Args:
        ramp: the share over which they grow; the part with whole pictures ends it.
        unmasked: the share of whole pictures.
        settings: of every phase.
    """
    share = min(ramp, 1 - unmasked)
    phases = [
        Phase(share, ramp=True, **settings | {"name": f"mask_schedule={ramp:g}"}),
        Phase(1 - share - unmasked, **settings),
        Phase(unmasked, patch_mask="none", **settings | {"name": "unmasked_tuning_steps"}),
    ]
    return [phase for phase in phases if phase.share > 1e-9]


class Timeline:
    """In which phase each step of a training is, by the samples that were seen before it.

    Args:
        phases: their shares add up to 1.
        num_steps: of the training.
        samples_per_step: over all processes.
        steps_done, samples_done: of the checkpoint that it goes on from, which other processes may have made.

    Raises:
        ConfigError: a phase that is too short for a step.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        num_steps: int,
        samples_per_step: int = 1,
        steps_done: int = 0,
        samples_done: int = 0,
    ):
        self.phases, self.num_steps, self.samples_per_step = tuple(phases), num_steps, samples_per_step
        self.steps_done, self.samples_done = steps_done, samples_done
        # In whole samples, for sums of shares are not exact.
        self.ends = [round(share * self.samples) for share in accumulate(phase.share for phase in phases)]
        for number, phase in enumerate(self.phases[1:], start=1):
            starts_later = self.ends[number - 1] >= samples_done
            if starts_later and num_steps > steps_done and not self.steps_of(number):
                fail(f"{phase.name}: its share {phase.share:g} of {num_steps} steps has no step")

    @property
    def samples(self) -> int:
        """The samples of the whole training."""
        return self.samples_seen(self.num_steps)

    def samples_seen(self, step: int) -> int:
        """The samples that were seen after a step, those of the checkpoint included."""
        return max(0, self.samples_done + (step - self.steps_done) * self.samples_per_step)

    def progress(self, step: int) -> float:
        """The share of the samples that were seen after a step."""
        return self.samples_seen(step) / self.samples

    def number_at(self, step: int) -> int:
        """The number of the phase that a step is in, counted from 0; steps are counted from 1."""
        return min(bisect_right(self.ends, self.samples_seen(step - 1)), len(self.phases) - 1)

    def phase_at(self, step: int) -> Phase:
        """The phase that a step is in."""
        return self.phases[self.number_at(step)]

    def progress_in_phase(self, step: int) -> float:
        """The share of its phase that was seen before a step."""
        number = self.number_at(step)
        start = self.ends[number - 1] if number else 0
        return (self.samples_seen(step - 1) - start) / (self.ends[number] - start)

    def steps_of(self, number: int) -> range:
        """The steps of a phase, by its number; those before the checkpoint as if this run's processes had made them."""
        first = self._steps_to(self.ends[number - 1]) + 1 if number else 1
        return range(first, self._steps_to(self.ends[number]) + 1)

    def _steps_to(self, samples: int) -> int:
        """How many steps begin before so many samples were seen."""
        return self.steps_done - (self.samples_done - samples) // self.samples_per_step
