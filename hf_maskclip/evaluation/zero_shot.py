"""Zero-shot classification: a picture gets the class whose prompts it is nearest to.

Shapes: N pictures, M classes, E projection size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import fail
from .class_names import equal_names, warn_of_equal_names
from .details import of_classification, of_several_classes
from .encoder import Encoder, ImageSet
from .labels import check_samples, class_label, multi_hot_label
from .metrics import Accuracy, MeanAveragePrecision, average_precision, gather_chunks, rank_of_nearest

PICTURES_PER_CHUNK = 1024


def evaluate_zero_shot(
    encoder: Encoder,
    images: ImageSet,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    only_occurring: bool = False,
    details: bool = False,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy and its mean over classes, of pictures whose targets are class indices.

    Of classes of one name, as ImageNet's two "missile", the first wins, as in clip_benchmark; `equal_names` are in the result.
    Any other tie counts as wrong.

    Args:
        class_names: M names.
        templates: prompts with `{c}` for the name; a class is the mean of its prompts.
        only_occurring: leave out the classes of which there is no picture, as for ImageNet-A, -R and -O, which have pictures
            of 200 of ImageNet's 1,000 classes.
        details: with each picture's prediction and each class's accuracy, under `details`.

    Raises:
        ConfigError: a template without `{c}`, a class index outside the names, no picture.
    """
    check_samples(images, class_label, len(class_names))
    equal = equal_names(class_names)
    warn_of_equal_names(equal)
    names = list(dict.fromkeys(class_names))
    text_of = torch.tensor([names.index(name) for name in class_names])  # (M,): from a class to the row of its features
    classes = class_features(encoder, names, templates)
    found = encoder.encode_images(images)
    labels = class_indices(found.targets, len(class_names))
    if only_occurring:
        occurring, labels = labels.unique(return_inverse=True)
        text_of = text_of[occurring]
    scores, predicted = accuracy_over_processes(lambda rows: (found.features[rows] @ classes.t())[:, text_of], labels, text_of)
    scores |= {"n": len(labels), "num_classes": len(text_of), "num_undecodable": found.num_undecodable}
    scores |= {"equal_names": equal} if equal else {}
    names_of = [names[row] for row in text_of.tolist()]
    return scores | ({"details": of_classification(found, labels, predicted, names_of)} if details else {})


def evaluate_multi_label(
    encoder: Encoder, images: ImageSet, class_names: Sequence[str], templates: Sequence[str], *, details: bool = False
) -> dict[str, Any]:
    """Mean average precision of pictures of several classes each (VOC2007), whose targets are M numbers 0 or 1.

    Args:
        details: with each picture's scores and each class's average precision, under `details`.

    Raises:
        ConfigError: a template without `{c}`, a target that is no 0 or 1 for each class, no picture or no 1 at all.
    """
    check_samples(images, multi_hot_label, len(class_names))
    classes = class_features(encoder, class_names, templates)
    found = encoder.encode_images(images)
    rows = [multi_hot_label(t, len(class_names), f"sample number {position}") for position, t in enumerate(found.targets)]
    targets = torch.tensor(rows, dtype=torch.int8)  # (N, M)
    if not targets.any():
        fail("mean average precision: no picture has a class that is 1 in its label")

    def chunk(rows: slice) -> dict[str, torch.Tensor]:
        return {"predictions": found.features[rows] @ classes.t(), "references": targets[rows]}

    inputs = gather_chunks([partial(chunk, rows) for rows in _chunks(len(targets))])
    result = MeanAveragePrecision().compute(**inputs)
    result |= {"n": len(targets), "num_classes": len(class_names), "num_undecodable": found.num_undecodable}
    if details:
        scores, shown = inputs["predictions"], targets.bool()
        precisions = [average_precision(s, t) for s, t in zip(scores.t(), shown.t(), strict=True) if t.any()]
        result["details"] = of_several_classes(found, scores, shown, precisions, class_names)
    return result


def class_features(encoder: Encoder, class_names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """The features (M, E) of classes: the normalised mean over the prompts, one for each template with the name for `{c}`."""
    for template in templates:
        if "{c}" not in template:
            fail(f"prompt template {template!r}: has no {{c}} for the class name")
    prompts = [template.replace("{c}", name) for name in class_names for template in templates]
    features = encoder.encode_texts(prompts).view(len(class_names), len(templates), -1)  # (M, templates, E)
    return F.normalize(features.mean(dim=1), dim=-1)


def class_indices(targets: list[int], num_classes: int) -> torch.Tensor:
    """Targets as a LongTensor (N,). Raises ConfigError for one that is no class index, or outside the names."""
    return torch.tensor([class_label(t, num_classes, f"sample number {position}") for position, t in enumerate(targets)])


def accuracy_over_processes(
    scores: Callable[[slice], torch.Tensor], labels: torch.Tensor, text_of: torch.Tensor | None = None
) -> tuple[dict[str, Any], torch.Tensor]:
    """[`Accuracy`] of pictures in chunks, and the class that each got, LongTensor (N,): with a tie one that is wrong.

    Args:
        scores: from a slice of the pictures to their scores, a tensor (n, M).
        labels: the class indices, LongTensor (N,).
        text_of: LongTensor (M,), equal for classes of one name, of which a later one does not win over an earlier one.
    """

    def chunk(rows: slice) -> dict[str, torch.Tensor]:
        own, of_chunk = labels[rows], scores(rows)
        if text_of is not None:
            is_later_twin = (text_of[own, None] == text_of) & (torch.arange(len(text_of)) > own[:, None])  # (n, M)
            of_chunk = of_chunk.masked_fill(is_later_twin, -torch.inf)
        is_own = F.one_hot(own, of_chunk.shape[1]).bool()
        ranks = rank_of_nearest(of_chunk, is_own)
        predicted = torch.where(ranks < 1, own, of_chunk.masked_fill(is_own, -torch.inf).argmax(dim=1))
        counts = {"references": own, "num_classes": torch.full_like(ranks, of_chunk.shape[1])}
        return {"ranks": ranks, "predicted": predicted} | counts

    inputs = gather_chunks([partial(chunk, rows) for rows in _chunks(len(labels))])
    predicted = inputs.pop("predicted")
    return Accuracy().compute(**inputs), predicted


def _chunks(length: int) -> list[slice]:
    return [slice(first, first + PICTURES_PER_CHUNK) for first in range(0, length, PICTURES_PER_CHUNK)]
