"""Proves that the pictures show the masks: dropped patches grey, visible ones untouched, a titled column for each mask."""

import numpy as np
import torch
from conftest import random_picture

from hf_maskclip.visualization import DROPPED_GREY, draw_patch_masks, grey_out


def test_dropped_patches_are_grey_and_visible_ones_untouched():
    image = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0))
    visible = torch.tensor([[True, False, True], [False, True, False]])
    shown = grey_out(image, visible, patch_size=8)
    for row in range(2):
        for column in range(3):
            patch = (slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            expected = image[patch] if visible[row, column] else torch.full((3, 8, 8), DROPPED_GREY)
            assert torch.equal(shown[patch], expected)


def test_the_figure_has_a_row_for_each_picture_and_a_titled_column_for_each_mask(tmp_path):
    pictures = [random_picture(seed, (50, 40)) for seed in range(3)]
    masks = {"random": "random", "PGS 0.5": {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}}
    figure = draw_patch_masks(pictures, masks, image_size=32, patch_size=8)
    axes = np.array(figure.axes).reshape(3, 4)
    assert [axis.get_title() for axis in axes[0]] == ["image", "edges", "random", "PGS 0.5"]
    assert all(axis.get_xlabel() == "50% kept" for axis in axes[:, 2:].flat)
    whole, masked = (axes[0, column].images[0].get_array() for column in (0, 2))
    assert whole.shape == masked.shape == (32, 32, 3)
    grey = (np.abs(masked - DROPPED_GREY) < 1e-6).all(axis=-1)
    assert grey.mean() == 0.5 and np.array_equal(masked[~grey], whole[~grey])
    figure.savefig(tmp_path / "masks.png")
    assert (tmp_path / "masks.png").stat().st_size > 10_000
