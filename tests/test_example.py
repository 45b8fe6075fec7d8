"""Proves that a run leaves a picture and captions by which a person can try its model, and says how."""

import re
from pathlib import Path

import pytest
from PIL import Image

from hf_maskclip import export_to_clip
from hf_maskclip.data.sources import open_source
from hf_maskclip.evaluation import Request, find_evaluations
from training.saving.example import make_example


@pytest.fixture
def folder(make_model, processor, tmp_path) -> Path:
    export_to_clip(make_model(), tmp_path / "run" / "export", processor)
    return tmp_path / "run"


@pytest.mark.parametrize("is_held_out", [True, False])
def test_the_code_that_is_printed_gives_the_scores_that_are_printed(is_held_out, folder, data, processor):
    evaluations = find_evaluations(f"{data}/val-0.tar" if is_held_out else "", Request())
    assert len(evaluations) == is_held_out
    pairs = open_source(f"{data}/train-*.tar").pairs()
    example = make_example(folder, evaluations, pairs, processor.tokenizer, context_length=32)
    said = example.in_words(folder / "export")
    assert ("was not in training" if is_held_out else "is of the training data") in said
    assert Image.open(folder / "example.png").size == Image.open(example.path).size
    assert example.captions[0] in example.scores
    assert len(set(example.captions)) == 3
    assert sum(example.scores.values()) == pytest.approx(1, abs=1e-4)

    (code,) = re.findall(r"(    from transformers import pipeline\n.*)\n", said, flags=re.DOTALL)
    printed: list = []
    exec("\n".join(line.removeprefix("    ") for line in code.splitlines()), {"print": printed.append})
    (scores,) = printed
    assert {score["label"]: score["score"] for score in scores} == pytest.approx(example.scores, abs=1e-5)


def test_captions_that_do_not_fit_give_no_example(folder, data, processor):
    pairs = open_source(f"{data}/train-*.tar").pairs()
    assert make_example(folder, [], pairs, processor.tokenizer, context_length=2) is None
    assert not (folder / "example.png").exists()
