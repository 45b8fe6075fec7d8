"""A picture that a run leaves beside its model, and captions to tell it by: what a person can classify first.

`example.json` beside it has the captions and what the model says of them. The model's card shows both.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image
from transformers import PreTrainedTokenizerBase, pipeline

from hf_maskclip.evaluation.pixels import load_picture
from hf_maskclip.evaluation.tasks import Evaluation

PICTURE = "example.png"
NUM_CAPTIONS = 3
LOOKED_AT = 100  # pairs, of which those with the shortest captions are taken


@dataclass(frozen=True)
class Example:
    """A picture of the run's folder, the captions of three pictures, its own first, and their scores by the export."""

    path: Path
    captions: list[str]
    scores: dict[str, float]
    is_held_out: bool

    def in_words(self, model: Path) -> str:
        """The scores, and the code that gives them."""
        scored = "\n".join(f"    {score:4.0%}  {caption}" for caption, score in self.scores.items())
        seen = "was not in training" if self.is_held_out else "is of the training data"
        return f"""{self.path} {seen}, and its caption is "{self.captions[0]}". The model says:

{scored}

by this code, which needs Transformers alone:

    from transformers import pipeline

    classify = pipeline("zero-shot-image-classification", model="{model}")
    captions = {self.captions}
    print(classify("{self.path}", candidate_labels=captions, hypothesis_template="{{}}"))
"""


def make_example(
    folder: Path,
    evaluations: list[Evaluation],
    training_pairs: Iterable[tuple[Image.Image, str]],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
) -> Example | None:
    """Write the picture into a run's folder and score it by the run's export; None where fewer captions than needed fit.

    Args:
        evaluations: pairs of retrieval, which are held out, go first.
        training_pairs: where there is no retrieval.
        context_length: tokens that a caption may have.
    """
    retrieval = [evaluation for evaluation in evaluations if evaluation.family == "retrieval"]
    pairs = list(islice(_held_out(retrieval[0]) if retrieval else training_pairs, LOOKED_AT))
    lengths = {caption: len(tokenizer(caption)["input_ids"]) for _, caption in pairs}
    shortest = sorted((pair for pair in pairs if lengths[pair[1]] <= context_length), key=lambda pair: lengths[pair[1]])
    captions = list(dict.fromkeys(caption for _, caption in shortest))[:NUM_CAPTIONS]
    if len(captions) < NUM_CAPTIONS:
        return None
    path = folder / PICTURE
    shortest[0][0].save(path)
    classify = pipeline("zero-shot-image-classification", model=str(folder / "export"))
    found = classify(str(path), candidate_labels=captions, hypothesis_template="{}")
    example = Example(path, captions, {score["label"]: score["score"] for score in found}, bool(retrieval))
    about = {"picture": PICTURE, "captions": captions, "scores": example.scores, "is_held_out": example.is_held_out}
    (folder / "example.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return example


def _held_out(evaluation: Evaluation) -> Iterator[tuple[Image.Image, str]]:
    """Pictures of retrieval, each with its shortest caption."""
    samples: Iterable = evaluation.images[0].samples
    for opened, captions in samples:
        if picture := load_picture(opened):
            yield picture, min(captions, key=len)
