"""Copies of a model that is being trained."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)
# Attributes by which Accelerate and autocast wrap the forward pass of one model; a copy of them would call that model.
WRAPPED = ("forward", "_original_forward")


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """For the time of a copy, take from a model what wraps its forward pass."""
    attributes: dict[str, Any] = {name: model.__dict__.pop(name) for name in WRAPPED if name in model.__dict__}
    try:
        yield
    finally:
        model.__dict__.update(attributes)


def copy_of(model: Model) -> Model:
    """A model of the same class, weights and device, whose forward pass is its own."""
    with unwrapped(model):
        return copy.deepcopy(model)
