"""A GPU that is not there. PyTorch knows device, precision and shape of its tensors, and nothing else.

What mixes devices raises, and what would wait for the GPU is noted.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROJECT = Path(__file__).resolve().parents[1]
# By its tags PyTorch calls every indexing one of unknown size; it is where an index is a mask.
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class Notes(list[str]):
    """The lines of this project that would wait for the GPU, and the names of operations that have run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def add(self) -> None:
        ours = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PROJECT)]
        self.append(next(frame for frame in reversed(ours) if frame.filename != __file__).line or "")


class NoteWaits(TorchDispatchMode):
    """Notes sizes that depend on data, and copies between host and GPU that are not marked as non-blocking."""

    def __init__(self, notes: Notes):
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        # A number on the host is an argument of the kernel.
        devices = {tensor.device.type for tensor in (*given, *made) if tensor.ndim or tensor.device.type == "cuda"}
        is_copy = len(devices) > 1 and not (kwargs.get("non_blocking") or any(arg is True for arg in args))
        has_unknown_size = torch.Tag.dynamic_output_shape in func.tags
        if func in INDEXING:
            has_unknown_size = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if is_copy or (has_unknown_size and "cuda" in devices):
            self.notes.add()
        self.notes.operations.add(str(func))
        return output


def on_host(numbers: torch.Tensor) -> torch.Tensor:
    """A tensor on the host, whose numbers can be read there."""
    fake = torch.empty(numbers.shape, dtype=numbers.dtype)
    fake.numbers = numbers
    return fake


def read_on_host(tensor: FakeTensor) -> list:
    if "numbers" not in vars(tensor):
        raise DataDependentOutputException("tolist")
    with unset_fake_temporarily():
        return tensor.numbers.tolist()


@contextmanager
def fake_cuda(half_precision: bool = False) -> Iterator[Notes]:
    """Within it tensors on "cuda" can be made; what has to know a number of one raises. In float32, or bf16 by autocast."""
    shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=True)
    notes = Notes()
    torch.set_autocast_enabled("cuda", half_precision)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(shape_env=shapes), NoteWaits(notes), patch.object(FakeTensor, "tolist", read_on_host):
            yield notes
    finally:
        torch.set_autocast_enabled("cuda", False)


def move_to_fake_cuda(model: nn.Module) -> nn.Module:
    """Move what `Module.to` would move."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = on_fake_cuda(tensor)
                    tensors[name] = nn.Parameter(moved, tensor.requires_grad) if tensors is module._parameters else moved
    return model


def on_fake_cuda(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
