"""Proves what the layout promises: imports point downwards and never in a circle, `models/` is what remote code ships, the
package needs nothing of a clone, starts without what it does not use, and no function or file outgrows a reader."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from hf_maskclip.models.patch_mask_registry import BUILT_IN
from hf_maskclip.options import built_in_masks

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("hf_maskclip/**/*.py"), *ROOT.glob("training/**/*.py")])
MODELS = ROOT / "hf_maskclip" / "models"
# The floors of the package, the lowest first. What is on one may import what is on it or below.
FLOORS = (
    ("errors", "distributed", "averaging"),
    ("options", "model_folder", "phases"),
    ("models", "data", "losses", "auto_config"),
    ("texts", "dual_encoders"),
    ("conversion", "evaluation", "visualization", "mask_schedule"),
    ("trainer_callback",),
    ("hub", "demo"),
    ("commands",),
    ("cli",),
    ("__main__", "__init__"),
)
HEAVY = ("kornia", "torchvision", "matplotlib", "datasets", "evaluate")


def module_of(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(file): file for file in SOURCES}


def imports_of(file: Path) -> set[str]:
    """The modules of this project that a file imports, in functions too, but not for type checkers alone."""
    module, found = module_of(file), set()
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {origin, *(f"{origin}.{name.name}" for name in node.names)}
    own = {name for name in found if name in MODULES}
    return own - {module}


IMPORTS = {module: imports_of(file) for module, file in MODULES.items()}


def test_there_is_something_to_look_at():
    assert len(MODULES) > 80
    assert sum(map(len, IMPORTS.values())) > 200
    assert "hf_maskclip.models.patch_masking" in IMPORTS["hf_maskclip.models.patch_mask_registry"]


def test_no_file_imports_itself_round_a_circle():
    finished, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in finished:
            return
        path.append(module)
        for other in sorted(IMPORTS[module]):
            visit(other)
        path.pop()
        finished.add(module)

    for module in MODULES:
        visit(module)


def test_the_package_never_imports_the_training_program():
    users = {module for module, found in IMPORTS.items() if any(name.startswith("training") for name in found)}
    assert users
    assert all(module.startswith("training") for module in users)


def test_the_models_import_nothing_outside_themselves_but_libraries():
    for module, found in IMPORTS.items():
        if module.startswith("hf_maskclip.models"):
            outside = {name for name in found if not name.startswith("hf_maskclip.models.")}
            assert outside <= {"hf_maskclip.models"}, module


def floor_of(module: str) -> int:
    room = (module.split(".") + ["__init__"])[1]
    (number,) = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    return number


def test_imports_of_the_package_point_downwards():
    for module, found in IMPORTS.items():
        if module.startswith("hf_maskclip"):
            above = {name for name in found - {"hf_maskclip"} if floor_of(name) > floor_of(module)}
            assert not above, module


def test_what_transformers_copies_is_the_folder_of_the_models():
    start = MODELS / "modeling_maskclip.py"
    copied = {Path(file).name for file in get_relative_import_files(start)} | {start.name}
    assert copied == {file.name for file in MODELS.glob("*.py")} - {"__init__.py"}
    assert not [file for file in MODELS.iterdir() if file.is_dir() and file.name != "__pycache__"]


def test_help_names_the_built_in_masks_without_importing_them():
    assert built_in_masks() == sorted(BUILT_IN)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_function_outgrows_50_lines_and_no_file_350(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [node.name for node in functions if node.end_lineno - node.lineno + 1 >= 50] == []


def test_no_test_outgrows_a_reader_either():
    lengths = {file.name: file.read_text(encoding="utf-8").count("\n") for file in ROOT.glob("tests/*.py")}
    assert len(lengths) > 30
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_training_shows_few_entries():
    entries = [path for path in (ROOT / "training").iterdir() if path.name != "__pycache__"]
    assert 10 < len(entries) <= 18


def loaded_by(code: str, *arguments: str) -> set[str]:
    """The heavy packages that a new process has imported after some code."""
    report = "import sys; print(*(n for n in ('torch', 'transformers', *sys.argv[-1].split(',')) if n in sys.modules))"
    command = [sys.executable, "-c", f"{code}\n{report}", *arguments, ",".join(HEAVY)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return set(finished.stdout.splitlines()[-1].split())


@pytest.mark.slow
def test_the_package_is_imported_without_what_only_some_of_it_needs():
    assert loaded_by("import hf_maskclip") == {"torch", "transformers"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "from hf_maskclip.cli import main; main(['--help'])",
        "from hf_maskclip.cli import main; main(['evaluate', '--help'])",
        "from training.train import program; program(['--help'])",
    ],
)
def test_help_waits_for_no_package(program):
    code = "\n".join(["try:", f"    {program}", "except SystemExit:", "    pass"])
    assert loaded_by(code, "--help") == set()


@pytest.mark.slow
def test_the_auto_classes_know_the_models_once_the_package_is_imported(make_model, tmp_path):
    """In a process that touches no name of the package."""
    make_model("random").save_pretrained(tmp_path / "model")
    code = (
        "import hf_maskclip\nfrom transformers import AutoConfig, AutoModel\n"
        "assert type(AutoConfig.for_model('maskclip')).__name__ == 'MaskCLIPConfig'\n"
        f"model = AutoModel.from_pretrained({str(tmp_path / 'model')!r})\n"
        "assert type(model).__name__ == 'MaskCLIPModel', type(model)"
    )
    assert "torch" in loaded_by(code)
