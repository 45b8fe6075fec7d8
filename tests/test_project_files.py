"""Proves that the files around the code agree with it: citation, changelog, guide for contributors, docs index, workflow."""

import re
from pathlib import Path

import pytest
import torch
import yaml

import hf_maskclip
from hf_maskclip import build_patch_mask
from hf_maskclip.data import shards, sources, specs
from hf_maskclip.evaluation import report
from hf_maskclip.models.patch_mask_registry import BUILT_IN
from hf_maskclip.models.patch_masking import Citation

ROOT = Path(__file__).resolve().parents[1]
GUIDE = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "docs/architecture.md"))
CITATIONS = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def as_citation(reference: dict) -> Citation:
    people = [author.get("name") or f"{author['family-names']}, {author['given-names']}" for author in reference["authors"]]
    key = reference["notes"].removeprefix("BibTeX key ")
    number = reference["url"].removeprefix("https://arxiv.org/abs/")
    return Citation(key, reference["title"], " and ".join(people), reference["year"], number)


def test_the_citation_file_has_the_version_and_the_papers_of_all_masks():
    assert CITATIONS["cff-version"] == "1.2.0"
    assert CITATIONS["version"] == hf_maskclip.__version__
    papers = {mask.citation for mask in BUILT_IN.values() if mask.citation}
    assert len(papers) > 5
    assert {as_citation(reference) for reference in CITATIONS["references"]} == papers


def test_the_changelog_has_what_is_unreleased_and_the_version():
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert titles[0] == "Unreleased"
    assert titles[1].startswith(f"{hf_maskclip.__version__} - ")


def test_the_index_of_the_docs_names_every_page_and_no_other():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == pages


def test_every_file_that_the_guide_names_exists():
    named = re.findall(r"`((?:hf_maskclip|training|tests|docs)/[\w./-]*)`", GUIDE)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("SHARD_KINDS", shards),
        ("SHARD_SUFFIXES", specs),
        ("GENERATED", sources),
        ("FAMILIES", report),
    ],
)
def test_the_tables_that_the_guide_names_are_where_it_says(name, module):
    file = f"{module.__name__.replace('.', '/')}.py"
    assert re.search(rf"`{name}`[^`]*`{file}`", GUIDE)
    assert hasattr(module, name)


def test_the_mask_of_the_guide_works():
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    exec(compile(code, "architecture.md", "exec"), {})
    selection = build_patch_mask("stripes", patch_size=8)(torch.zeros(2, 3, 32, 24))
    assert selection.indices.tolist() == [[0, 1, 2, 6, 7, 8]] * 2
    assert selection.lengths is None


def test_the_workflow_tests_the_oldest_python_that_the_package_allows():
    (oldest,) = re.findall(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert WORKFLOW["jobs"]["fast-tests"]["strategy"]["matrix"]["python-version"][0] == oldest


def test_the_workflow_checks_what_the_guide_asks_for():
    commands = {step.get("run") for job in WORKFLOW["jobs"].values() for step in job["steps"]}
    asked = {"ruff check .", "ruff format --check .", "mypy", 'pytest -m "not slow"', "pytest -n auto --dist loadfile"}
    assert asked <= commands
    assert all(command in GUIDE for command in asked)
