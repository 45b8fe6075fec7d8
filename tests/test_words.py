"""Proves that README and docs can be read: their length, the length of their sentences, and what each page opens with."""

import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))


def prose(page: Path) -> str:
    """A page without code, tables, pictures, headings, comments, and addresses of links."""
    text = re.sub(r"```.*?```", "\n\n", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "\n\n", text)
    is_prose = re.compile(r"(?!\s*(?:\||#|!\[))")
    lines = [re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n", line) if is_prose.match(line) else "" for line in text.splitlines()]
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines))
    return re.sub(r"`[^`]*`", "code", text)


def sentences(page: Path) -> list[list[str]]:
    """The words of each sentence; a paragraph ends one, too."""
    found = []
    for paragraph in re.split(r"\n\s*\n", prose(page)):
        for sentence in re.split(r"(?<=[.?!])[\"*)]*\s+", " ".join(paragraph.split())):
            words = re.findall(r"\w[\w'.,/+-]*", sentence)
            if words:
                found.append(words)
    return found


def columns_of_tables(page: Path) -> list[int]:
    rules = re.findall(r"^\|[-| :]+\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [len(rule.strip("|").split("|")) for rule in rules]


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1300
    assert columns_of_tables(README)
    assert max(columns_of_tables(README)) <= 6


@pytest.mark.parametrize(("page", "limit"), [(README, 17), *((page, 20) for page in PAGES)], ids=lambda value: str(value)[-16:])
def test_sentences_are_short(page, limit):
    lengths = [len(words) for words in sentences(page)]
    assert len(lengths) > 2
    assert mean(lengths) <= limit
    longest = max(sentences(page), key=len)
    assert len(longest) <= 25, " ".join(longest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_opens_with_the_command_that_does_it(page):
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line]
    assert lines[0].startswith("# ")
    assert lines[1] == "```bash"


def test_sentences_are_counted_as_a_reader_would(tmp_path):
    page = tmp_path / "page.md"
    text = "# Title\n\nOne two three. Four `a b c`:\n\n```bash\nno words here\n```\n\n| no | table |\n\n- five six\n- seven\n"
    page.write_text(text)
    assert [len(words) for words in sentences(page)] == [3, 2, 2, 1]
