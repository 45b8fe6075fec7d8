"""The metrics, as 🤗 Evaluate modules. A tie and a NaN count as wrong, so that constant and broken models score at most chance.

Each has `standard_errors` of its values: what another sample of as many pictures, captions or queries would change.

Shapes: N samples, M classes.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import datasets
import evaluate
import torch

from ..distributed import gather_pieces, is_mine


class _Metric(evaluate.Metric):
    """A metric that keeps what it is given in memory."""

    inputs: dict[str, datasets.features.features.FeatureType]

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(self.inputs)
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=features)


class Accuracy(_Metric):
    """Top-1 and top-5 accuracy and the mean over the classes that occur of top-1, each in [0, 1].

    Among five classes or fewer any model has the right one among five: top-5 is left out.

    Inputs: `ranks`, for each picture how many wrong classes score as high as its own, or higher (N,); `references`, its class
    index (N,); `num_classes`, among how many (N,).
    """

    inputs = {name: datasets.Value("int64") for name in ("ranks", "references", "num_classes")}

    def _compute(self, ranks: list[int], references: list[int], num_classes: list[int]) -> dict[str, Any]:
        rank, label = torch.tensor(ranks), torch.tensor(references)
        of_class = [rank[label == m] < 1 for m in label.unique()]
        shares = {"top1": rank < 1} | ({"top5": rank < 5} if min(num_classes) > 5 else {})
        errors = {name: _standard_error(is_right) for name, is_right in shares.items()}
        errors["mean_per_class"] = math.hypot(*map(_standard_error, of_class)) / len(of_class)
        values = {name: _mean(is_right) for name, is_right in shares.items()}
        return values | {"mean_per_class": sum(map(_mean, of_class)) / len(of_class), "standard_errors": errors}


class MeanAveragePrecision(_Metric):
    """The mean over the classes that occur of the average precision: the mean over a class's pictures of the precision among
    those that score at least as high, in [0, 1]. Its standard error is that of 100 bootstrap samples of the pictures.

    Inputs: `predictions`, the scores (N, M); `references`, 1 for each class that a picture shows and 0 for the others (N, M).
    """

    inputs = {
        "predictions": datasets.Sequence(datasets.Value("float32")),
        "references": datasets.Sequence(datasets.Value("int8")),
    }

    RESAMPLES = 100

    def _compute(self, predictions: list[list[float]], references: list[list[int]]) -> dict[str, Any]:
        scores, shown = torch.tensor(predictions), torch.tensor(references).bool()
        generator = torch.Generator().manual_seed(0)
        draws = (torch.randint(len(scores), (len(scores),), generator=generator) for _ in range(self.RESAMPLES))
        resampled = [mean_average_precision(scores[rows], shown[rows]) for rows in draws if shown[rows].any()]
        error = torch.tensor(resampled, dtype=torch.float64).std(correction=0).item()
        value = mean_average_precision(scores, shown)
        return {"mean_average_precision": value, "standard_errors": {"mean_average_precision": error}}


def mean_average_precision(scores: torch.Tensor, shown: torch.Tensor) -> float:
    """Of scores (N, M) and what is shown, BoolTensor (N, M), over the classes that any picture shows."""
    occurring = shown.any(dim=0).nonzero()[:, 0].tolist()
    precisions = [average_precision(scores[:, m], shown[:, m]) for m in occurring]
    return sum(precisions) / len(precisions)


def average_precision(scores: torch.Tensor, relevant: torch.Tensor) -> float:
    """Of scores (N,), with the worst order among equal ones."""
    worst = torch.where(relevant, -torch.inf, torch.inf)
    scores = torch.where(scores.isnan(), worst, scores)
    order = relevant.int().argsort(stable=True)  # the irrelevant first, which the next sort keeps among equal scores
    order = order[scores[order].argsort(descending=True, stable=True)]
    hits = relevant[order]
    precision = hits.cumsum(0).double() / torch.arange(1, len(hits) + 1)
    return precision[hits].mean().item()


class RecallAtK(_Metric):
    """Share of queries with at least one correct item among the k nearest, in [0, 1], for k = 1, 5, 10.

    Among fewer than k wrong targets any model finds: a k that is so for all queries is left out.

    Inputs: `ranks`, for each query how many wrong targets are as near as the nearest right one, or nearer (N,); `num_wrong`,
    among how many wrong ones it looked (N,).
    """

    inputs = {name: datasets.Value("int64") for name in ("ranks", "num_wrong")}
    KS = (1, 5, 10)

    def _compute(self, ranks: list[int], num_wrong: list[int]) -> dict[str, Any]:
        found = {f"recall@{k}": torch.tensor(ranks) < k for k in self.KS if k <= max(num_wrong)}
        errors = {name: _standard_error(is_found) for name, is_found in found.items()}
        return {name: _mean(is_found) for name, is_found in found.items()} | {"standard_errors": errors}


class HardNegativeAccuracy(_Metric):
    """The share of pictures that are nearer to the true caption than to a false one (SugarCrepe, arXiv 2306.14610), in [0, 1].

    Inputs: `predictions`, the score of the true caption (N,); `references`, that of the false one (N,).
    """

    inputs = {"predictions": datasets.Value("float32"), "references": datasets.Value("float32")}

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, Any]:
        is_right = torch.tensor(predictions) > torch.tensor(references)
        return {"accuracy": _mean(is_right), "standard_errors": {"accuracy": _standard_error(is_right)}}


def _mean(is_right: torch.Tensor) -> float:
    """A share as the quotient of two counts, which no order of summation changes."""
    return int(is_right.sum()) / len(is_right)


def _standard_error(is_right: torch.Tensor) -> float:
    """Of a share of N independent samples: the square root of p (1 - p) / N."""
    share = _mean(is_right)
    return math.sqrt(share * (1 - share) / len(is_right))


def rank_of_nearest(scores: torch.Tensor, is_right: torch.Tensor) -> torch.Tensor:
    """For each row of scores (N, M) how many wrong ones are as high as the highest right one, or higher: LongTensor (N,)."""
    best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)  # (N, 1)
    return (~(scores < best) & ~is_right).sum(dim=1)


def gather_chunks(chunks: Iterable[Callable[[], dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """All chunks, one after the other along the first dimension. Each process calls its share of them, and all get the whole.

    Through 🤗 Accelerate: the gathering that 🤗 Evaluate has of its own needs a file system that all processes share.
    """
    shares = [(number, chunk()) for number, chunk in enumerate(chunks) if is_mine(number)]
    parts = [part for _, part in gather_pieces(shares)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
