"""Proves that the pictures show the masks: dropped patches grey, visible ones untouched, a titled column for each mask."""

import numpy as np
import pytest
import torch
from helpers import random_picture
from matplotlib.colors import to_rgb
from PIL import Image

from hf_maskclip.visualization import (
    DROPPED_GREY,
    FRAME_GREY,
    draw_patch_masks,
    draw_pgs_steps,
    grey_out,
    mask_panels,
)


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
    assert grey.mean() == 0.5
    assert np.array_equal(masked[~grey], whole[~grey])
    figure.savefig(tmp_path / "masks.png")
    assert (tmp_path / "masks.png").stat().st_size > 10_000


def test_panels_are_framed_so_that_a_white_picture_has_a_border():
    white = Image.new("RGB", (32, 32), "white")
    figure = draw_patch_masks([white], {"random": "random"}, image_size=32, patch_size=8)
    assert len(figure.axes) == 3
    for axis in figure.axes:
        assert all(spine.get_visible() and spine.get_linewidth() > 0 for spine in axis.spines.values())
        assert to_rgb(axis.spines["left"].get_edgecolor()) == pytest.approx([float(FRAME_GREY)] * 3)
        assert not axis.get_xticks().size


def test_a_map_is_black_where_nothing_is_and_light_where_most_is():
    half = Image.new("RGB", (32, 32), "black")
    half.paste("white", (20, 0, 32, 32))
    (_, edges), *_ = mask_panels([half], {}, image_size=32, patch_size=8)
    brightness = edges.pixels.sum(dim=0)[:, ::8]  # (H, columns)
    assert (brightness[:, [0, 3]] < 0.1).all()
    assert (brightness[:, 2] > 2).all()


def test_the_stages_of_pgs_are_those_of_the_mask():
    pictures = [random_picture(seed, (50, 40)) for seed in range(2)]
    figure = draw_pgs_steps(pictures, {"name": "pgs", "candidate_ratio": 0.2}, image_size=32, patch_size=8, seed=3)
    axes = np.array(figure.axes).reshape(2, 7)
    titles = [axis.get_title() for axis in axes[0]]
    assert titles[0] == "image"
    assert titles[3] == "candidates"
    assert titles[-1] == "visible"
    assert all(len(axis.patches) == 3 for axis in axes[:, 3])  # 0.2 of 16 patches
    (masked,) = (axis.images[0].get_array() for axis in [axes[0, 6]])
    grey = (np.abs(masked - DROPPED_GREY) < 1e-6).all(axis=-1).mean()
    assert axes[0, 6].get_xlabel() == f"{1 - grey:.0%} kept"
    assert 0.3 <= grey <= 0.5
    with pytest.raises(ValueError, match="mask='random': the stages are those of 'pgs'"):
        draw_pgs_steps(pictures, "random", image_size=32, patch_size=8)


def test_the_attentive_mask_is_drawn_by_a_teachers_attention(make_model):
    teacher = make_model("attentive").eval().vision_model
    teacher.set_attn_implementation("eager")
    pictures, sizes = [random_picture(0)], {"image_size": 32, "patch_size": 8}
    figure = draw_patch_masks(pictures, {"attentive": "attentive"}, teacher=teacher, **sizes)
    assert figure.axes[2].get_xlabel() == "50% kept"
    with pytest.raises(ValueError, match="pass teacher"):
        draw_patch_masks(pictures, {"attentive": "attentive"}, **sizes)
