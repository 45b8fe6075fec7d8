"""Zero-shot classification: a picture gets the class whose prompts it is nearest to.

Shapes: N pictures, M classes, E projection size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import fail
from .encoder import Encoder, ImageSet
from .metrics import Accuracy, MeanAveragePrecision, compute_over_processes, rank_of_nearest

PICTURES_PER_CHUNK = 1024


def evaluate_zero_shot(
    encoder: Encoder, images: ImageSet, class_names: Sequence[str], templates: Sequence[str], *, only_occurring: bool = False
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy and its mean over classes, of pictures whose targets are class indices.

    Args:
        class_names: M names.
        templates: prompts with `{c}` for the name; a class is the mean of its prompts.
        only_occurring: leave out the classes of which there is no picture, as for ImageNet-A, -R and -O, which have pictures
            of 200 of ImageNet's 1,000 classes.

    Raises:
        ConfigError: a template without `{c}`, a class index outside the names, no picture.
    """
    classes = class_features(encoder, class_names, templates)
    found = encoder.encode_images(images)
    labels = class_indices(found.targets, len(class_names))
    if only_occurring:
        occurring, labels = labels.unique(return_inverse=True)
        classes = classes[occurring]
    scores = accuracy_over_processes(lambda rows: found.features[rows] @ classes.t(), labels)
    return scores | {"n": len(labels), "num_classes": len(classes), "num_undecodable": found.num_undecodable}


def evaluate_multi_label(
    encoder: Encoder, images: ImageSet, class_names: Sequence[str], templates: Sequence[str]
) -> dict[str, Any]:
    """Mean average precision of pictures of several classes each (VOC2007), whose targets are M numbers 0 or 1.

    Raises:
        ConfigError: a template without `{c}`, a target of another length, no picture.
    """
    classes = class_features(encoder, class_names, templates)
    found = encoder.encode_images(images)
    for target in found.targets:
        if len(target) != len(class_names):
            fail(f"a target of {len(target)} classes: there are {len(class_names)} class names")
    targets = torch.tensor(found.targets, dtype=torch.int8)  # (N, M)

    def chunk(rows: slice) -> dict[str, torch.Tensor]:
        return {"predictions": found.features[rows] @ classes.t(), "references": targets[rows]}

    scores = compute_over_processes(MeanAveragePrecision(), [partial(chunk, rows) for rows in _chunks(len(targets))])
    return scores | {"n": len(targets), "num_classes": len(class_names), "num_undecodable": found.num_undecodable}


def class_features(encoder: Encoder, class_names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """The features (M, E) of classes: the normalised mean over the prompts, one for each template with the name for `{c}`."""
    for template in templates:
        if "{c}" not in template:
            fail(f"prompt template {template!r}: has no {{c}} for the class name")
    prompts = [template.replace("{c}", name) for name in class_names for template in templates]
    features = encoder.encode_texts(prompts).view(len(class_names), len(templates), -1)  # (M, templates, E)
    return F.normalize(features.mean(dim=1), dim=-1)


def class_indices(targets: list[int], num_classes: int) -> torch.Tensor:
    """Targets as a LongTensor (N,). Raises ConfigError for one outside the class names."""
    labels = torch.tensor(targets)
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        fail(f"class index {int(wrong[0])}: there are {num_classes} class names")
    return labels


def accuracy_over_processes(scores: Callable[[slice], torch.Tensor], labels: torch.Tensor) -> dict[str, float]:
    """[`Accuracy`] of pictures in chunks.

    Args:
        scores: from a slice of the pictures to their scores, a tensor (n, M).
        labels: the class indices, LongTensor (N,).
    """

    def chunk(rows: slice) -> dict[str, torch.Tensor]:
        own, of_chunk = labels[rows], scores(rows)
        ranks = rank_of_nearest(of_chunk, F.one_hot(own, of_chunk.shape[1]).bool())
        return {"ranks": ranks, "references": own, "num_classes": torch.full_like(ranks, of_chunk.shape[1])}

    return compute_over_processes(Accuracy(), [partial(chunk, rows) for rows in _chunks(len(labels))])


def _chunks(length: int) -> list[slice]:
    return [slice(first, first + PICTURES_PER_CHUNK) for first in range(0, length, PICTURES_PER_CHUNK)]
