"""Robustness: zero-shot accuracy on variants of a data set, averaged with and without the data set itself."""

from collections.abc import Mapping


def average_robustness(top1: Mapping[str, float], in_distribution: str) -> dict[str, float]:
    """`id_average` over all data sets and `ood_average` over the variants alone, as the papers' tables have them.

    Args:
        top1: top-1 accuracy by data set.
        in_distribution: the data set that the others are variants of.
    """
    variants = [value for name, value in top1.items() if name != in_distribution]
    return {"id_average": sum(top1.values()) / len(top1), "ood_average": sum(variants) / len(variants)}
