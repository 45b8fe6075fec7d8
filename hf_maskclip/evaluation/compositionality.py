"""Compositionality: does a picture know its caption from a false one of the same words (SugarCrepe, arXiv 2306.14610)?

Shapes: N pictures, E projection size.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .encoder import Encoder, ImageSet
from .metrics import HardNegativeAccuracy, compute_over_processes

# What the papers' averages are over: the last word of a kind of false captions says what they are wrong about.
ABOUT = ("object", "attribute", "relation")


def evaluate_compositionality(encoder: Encoder, images: ImageSet) -> dict[str, Any]:
    """Accuracy over pictures whose targets are (true caption, false caption) pairs; chance is a half, a tie is wrong."""
    found = encoder.encode_images(images)
    true, false = (encoder.encode_texts(list(captions)) for captions in zip(*found.targets, strict=True))  # (N, E) each

    def scores() -> dict[str, torch.Tensor]:
        names = {"predictions": true, "references": false}
        return {name: (found.features * captions).sum(dim=1) for name, captions in names.items()}

    accuracy = compute_over_processes(HardNegativeAccuracy(), [scores])
    return accuracy | {"n": len(found.targets), "num_undecodable": found.num_undecodable}


def average_by_kind(accuracies: Mapping[str, float]) -> dict[str, float]:
    """The papers' averages over the kinds about objects, attributes and relations, and `mean` over all seven.

    Args:
        accuracies: by the seven kinds.
    """
    by_subject = {about: [value for kind, value in accuracies.items() if kind.endswith(about)] for about in ABOUT}
    averages = {about: sum(values) / len(values) for about, values in by_subject.items()}
    return averages | {"mean": sum(accuracies.values()) / len(accuracies)}
