"""Labels of classes, looked at one by one: what is none is an error that names its sample."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import fail
from .encoder import ImageSet


def class_label(value: Any, num_classes: int, sample: str) -> int:
    """A class index. Raises ConfigError for a value that is no whole number, or outside the classes."""
    number = _number(value)
    if number is None or not math.isfinite(number) or number != int(number):
        fail(f"{sample}: has the label {value!r}, which is no class index")
    if not 0 <= number < num_classes:
        fail(f"{sample} has class index {int(number)}, but there are {num_classes} class names")
    return int(number)


def multi_hot_label(value: Any, num_classes: int, sample: str) -> list[int]:
    """A 0 or 1 for each class. Raises ConfigError for another shape, or other numbers."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        fail(f"{sample}: has a label that is no array of 0 and 1 for each class")
    if array.ndim != 1:
        fail(f"{sample}: has a label of shape {array.shape}, which must be ({num_classes},)")
    if len(array) != num_classes:
        fail(f"{sample} has {len(array)} classes, but there are {num_classes} class names")
    wrong = array[(array != 0) & (array != 1)]
    if len(wrong):
        fail(f"{sample}: has {wrong[0]:g} in its label, which must be 0 or 1 for each class")
    return [int(number) for number in array]


def check_samples(images: ImageSet, check: Callable[[Any, int, str], Any], num_classes: int) -> None:
    """Look at the targets of a list of samples before any picture is encoded; other samples come one by one."""
    if isinstance(images.samples, (list, tuple)):
        for position, (_, target) in enumerate(images.samples):
            check(target, num_classes, f"sample number {position}")


def _number(value: Any) -> float | None:
    """A number, a text of digits, or an array of one element, as a number; None where it is none."""
    try:
        return float(value) if not isinstance(value, (bool, list, tuple)) else None
    except (TypeError, ValueError, RuntimeError):
        return None
