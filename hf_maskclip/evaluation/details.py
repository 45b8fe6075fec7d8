"""What stands behind a metric: each picture's prediction, and the metric of each class.

Shapes: N pictures, M classes.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .encoder import ImageFeatures

Details = dict[str, Any]


def of_classification(
    found: ImageFeatures, labels: torch.Tensor, predicted: torch.Tensor, class_names: Sequence[str]
) -> Details:
    """The class that each picture got, and of each class that occurs the share of its pictures that got it.

    Args:
        labels, predicted: class indices, LongTensors (N,).
        class_names: M names.
    """
    shares = {m: (predicted[labels == m] == m).float() for m in labels.unique().tolist()}
    predictions = [
        {"picture": name, "label": class_names[label], "predicted": class_names[guess]}
        for name, label, guess in zip(found.names, labels.tolist(), predicted.tolist(), strict=True)
    ]
    per_class = [
        {"class": class_names[m], "index": m, "n": len(is_right), "top1": is_right.mean().item()}
        for m, is_right in shares.items()
    ]
    return {"predictions": predictions, "per_class": per_class}


def of_several_classes(
    found: ImageFeatures, scores: torch.Tensor, shown: torch.Tensor, precisions: list[float], class_names: Sequence[str]
) -> Details:
    """The classes that each picture shows and all its scores, and of each class that occurs its average precision.

    Args:
        scores: (N, M).
        shown: BoolTensor (N, M).
        precisions: of the classes that occur.
    """
    predictions = [
        {
            "picture": name,
            "labels": [class_names[m] for m in row.nonzero()[:, 0].tolist()],
            "scores": dict(zip(class_names, values.tolist(), strict=True)),
        }
        for name, row, values in zip(found.names, shown, scores, strict=True)
    ]
    counts = {m: int(shown[:, m].sum()) for m in range(len(class_names)) if shown[:, m].any()}
    per_class = [
        {"class": class_names[m], "index": m, "n": n, "average_precision": precision}
        for (m, n), precision in zip(counts.items(), precisions, strict=True)
    ]
    return {"predictions": predictions, "per_class": per_class}


def of_search(
    way: str, queries: Sequence[str], targets: Sequence[str], ranks: torch.Tensor, nearest: torch.Tensor
) -> list[dict[str, Any]]:
    """For each query how many wrong targets are as near as its nearest right one, and which target is nearest.

    Args:
        way: `image_to_text` or `text_to_image`.
        ranks, nearest: LongTensors, one number a query.
    """
    return [
        {"way": way, "query": query, "wrong_as_near": rank, "nearest": targets[index]}
        for query, rank, index in zip(queries, ranks.tolist(), nearest.tolist(), strict=True)
    ]


def of_pairs(found: ImageFeatures, true: torch.Tensor, false: torch.Tensor) -> Details:
    """The captions of each picture and their scores, FloatTensors (N,)."""
    return {
        "predictions": [
            {"picture": name, "true": captions[0], "false": captions[1], "true_score": right, "false_score": wrong}
            for name, captions, right, wrong in zip(found.names, found.targets, true.tolist(), false.tolist(), strict=True)
        ]
    }
