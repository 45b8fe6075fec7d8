"""The suites: all five families of the papers' tables, on drawn scenes or on the papers' data sets, and a choice among them."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from accelerate import PartialState

from ..errors import fail
from ..options import SUITES
from .datasets.papers import PaperSuite
from .datasets.scenes import scene_suite
from .download import merged
from .tasks import Evaluation, Task


def tasks_of_suite(suite: str, image_size: int = 224, data_root: str = "") -> list[Task]:
    """The tasks of a suite, one of [`hf_maskclip.options.SUITES`]; none reads data before it is opened.

    Args:
        image_size: in pixels, of pictures that are drawn.
        data_root: the folder of the papers' data sets.
    """
    return scene_suite(image_size) if suite == "scenes" else PaperSuite(Path(data_root)).tasks()


def suite_of(names: Sequence[str]) -> str:
    """The suite that has all the tasks of these names.

    Raises:
        ConfigError: none has, or both have.
    """
    known = {suite: {word for task in tasks_of_suite(suite) for word in (task.name, task.family)} for suite in SUITES}
    suites = [suite for suite, words in known.items() if words.issuperset(names)]
    if not suites:
        _check_names(names, set().union(*known.values()))
        fail(f"tasks {', '.join(names)}: no suite has all of them")
    if len(suites) > 1:
        fail(f"tasks {', '.join(names)}: are in the suites {' and '.join(suites)}; say which suite")
    return suites[0]


def choose_tasks(tasks: Sequence[Task], names: Sequence[str]) -> list[Task]:
    """The tasks of these names or families, in the order of the suite; all where no name is given.

    Raises:
        ConfigError: a name is that of no task.
    """
    _check_names(names, {word for task in tasks for word in (task.name, task.family)})
    return [task for task in tasks if not names or task.name in names or task.family in names]


def open_tasks(tasks: Sequence[Task], names: Sequence[str] = ()) -> list[Evaluation]:
    """The evaluations of tasks whose data is there; what is missing is printed first.

    Args:
        names: of tasks that were asked for by themselves.

    Raises:
        ConfigError: data of one of `names`, or of all tasks, is missing.
    """
    missing = merged(part for task in tasks for part in task.missing)
    if missing and PartialState().is_main_process:
        print("missing, and where to get it:", *missing, sep="\n  ", file=sys.stderr)
    wanted = [task.name for task in tasks if task.missing and task.name in names]
    if wanted:
        fail(f"task {wanted[0]}: its data is not there")
    if all(task.missing for task in tasks):
        fail("none of the data sets is there; hf-maskclip download gets them")
    return [task.open() for task in tasks if not task.missing]


def _check_names(names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "hf-maskclip evaluate --list_tasks shows them all"
            fail(f"task {name!r}: there is none of this name; {hint}")
