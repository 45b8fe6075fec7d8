"""The contract that every patch mask keeps, and what masks share.

Shapes: B batch, C channels, L patches of an image, K kept patches, P patch side in pixels, D width.
A *patch mask* says which patches of an image are encoded; an *attention mask* is Transformers'. `mask_ratio` is always the
fraction that is removed, in [0, 1).
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import register_pytree_node


class PatchSelection(tuple):
    """Which patches of a batch of images are encoded.

    As a tuple it holds its tensors alone, `(indices,)` or `(indices, lengths)`. So it passes through whatever rebuilds, moves
    or gathers tuples of tensors, such as Accelerate and the Trainer.

    Args:
        indices: LongTensor (B, K). The first `lengths[b]` entries of row b are its visible patches, distinct and ascending in
            raster order; what follows is padding (it repeats the row's first entry). Or an iterable of both tensors.
        lengths: LongTensor (B,), the number of visible patches of each image, or None where it is K for all of them.
    """

    def __new__(cls, indices: torch.Tensor | Iterable[torch.Tensor], lengths: torch.Tensor | None = None):
        if not isinstance(indices, torch.Tensor):
            return super().__new__(cls, indices)
        return super().__new__(cls, (indices,) if lengths is None else (indices, lengths))

    def __getnewargs__(self) -> tuple[torch.Tensor, ...]:
        return tuple(self)

    @property
    def indices(self) -> torch.Tensor:
        return self[0]

    @property
    def lengths(self) -> torch.Tensor | None:
        return self[1] if len(self) > 1 else None

    def __repr__(self) -> str:
        return f"PatchSelection(indices={self.indices}, lengths={self.lengths})"

    def valid(self) -> torch.Tensor:
        """BoolTensor (B, K): True for the entries of `indices` that are not padding."""
        if self.lengths is None:
            return torch.ones_like(self.indices, dtype=torch.bool)
        positions = torch.arange(self.indices.shape[1], device=self.indices.device)
        return positions < self.lengths[:, None]  # (B, K)

    def visible(self, num_patches: int) -> torch.Tensor:
        """BoolTensor (B, L): True for the patches that are encoded."""
        # Padding goes to an extra column L, which is cut off again.
        columns = self.indices.masked_fill(~self.valid(), num_patches)
        visible = torch.zeros(len(columns), num_patches + 1, dtype=torch.bool, device=columns.device)
        return visible.scatter_(1, columns, True)[:, :num_patches]

    def kept_share(self, num_patches: int) -> torch.Tensor:
        """0-d float tensor: visible patches over all patches of the batch."""
        if self.lengths is None:
            return torch.tensor(self.indices.shape[1] / num_patches)
        return self.lengths.float().mean() / num_patches


register_pytree_node(
    PatchSelection,
    lambda selection: (list(selection), None),
    lambda tensors, _: PatchSelection(tensors),
    serialized_type_name=f"{__name__}.PatchSelection",
)


class Citation(NamedTuple):
    """The paper that a mask is from, for model cards and documentation.

    Attributes:
        key: of its BibTeX entry.
        title: of the paper.
        authors: as BibTeX has them, joined by `and`.
        year: of the first version.
        arxiv: its number there, such as `2212.00794`.
    """

    key: str
    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


class PatchMask(nn.Module, ABC):
    """Base class of the masks: a module without parameters that selects the visible patches of each image.

    A mask of your own subclasses this, implements `forward`, and is made known by `register_patch_mask`. The keyword arguments
    of its `__init__` other than `patch_size` are its options: they must have defaults, and they are what `config.json` keeps.

    What a mask needs is a flag, which training, evaluation and pictures ask.

    Example:

        class LeftHalfMask(PatchMask):
            def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
                rows, columns = patch_grid(pixel_values, self.patch_size)
                is_left = (torch.arange(rows * columns) % columns < columns // 2).to(pixel_values.device)
                return PatchSelection(is_left.nonzero().T.expand(len(pixel_values), -1))

        register_patch_mask("left_half", LeftHalfMask)
    """

    # The mask's paper, if it has one.
    citation: ClassVar[Citation | None] = None
    # Whether every patch stays, so that there is nothing to select.
    keeps_all: ClassVar[bool] = False
    # Whether another generator gives other patches. Without chance two views of a picture would be the same.
    has_chance: ClassVar[bool] = True
    # Whether `forward` takes and needs `patch_scores` (B, L), how much a teacher attends to each patch.
    needs_patch_scores: ClassVar[bool] = False
    # Of that teacher: the side of its images in pixels (0: the student's), and the first momentum of its moving average.
    teacher_image_size: int = 0
    momentum: float = 0.996

    def __init__(self, *, patch_size: int = 16):
        super().__init__()
        self.patch_size = patch_size

    def extra_repr(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if name in self.__dict__]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @property
    def needs_patch_embeds(self) -> bool:
        """Whether `forward` reads `patch_embeds`."""
        return False

    @property
    def needs_whole_weights(self) -> bool:
        """Whether choosing patches reads weights of the model, which must then lie whole on every process."""
        return self.needs_patch_scores or self.needs_patch_embeds

    @abstractmethod
    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_embeds: torch.Tensor | None = None,
        *,
        progress: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> PatchSelection:
        """Select the visible patches.

        Args:
            pixel_values: (B, C, H, W), normalised as for the model. H and W are multiples of the patch size.
            patch_embeds: (B, L, D), the patch embeddings, for masks that compare those too.
            progress: the share of training that is done, in [0, 1].
            generator: the source of randomness, on the device of `pixel_values`; PyTorch's global one by default.
        """


def keep_count(num_patches: int, mask_ratio: float) -> int:
    """How many of `num_patches` stay when the fraction `mask_ratio` is removed: L - round(L * ratio), at least 1.

    The product is exact in the ratio's decimal form, so 0.1 steps never lose a patch to binary rounding.
    """
    return max(1, num_patches - round(num_patches * Fraction(str(mask_ratio))))


def whole_patch_grid(pixel_values: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the whole patches of images (B, C, H, W), whatever is left beside them."""
    height, width = pixel_values.shape[-2:]
    return height // patch_size, width // patch_size


def patch_grid(pixel_values: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """The rows and columns of patches in images (B, C, H, W). Raises where the patch size does not divide the image."""
    height, width = pixel_values.shape[-2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"image of {height} x {width} pixels: both sides must be multiples of the patch size {patch_size}")
    return height // patch_size, width // patch_size


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images (B, C, H, W) into patches (B, L, C, P * P) in raster order, in float32: always a copy."""
    rows, columns = patch_grid(pixel_values, patch_size)
    batch, channels = pixel_values.shape[:2]
    patches = pixel_values.float().reshape(batch, channels, rows, patch_size, columns, patch_size)
    patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, P, P)
    return patches.clone(memory_format=torch.contiguous_format).view(batch, rows * columns, channels, patch_size * patch_size)


def keep_first(order: torch.Tensor, num_kept: int) -> PatchSelection:
    """Keep the first `num_kept` patches of each row of `order` (B, L), which lists all patches; one count for all images."""
    return PatchSelection(order[:, :num_kept].sort(dim=1).values)


def keep_first_of_each(order: torch.Tensor, num_kept: torch.Tensor, max_kept: int) -> PatchSelection:
    """Keep the first `num_kept[b]` patches of row b of `order` (B, L), which lists all patches.

    Args:
        order: (B, L).
        num_kept: LongTensor (B,), each in [1, max_kept].
        max_kept: K of the result. A bound that is known without looking at the data spares a wait for the device.
    """
    num_patches = order.shape[1]
    padding = torch.arange(max_kept, device=order.device) >= num_kept[:, None]  # (B, K)
    indices = order[:, :max_kept].masked_fill(padding, num_patches).sort(dim=1).values  # padding sorts to the end
    return PatchSelection(torch.where(indices == num_patches, indices[:, :1], indices), num_kept)


def draw_by_weights(log_weights: torch.Tensor, num_drawn: int, generator: torch.Generator | None) -> PatchSelection:
    """Keep `num_drawn` patches of each image, drawn one after another by weights whose logarithms are (B, L).

    The largest of log w + Gumbel noise are such a draw without replacement (Kool et al. 2019, arXiv 1903.06059).
    """
    uniform = torch.rand(log_weights.shape, generator=generator, device=log_weights.device)
    keys = log_weights - torch.log(-torch.log(uniform))
    return keep_first(keys.argsort(dim=1, descending=True), num_drawn)


def sort_with_random_ties(priority: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Indices (B, L) that sort each row of `priority` (B, L) ascending; equal ones come in the random order of `noise` (B, L).

    A plain sort leaves ties in raster order, so that of equal patches the upper ones would always go first.
    """
    shuffled = noise.argsort(dim=1)
    return shuffled.gather(1, priority.gather(1, shuffled).argsort(dim=1, stable=True))


def check_ratio(name: str, value: Any) -> float:
    """Return a mask ratio that lies in [0, 1); raise a ValueError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: must be a number in [0, 1), the fraction of patches that is removed")
    return value


def check_range(name: str, value: Any, low: float, high: float) -> float:
    """Return a number that lies in [low, high]; raise a ValueError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: must be a number from {low:g} to {high:g}")
    return value


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number that lies in [low, high]; raise a ValueError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: must be a whole number from {low} to {high}")
    return value


def check_choice(name: str, value: Any, choices: tuple) -> Any:
    """Return a value that is one of `choices`; raise a ValueError that names it otherwise."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")
    return value
