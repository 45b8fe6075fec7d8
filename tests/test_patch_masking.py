"""Proves that every patch mask keeps its contract: all masks in one table, a user's own among them."""

import math

import pytest
import torch
from helpers import assert_uniform, photo_like, rows_of, select_patches
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hf_maskclip import PatchMask, PatchSelection, build_patch_mask, register_patch_mask
from hf_maskclip.models.patch_mask_registry import patch_masks, resolve_patch_mask, scale_mask_ratios
from hf_maskclip.models.patch_masking import keep_count, patch_grid

PGS_05 = {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}
# spec, least and largest fraction removed from an image
MASKS = {
    "none": ("none", 0, 0),
    "random": ("random", 0.5, 0.5),
    "random 0.75": ({"name": "random", "mask_ratio": 0.75}, 0.75, 0.75),
    "random 0": ({"name": "random", "mask_ratio": 0}, 0, 0),
    "gaussian": ("gaussian", 0.5, 0.5),
    "gaussian narrow": ({"name": "gaussian", "sigma": 0.01, "mask_ratio": 0.9}, 0.9, 0.9),
    "block": ("block", 0.5, 0.5),
    "block 0.9": ({"name": "block", "mask_ratio": 0.9, "max_block_ratio": 0.1}, 0.9, 0.9),
    "grid": ("grid", 0.5, 0.5),
    "grid 0.7": ({"name": "grid", "mask_ratio": 0.7}, 0.7, 0.7),
    "attentive": ("attentive", 0.5, 0.5),
    "attentive merged": ({"name": "attentive", "merge": 2, "mask_ratio": 0.3}, 0.3, 0.3),
    "cluster": ("cluster", 0.3, None),
    "cluster threshold": ({"name": "cluster", "similarity_threshold": 0.6}, 0.3, None),
    "cluster embeds": ({"name": "cluster", "embedding_weight": "progress"}, 0.3, None),
    "cluster ceiling": ({"name": "cluster", "max_mask_ratio": 0.55}, 0.3, 0.55),
    "cluster threshold, ceiling": ({"name": "cluster", "similarity_threshold": 0.1, "max_mask_ratio": 0.5}, 0.3, 0.5),
    "cluster fixed": ({"name": "cluster", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}, 0.5, 0.5),
    "pgs": ("pgs", 0.3, 0.5),
    "pgs 0.5": (PGS_05, 0.5, 0.5),
    "pgs temperature": ({"name": "pgs", "max_mask_ratio": 0.8, "min_mask_ratio": 0.8, "edge_temperature": 0.2}, 0.8, 0.8),
    "pgs canny": ({"name": "pgs", "edges": "canny"}, 0.3, 0.5),
    "pgs plain": ({"name": "pgs", "edges": "none", "transport": False}, 0.3, 0.5),
    "pgs embeds": ({"name": "pgs", "embedding_weight": 0.5}, 0.3, 0.5),
    "leverage": ("leverage", 0.5, 0.5),
    "leverage cells": ({"name": "leverage", "mask_ratio": 0.75, "cells": 3, "ridge": 1.0}, 0.75, 0.75),
    "a user's own": ({"name": "sparse"}, 0.75, 0.75),
}
GRIDS = {"7x7": (56, 56), "14x14": (112, 112), "16x16": (128, 128), "5x9": (40, 72)}


class SparsePatchMask(PatchMask):
    """A user's own mask in ten lines: it goes through the same contract as ours."""

    def __init__(self, mask_ratio: float = 0.75, *, patch_size: int = 16):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = mask_ratio

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
        rows, columns = patch_grid(pixel_values, self.patch_size)
        noise = torch.rand(len(pixel_values), rows * columns, generator=generator, device=pixel_values.device)
        order = noise.argsort(dim=1)
        return PatchSelection(order[:, : keep_count(rows * columns, self.mask_ratio)].sort(dim=1).values)


@pytest.fixture(autouse=True)
def users_own_mask(built_in_masks_only):
    register_patch_mask("sparse", SparsePatchMask)


# ---- The contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", MASKS)
def test_kept_counts_are_within_bounds_and_indices_in_order(name, grid, device):
    spec, least, most = MASKS[name]
    images = photo_like(6, *GRIDS[grid]).to(device)
    num_patches = math.prod(GRIDS[grid]) // 64
    for row in rows_of(select_patches(spec, images, progress=0.5)):
        assert row == sorted(set(row))
        assert 0 <= row[0]
        assert row[-1] < num_patches
        assert len(row) <= keep_count(num_patches, least)
        assert len(row) >= (1 if most is None else keep_count(num_patches, most))


@pytest.mark.parametrize("name", MASKS)
def test_same_seed_same_mask_other_seed_other_mask(name, device):
    spec, _, most = MASKS[name]
    images = photo_like(6, 112, 112).to(device)
    first, again, other = (select_patches(spec, images, seed) for seed in (0, 0, 1))
    assert torch.equal(first.indices, again.indices)
    if most == 0:
        assert first.indices.shape[1] == 196
    else:
        assert rows_of(first) != rows_of(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_half_precision_input_gives_a_valid_selection(name, dtype, device):
    spec, least, _ = MASKS[name]
    selection = select_patches(spec, photo_like(4, 112, 112).to(device, dtype))
    assert all(1 <= len(row) <= keep_count(196, least) for row in rows_of(selection))


@pytest.mark.parametrize("name", MASKS)
def test_flat_and_noisy_images_give_a_valid_selection(name, device):
    spec, least, _ = MASKS[name]
    for images in (torch.zeros(3, 3, 56, 56), torch.full((3, 3, 56, 56), 2.0), torch.randn(3, 3, 56, 56) * 1e-3):
        assert all(1 <= len(row) <= keep_count(49, least) for row in rows_of(select_patches(spec, images.to(device))))


@pytest.mark.parametrize("name", [name for name in MASKS if name != "pgs canny"])
def test_masks_never_wait_for_the_device(name):
    """Fake tensors have no values: whatever would read one on the host raises. (kornia's Canny does.)"""
    mask = build_patch_mask(MASKS[name][0], patch_size=8)
    with FakeTensorMode():
        with pytest.raises(DataDependentOutputException):
            torch.rand(1).item()
        scores = {"patch_scores": torch.rand(3, 196)} if mask.needs_patch_scores else {}
        selection = mask(torch.randn(3, 3, 112, 112), torch.randn(3, 196, 12), **scores)
        assert selection.indices.shape[0] == 3


@pytest.mark.parametrize("name", MASKS)
def test_masks_have_no_state_and_rebuild_from_their_dict(name):
    spec, _, _ = MASKS[name]
    mask = build_patch_mask(spec, patch_size=8)
    assert not mask.state_dict()
    assert not list(mask.parameters())
    full = resolve_patch_mask(spec)
    assert resolve_patch_mask(full) == full
    images = photo_like(2, 56, 56)
    assert torch.equal(select_patches(spec, images).indices, select_patches(full, images).indices)


def test_an_image_that_the_patch_size_does_not_divide_is_refused():
    for name in patch_masks():
        with pytest.raises(ValueError, match="60 x 56 pixels: both sides must be multiples of the patch size 8"):
            build_patch_mask(name, patch_size=8)(torch.zeros(1, 3, 60, 56))


@pytest.mark.parametrize("spec", ["pgs", PGS_05], ids=str)
def test_pgs_favours_no_place_on_a_plain_background(spec):
    images = torch.ones(1, 3, 64, 64) * torch.tensor([1.93, 2.07, 2.15])[:, None, None]
    images[:, :, 24:40, 24:40] = photo_like(1, 16, 16, seed=5)
    background = torch.ones(8, 8, dtype=torch.bool)
    background[2:6, 2:6] = False
    assert_uniform(select_patches(spec, images.expand(1000, -1, -1, -1)).visible(64)[:, background.flatten()])


def test_the_surplus_rule_of_cluster_favours_no_place():
    # Patches of noise resemble nothing, so that all but the anchors are surplus.
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(1000, -1, -1, -1)
    assert_uniform(select_patches({"name": "cluster", "similarity_threshold": 0.9}, images).visible(64))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "pqs",
            "unknown patch mask 'pqs': must be one of none, random, gaussian, block, grid, cluster, attentive, pgs, leverage",
        ),
        ({"mask_ratio": 0.5}, "unknown patch mask None"),
        ({"name": "random", "mask_ration": 0.5}, "'random' has no option 'mask_ration': its options are mask_ratio"),
        ({"name": "none", "mask_ratio": 0.5}, "'none' has no option 'mask_ratio': its options are none"),
        ({"name": "random", "mask_ratio": 1}, r"mask_ratio=1: must be a number in \[0, 1\)"),
        ({"name": "random", "mask_ratio": "half"}, "mask_ratio='half'"),
        ({"name": "random", "mask_ratio": float("nan")}, "mask_ratio=nan"),
        ({"name": "cluster", "similarity_threshold": -0.1}, "similarity_threshold=-0.1: must be a number from 0 to 1"),
        ({"name": "pgs", "similarity_threshold": -0.1}, "similarity_threshold=-0.1: must be a number from 0 to 1"),
        ({"name": "cluster", "similarity_threshold": "max"}, "similarity_threshold='max'"),
        ({"name": "cluster", "embedding_weight": "linear"}, "embedding_weight='linear'"),
        ({"name": "cluster", "max_mask_ratio": 0.4}, "max_mask_ratio=0.4: must be at least mask_ratio=0.5, or None for no"),
        (
            {"name": "cluster", "similarity_threshold": 0.5, "max_mask_ratio": 0.2},
            "max_mask_ratio=0.2: must be at least min_mask_ratio=0.3, or None for no ceiling",
        ),
        ({"name": "cluster", "max_mask_ratio": 1}, r"max_mask_ratio=1: must be a number in \[0, 1\)"),
        ({"name": "pgs", "edge_temperature": -1}, "edge_temperature=-1: must be a number from 0 to 100"),
        ({"name": "pgs", "min_mask_ratio": 0.6}, "min_mask_ratio=0.6: must be at most max_mask_ratio=0.5"),
        ({"name": "pgs", "edges": "prewitt"}, "edges='prewitt': must be one of 'sobel', 'canny', 'none'"),
        ({"name": "pgs", "sinkhorn_iterations": 0}, "sinkhorn_iterations=0: must be"),
        ({"name": "pgs", "sinkhorn_iterations": 2.5}, "sinkhorn_iterations=2.5: must be a whole number from 1 to 1000"),
        ({"name": "pgs", "candidate_ratio": -0.1}, "candidate_ratio=-0.1: must be a number from 0 to 1"),
        ({"name": "gaussian", "sigma": 0}, "sigma=0: must be a number from 0.01 to 100"),
        ({"name": "leverage", "cells": 0}, "cells=0: must be a whole number from 1 to 16"),
        ({"name": "leverage", "ridge": 0}, "ridge=0: must be a number from 0.0001 to 100"),
        ({"name": "block", "min_block_ratio": 0.5}, "min_block_ratio=0.5: must be at most max_block_ratio=0.3"),
        ({"name": "grid", "mask_ratio": -0.1}, "mask_ratio=-0.1: must be a number in"),
        ({"name": "attentive", "merge": 3}, "merge=3: must be a whole number from 1 to 2"),
        ({"name": "attentive", "momentum": 1.5}, "momentum=1.5: must be a number from 0 to 1"),
    ],
)
def test_bad_options_are_refused_with_what_is_allowed(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        build_patch_mask(spec)
    assert "\n" not in str(error.value)


def test_a_mask_of_ones_own_is_known_by_name_and_refused_where_it_cannot_work():
    assert resolve_patch_mask("sparse") == {"name": "sparse", "mask_ratio": 0.75}
    assert build_patch_mask("sparse", mask_ratio=0.5).mask_ratio == 0.5
    with pytest.raises(ValueError, match="built in"):
        register_patch_mask("pgs", SparsePatchMask)
    with pytest.raises(TypeError, match="subclass of hf_maskclip.PatchMask"):
        register_patch_mask("linear", torch.nn.Linear)


@pytest.mark.parametrize("name", MASKS)
def test_ratios_scaled_by_a_ramp_go_from_nothing_to_the_full_mask(name):
    spec, least, most = MASKS[name]
    full = resolve_patch_mask(spec)
    assert scale_mask_ratios(full, 1.0) == full
    images = photo_like(4, 112, 112)
    if name not in ("cluster threshold",):  # what resembles an anchor by a threshold of one's own goes at any ratio
        kept = [select_patches(scale_mask_ratios(full, factor), images).kept_share(196).item() for factor in (0.0, 0.5, 1.0)]
        assert kept[0] >= 0.96  # cluster always masks its anchors
        assert most == 0 or kept[0] > kept[1] > kept[2]


def test_selection_views():
    selection = PatchSelection(torch.tensor([[0, 2, 3], [1, 1, 1]]), torch.tensor([3, 1]))
    assert selection.visible(4).tolist() == [[True, False, True, True], [False, True, False, False]]
    assert selection.valid().tolist() == [[True] * 3, [True, False, False]]
    assert selection.kept_share(4).item() == 0.5


@pytest.mark.parametrize("num_patches", [1, 4, 49, 50, 100, 144, 196, 256])
def test_keep_count_is_exact_in_tenths(num_patches):
    for tenths in range(10):
        removed = num_patches * tenths / 10
        expected = round(removed) if removed % 1 != 0.5 else 2 * round(removed / 2)  # half to even, as `round`
        assert keep_count(num_patches, tenths / 10) == max(1, num_patches - expected)


@pytest.mark.parametrize("name", [name for name, (_, _, most) in MASKS.items() if most != 0])
def test_two_epochs_give_an_image_two_masks(name):
    """The trainer seeds a mask by its step; the attentive mask's scores move with its teacher."""
    images = photo_like(16, 112, 112)
    first, second = (select_patches(MASKS[name][0], images, seed).visible(196) for seed in (1, 2))
    differs = (first != second).any(dim=1)
    assert differs.any() if "grid" in name else differs.all()  # a checkerboard is one of two
