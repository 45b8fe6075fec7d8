"""Compositionality: does a picture know its caption from a false one of the same words (SugarCrepe, arXiv 2306.14610)?

Shapes: N pictures, E projection size.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .encoder import Encoder, ImageSet
from .metrics import HardNegativeAccuracy, compute_over_processes

# SugarCrepe's seven kinds of false captions, by what the averages of the papers' tables are over.
KINDS = {
    "object": ("replace_object", "swap_object", "add_object"),
    "attribute": ("replace_attribute", "swap_attribute", "add_attribute"),
    "relation": ("replace_relation",),
}


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
    averages = {group: sum(accuracies[kind] for kind in kinds) / len(kinds) for group, kinds in KINDS.items()}
    return averages | {"mean": sum(accuracies[kind] for kinds in KINDS.values() for kind in kinds) / 7}
