"""Compositionality: does a picture know its caption from a false one of the same words (SugarCrepe, arXiv 2306.14610)?

Shapes: N pictures, E projection size.
"""

from collections.abc import Mapping
from typing import Any

from .details import of_pairs
from .encoder import Encoder, ImageSet
from .metrics import HardNegativeAccuracy

# What the papers' averages are over: the last word of a kind of false captions says what they are wrong about.
ABOUT = ("object", "attribute", "relation")


def evaluate_compositionality(encoder: Encoder, images: ImageSet, *, details: bool = False) -> dict[str, Any]:
    """Accuracy over pictures whose targets are (true caption, false caption) pairs; chance is a half, a tie is wrong.

    Args:
        details: with the scores of each picture's captions, under `details`.
    """
    found = encoder.encode_images(images)
    true, false = (encoder.encode_texts(list(captions)) for captions in zip(*found.targets, strict=True))  # (N, E) each
    true_scores, false_scores = ((found.features * captions).sum(dim=1) for captions in (true, false))  # (N,) each
    result = HardNegativeAccuracy().compute(predictions=true_scores, references=false_scores)
    result |= {"n": len(found.targets), "num_undecodable": found.num_undecodable}
    return result | ({"details": of_pairs(found, true_scores, false_scores)} if details else {})


def average_by_kind(accuracies: Mapping[str, float]) -> dict[str, float]:
    """The papers' averages over the kinds about objects, attributes and relations, and `mean` over all seven.

    Args:
        accuracies: by the seven kinds.
    """
    by_subject = {about: [value for kind, value in accuracies.items() if kind.endswith(about)] for about in ABOUT}
    averages = {about: sum(values) / len(values) for about, values in by_subject.items()}
    return averages | {"mean": sum(accuracies.values()) / len(accuracies)}
