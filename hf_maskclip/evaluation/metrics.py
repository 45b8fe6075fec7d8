"""The metrics, as 🤗 Evaluate modules. A tie and a NaN count as wrong, so that constant and broken models score at most chance.

Shapes: N samples, M classes.
"""

from collections.abc import Callable, Iterable

import datasets
import evaluate
import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object


class _Metric(evaluate.Metric):
    """A metric that keeps what it is given in memory, and gets it back as arrays."""

    features: dict[str, datasets.features.features.FeatureType]

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="",
            features=datasets.Features(self.features),
            format="numpy",
        )


class Accuracy(_Metric):
    """Top-1 and top-5 accuracy and the mean over the classes that occur of top-1, each in [0, 1].

    Among five classes or fewer any model has all its classes among five: top-5 is left out.

    Inputs: `predictions`, the scores (N, M); `references`, the class indices (N,).
    """

    features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        own = np.take_along_axis(predictions, references[:, None], axis=1)  # (N, 1)
        rank = (~(predictions < own)).sum(axis=1) - 1  # the true class itself is never below itself
        per_class = [np.mean(rank[references == label] < 1) for label in np.unique(references)]
        top5 = {"top5": float(np.mean(rank < 5))} if predictions.shape[1] > 5 else {}
        return {"top1": float(np.mean(rank < 1)), **top5, "mean_per_class": float(np.mean(per_class))}


class MeanAveragePrecision(_Metric):
    """The mean over the classes that occur of the average precision: the mean over a class's pictures of the precision among
    those that score at least as high, in [0, 1].

    Inputs: `predictions`, the scores (N, M); `references`, 1 for each class that a picture shows and 0 for the others (N, M).
    """

    features = {
        "predictions": datasets.Sequence(datasets.Value("float32")),
        "references": datasets.Sequence(datasets.Value("int8")),
    }

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        occurring = np.flatnonzero(references.any(axis=0))
        return {
            "mean_average_precision": float(
                np.mean([_average_precision(predictions[:, m], references[:, m]) for m in occurring])
            )
        }


def _average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    scores = np.where(np.isnan(scores), np.where(relevant == 1, -np.inf, np.inf), scores)
    order = np.lexsort((relevant, -scores))  # by falling score, among equal ones the irrelevant first
    hits = relevant[order] == 1
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())


class RecallAtK(_Metric):
    """The share of queries that find any of what belongs to them among the k nearest, in [0, 1], for k = 1, 5, 10.

    Among k targets or fewer any model finds: such a k is left out.

    Inputs: `ranks`, for each query how many wrong targets are as near as the nearest right one, or nearer (N,); `num_targets`,
    among how many it looked (N,).
    """

    features = {"ranks": datasets.Value("int64"), "num_targets": datasets.Value("int64")}
    KS = (1, 5, 10)

    def _compute(self, ranks: np.ndarray, num_targets: np.ndarray) -> dict[str, float]:
        return {f"recall@{k}": float(np.mean(ranks < k)) for k in self.KS if k < num_targets.min()}


class HardNegativeAccuracy(_Metric):
    """The share of pictures that are nearer to the true caption than to a false one, in [0, 1] (SugarCrepe, arXiv 2306.14610).

    Inputs: `predictions`, the score of the true caption (N,); `references`, that of the false one (N,).
    """

    features = {"predictions": datasets.Value("float32"), "references": datasets.Value("float32")}

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(np.mean(predictions > references))}


def compute_over_processes(metric: _Metric, chunks: Iterable[Callable[[], dict[str, np.ndarray]]]) -> dict[str, float]:
    """The metric over all chunks of its inputs. Each process calls its share of them, and all get the whole result.

    Through 🤗 Accelerate: the gathering that 🤗 Evaluate has of its own needs a file system that all processes share.
    """
    state = PartialState()
    shares = [(number, chunk()) for number, chunk in enumerate(chunks) if number % state.num_processes == state.process_index]
    if state.num_processes > 1:
        shares = sorted(gather_object(shares), key=lambda share: share[0])
    for _, inputs in shares:
        metric.add_batch(**inputs)
    return metric.compute()
