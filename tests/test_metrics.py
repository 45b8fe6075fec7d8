"""Proves that each metric gives the numbers of hand-made cases, and the standard errors of these."""

from math import sqrt

import pytest
import torch
from torch.nn import functional as F

from hf_maskclip.evaluation import (
    Accuracy,
    HardNegativeAccuracy,
    MeanAveragePrecision,
    average_by_kind,
    recall_at_k,
)
from hf_maskclip.evaluation.metrics import rank_of_nearest
from hf_maskclip.evaluation.report import mean_of_robustness

NAN = float("nan")


def values_and_errors(result: dict) -> tuple[dict, dict]:
    errors = result.pop("standard_errors")
    assert set(errors) == set(result)  # each value has one
    return result, errors


def test_accuracy_by_hand():
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5],  # class 0, first
            [0.1, 0.9, 0.2, 0.3, 0.4, 0.5],  # class 0, last
            [0.5, 0.9, 0.1, 0.2, 0.3, 0.4],  # class 0, second
            [0.0, 0.7, 0.7, 0.0, 0.0, 0.0],  # class 1, tied with class 2
            [0.0, 0.1, 0.7, 0.0, 0.0, NAN],  # class 2, but no better than what is not a number
            [0.0, 0.1, 0.7, 0.0, 0.0, 0.0],  # class 2, first
        ]
    )
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    ranks = rank_of_nearest(scores, F.one_hot(labels, 6).bool())
    assert ranks.tolist() == [0, 5, 1, 1, 1, 0]
    # Classes 3 to 5 have no picture and no part in the mean over classes.
    expected = {"top1": 2 / 6, "top5": 5 / 6, "mean_per_class": (1 / 3 + 0 + 1 / 2) / 3}
    errors = {"top1": sqrt(2 / 6 * 4 / 6 / 6), "top5": sqrt(5 / 6 * 1 / 6 / 6)}
    errors["mean_per_class"] = sqrt(1 / 3 * 2 / 3 / 3 + 0 + 1 / 2 * 1 / 2 / 2) / 3
    assert values_and_errors(Accuracy().compute(ranks=ranks, references=labels, num_classes=[6] * 6)) == (
        pytest.approx(expected),
        pytest.approx(errors),
    )
    one, _ = values_and_errors(Accuracy().compute(ranks=[0], references=[3], num_classes=[5]))
    assert one == {"top1": 1.0, "mean_per_class": 1.0}  # among five classes all are among five


def test_mean_average_precision_by_hand():
    scores = [[0.9, 0.5, 0.1], [0.8, 0.5, 0.2], [0.7, 0.5, 0.3], [0.6, 0.1, 0.4]]
    shown = [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    # Class 0: right at places 1 and 3. Class 1: tied with two wrong ones, so at place 3. Class 2: in no picture, left out.
    expected = ((1 + 2 / 3) / 2 + 1 / 3) / 2
    values, errors = values_and_errors(MeanAveragePrecision().compute(predictions=scores, references=shown))
    assert values == pytest.approx({"mean_average_precision": expected})
    assert 0.05 < errors["mean_average_precision"] < 0.5  # of four pictures
    scores[0][0] = NAN  # now last for class 0
    expected = ((1 / 2 + 2 / 4) / 2 + 1 / 3) / 2
    assert MeanAveragePrecision().compute(predictions=scores, references=shown)["mean_average_precision"] == pytest.approx(
        expected
    )


def test_recall_of_three_queries_over_six_targets():
    # Similarities of each query to the targets, given as features by an identity basis.
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.0, 0.3, 0.2], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]])
    positives = torch.tensor([[0, 0], [0, 2], [1, 2], [1, 5], [2, 0]])
    # Best positives: query 0 ranks first, query 1 third (targets 0 and 1 are nearer), query 2 last. No recall at 10 of six.
    values, errors = values_and_errors(recall_at_k(torch.eye(3), scores.t(), positives))
    assert values == pytest.approx({"recall@1": 1 / 3, "recall@5": 2 / 3})
    assert errors == pytest.approx({"recall@1": sqrt(2 / 27), "recall@5": sqrt(2 / 27)})


def test_recall_in_chunks_is_that_of_the_full_matrix():
    generator = torch.Generator().manual_seed(0)
    queries, targets = torch.randn(2500, 8, generator=generator), torch.randn(700, 8, generator=generator)
    positives = torch.stack([torch.arange(2500), torch.randint(700, (2500,), generator=generator)], dim=1)
    scores = queries @ targets.t()
    rank = (scores > scores.gather(1, positives[:, 1:])).sum(dim=1)
    recall, _ = values_and_errors(recall_at_k(queries, targets, positives))
    assert recall == pytest.approx({f"recall@{k}": (rank < k).float().mean().item() for k in (1, 5, 10)})
    assert 0 < recall["recall@1"] < recall["recall@10"] < 1


def test_hard_negatives_and_averages_by_hand():
    accuracy = HardNegativeAccuracy().compute(predictions=[0.9, 0.5, 0.1, NAN], references=[0.1, 0.5, 0.9, 0.0])
    assert values_and_errors(accuracy) == ({"accuracy": 1 / 4}, {"accuracy": sqrt(3 / 4 / 4 / 4)})
    kinds = ("replace_object", "swap_object", "add_object", "replace_attribute", "swap_attribute", "add_attribute")
    averages = average_by_kind({kind: value for value, kind in enumerate(kinds)} | {"replace_relation": 13})
    assert averages == {"object": 1, "attribute": 4, "relation": 13, "mean": 4}
    assert mean_of_robustness({"plain": 1.0, "noise": 0.5, "blur": 0.0}) == {"ID avg": 0.5, "OOD avg": 0.25}
