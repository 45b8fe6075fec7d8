"""From the name of evaluation data to its evaluations: here alone it is decided which reader it is for."""

from dataclasses import dataclass, field
from pathlib import Path

from ...data.clip_benchmark import ClipBenchmarkFolder
from ...data.scene_source import NAME as SCENES
from ...data.specs import SHARD_SUFFIXES, expand_braces
from ...errors import as_config_error, fail
from ..linear_probe import Solver
from ..tasks import Evaluation
from .clip_benchmark import captioned, classification
from .labelled import labelled_data
from .pairs import PairKeys, pairs
from .scenes import scene_evaluations
from .sugar_crepe import sugar_crepe


@dataclass(frozen=True)
class Request:
    """What is asked of evaluation data.

    Args:
        task: one of [`hf_maskclip.options.TASKS`], or None for what the data itself says it is for.
        split: of the data.
        image_size: in pixels, of pictures that are drawn.
        keys: the fields of pairs.
        class_names_file, templates_file: replace those of the data; `""`: they do not.
        solver: of a linear probe.
        is_checked: whether to look at all targets first, which reads the data once without decoding.
    """

    task: str | None = None
    split: str = "test"
    image_size: int = 224
    keys: PairKeys = field(default_factory=PairKeys)
    class_names_file: str = ""
    templates_file: str = ""
    solver: Solver = "gradient_descent"
    is_checked: bool = True


def find_evaluations(data: str, request: Request) -> list[Evaluation]:
    """The evaluations of data, one for each folder that the braces of its name lead to; SugarCrepe has seven, scenes four.

    Data is opened here, so that a wrong name is found before anything long starts, and read anew at each evaluation.

    Args:
        data: a clip-benchmark folder, local or on the Hub; an image folder or Hub data set with labels; pairs in any form that
            training takes; SugarCrepe's JSON files beside COCO's `val2017/`; `scenes`; or `""`, which is nothing.

    Raises:
        ConfigError: data that is not there, or is of no use for the task; two folders of one name.
    """
    if not data:
        return []
    if data == SCENES and request.task is None:
        return scene_evaluations(request.image_size)
    if request.task == "compositionality":
        return sugar_crepe(Path(data))
    by_folder: dict[str, list[str]] = {}
    for path in expand_braces(data):
        by_folder.setdefault(path.rpartition("/")[0] if path.endswith(SHARD_SUFFIXES) else path, []).append(path)
    evaluations = [_evaluation_of_folder(folder, paths, request) for folder, paths in by_folder.items()]
    names = [evaluation.name for evaluation in evaluations]
    if repeated := [name for name in names if names.count(name) > 1]:
        fail(f"{data!r}: two evaluations would be named {repeated[0]}; rename a folder")
    for evaluation in evaluations if request.is_checked else []:
        evaluation.check()
    return evaluations


def _evaluation_of_folder(folder: str, paths: list[str], request: Request) -> Evaluation:
    """The evaluation of one folder, or of the files `paths` in it."""
    with as_config_error("data", folder):
        layout = ClipBenchmarkFolder.find(folder) if paths == [folder] else None
    files = {"class_names_file": request.class_names_file, "templates_file": request.templates_file}
    task = request.task or _own_task(layout)
    if task == "retrieval":
        if layout and layout.kind == "retrieval":
            return captioned(layout, request.split)
        if layout and request.task:
            fail(f"data={folder!r}: {_why_not_for_retrieval(layout)}")
        return pairs(_name_of(folder), paths, request.keys, request.split)
    if layout and layout.kind == "retrieval":
        fail(f"data={folder!r}: is a retrieval data set, and has no classes for {task}")
    labelled = classification(layout, **files) if layout else labelled_data(folder, request.split, **files)
    if task == "linear_probe":
        return labelled.linear_probe(request.split, request.solver)
    return labelled.zero_shot(request.split)


KINDS = ("retrieval", "multilabel", "classification")


def _why_not_for_retrieval(layout: ClipBenchmarkFolder) -> str:
    """What is wrong with a folder in clip-benchmark's layout of another kind than retrieval."""
    said = layout.text("dataset_type.txt")
    wanted = "write retrieval into it for a data set of captions"
    if said is not None and layout.kind not in KINDS:
        return f"its dataset_type.txt says {said.strip()!r}, which is none of {', '.join(KINDS)}; {wanted}"
    if layout.text("classnames.txt") is None:
        return f"has {'no dataset_type.txt' if said is None else f'{said.strip()!r} in its dataset_type.txt'}; {wanted}"
    return "is a data set of classes, and has no captions for retrieval"


def _own_task(layout: ClipBenchmarkFolder | None) -> str:
    has_classes = layout and layout.kind != "retrieval" and layout.text("classnames.txt") is not None
    return "zero_shot_classification" if has_classes else "retrieval"


def _name_of(folder: str) -> str:
    return folder.rstrip("/").rpartition("/")[2]
