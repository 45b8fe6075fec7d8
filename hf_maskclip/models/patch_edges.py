"""How strong the edges in each patch are: what the PGS mask protects.

Shapes: B batch, C channels, L patches.
"""

import torch
from torch.nn import functional as F

from .patch_masking import patch_grid

EDGE_DETECTORS = ("sobel", "canny", "none")


def patch_edges(pixel_values: torch.Tensor, patch_size: int, detector: str = "sobel") -> torch.Tensor:
    """The edge strength e of each patch: the mean edge magnitude of the grey image, scaled to [0, 1] per image.

    Args:
        pixel_values: (B, C, H, W), with C = 3 colours or 1.
        detector: `"sobel"`; `"canny"`, the share of edge pixels, for which the device is waited for; or `"none"`, zeros.

    Returns:
        (B, L) in float32.
    """
    if detector == "none":
        rows, columns = patch_grid(pixel_values, patch_size)
        return pixel_values.new_zeros(len(pixel_values), rows * columns, dtype=torch.float32)

    import kornia  # here, for it takes seconds, and only masks that look at edges need it

    pixels = pixel_values.float()
    grey = kornia.color.rgb_to_grayscale(pixels) if pixels.shape[1] == 3 else pixels.mean(dim=1, keepdim=True)
    if detector == "sobel":
        magnitude = sobel_magnitude(grey)
    else:
        magnitude = kornia.filters.canny(_unit_range(grey.flatten(1)).view_as(grey))[1]
    return _unit_range(F.avg_pool2d(magnitude, patch_size).flatten(1))  # (B, 1, rows, columns) -> (B, L)


def sobel_magnitude(grey: torch.Tensor) -> torch.Tensor:
    """Sobel gradient magnitude of (B, 1, H, W): `kornia.filters.sobel`, with the kernel applied as two passes of slices."""
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 2:] - padded[..., :-2]  # (B, 1, H + 2, W)
    down = padded[..., 2:, :] - padded[..., :-2, :]  # (B, 1, H, W + 2)
    gradient_x = torch.add(across[..., :-2, :], across[..., 1:-1, :], alpha=2).add_(across[..., 2:, :])
    gradient_y = torch.add(down[..., :-2], down[..., 1:-1], alpha=2).add_(down[..., 2:])
    # kornia divides the kernel by 8 and adds 1e-6 below the root. In place: new memory of this size costs more than the sums.
    return gradient_x.square_().addcmul_(gradient_y, gradient_y).div_(64).add_(1e-6).sqrt_()


def _unit_range(values: torch.Tensor) -> torch.Tensor:
    """Scale each row of (B, N) to [0, 1]; a constant row becomes zeros."""
    low, high = values.aminmax(dim=1, keepdim=True)
    return (values - low) / (high - low).clamp(min=1e-6)
