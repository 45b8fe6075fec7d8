"""Proves that each patch mask selects what its definition says, element by element.

The `slow_*` functions of slow_masks.py are literal transcriptions of the definitions.
"""

import math

import kornia
import ot
import pytest
import torch
from helpers import assert_uniform, photo_like, select_patches
from slow_masks import slow_attentive, slow_block, slow_cluster, slow_leverage, slow_pgs, slow_similarity

from hf_maskclip import build_patch_mask
from hf_maskclip.models.patch_edges import patch_edges, sobel_magnitude
from hf_maskclip.models.patch_mask_registry import resolve_patch_mask, scale_mask_ratios
from hf_maskclip.models.patch_masking import keep_count
from hf_maskclip.models.patch_masking_pgs import sinkhorn_scaling
from hf_maskclip.models.patch_similarity import PatchFeatures

PGS_05 = {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}


# ---- Similarity and edges ---------------------------------------------------------------------------------------------


def flat_and_textured() -> torch.Tensor:
    """An image (3, 32, 48) with flat patches of equal, nearly equal and other colours beside textured ones."""
    image = photo_like(1, 32, 48, seed=3)[0]
    white = torch.tensor([1.93, 2.07, 2.15])[:, None, None]
    image[:, :8, :24] = white
    image[:, 8:16, :8] = white - 0.04
    image[:, 8:16, 8:16] = white - 0.06
    image[:, 16:24, :8] = white + 0.01 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    return image


def test_similarity_is_the_cosine_of_standardised_patches_and_flat_patches_match_by_colour():
    image = flat_and_textured()
    similarity = PatchFeatures(image[None], 8).similarity()[0]
    expected = torch.tensor([[slow_similarity(image, i, j) for j in range(24)] for i in range(24)])
    assert similarity[0, 1] == 1
    assert similarity[0, 6] == 1
    assert similarity[0, 7] == 0
    assert similarity[0, 12] == 1
    torch.testing.assert_close(similarity, expected, atol=2e-5, rtol=0)


def test_similarity_of_some_rows_and_with_embeddings():
    images = photo_like(2, 32, 32)
    embeds = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[3, 0], [7, 15]])
    mixed = PatchFeatures(images, 8, embeds, 0.25).similarity(rows)
    pixels = PatchFeatures(images, 8).similarity()
    cosine = torch.nn.functional.cosine_similarity(embeds[:, :, None], embeds[:, None], dim=-1)
    expected = torch.stack([(0.75 * p + 0.25 * c)[r] for p, c, r in zip(pixels, cosine, rows, strict=True)])
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="pass patch_embeds"):
        PatchFeatures(images, 8, None, 0.25)


def test_sobel_agrees_with_kornia():
    grey = photo_like(2, 40, 56)[:, :1]
    torch.testing.assert_close(sobel_magnitude(grey), kornia.filters.sobel(grey), atol=1e-6, rtol=1e-5)


def test_edge_strength_is_the_mean_magnitude_of_a_patch_scaled_to_the_unit_range():
    image = photo_like(1, 32, 48)
    grey = 0.299 * image[:, 0:1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:3]
    magnitude = kornia.filters.sobel(grey)[0, 0]
    means = torch.tensor([magnitude[y : y + 8, x : x + 8].mean() for y in range(0, 32, 8) for x in range(0, 48, 8)])
    expected = (means - means.min()) / (means.max() - means.min())
    torch.testing.assert_close(patch_edges(image, 8)[0], expected, atol=1e-5, rtol=0)


# ---- Each mask against its definition ---------------------------------------------------------------------------------


def test_random_keeps_the_patches_of_lowest_noise_and_favours_no_position():
    images = torch.zeros(2000, 3, 32, 32)
    selection = select_patches("random", images)
    noise = torch.rand(2000, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(selection.indices, noise.argsort(dim=1)[:, :8].sort(dim=1).values)
    # Chi-square of 16 counts, each 1000 expected, variance 500 each: 15 degrees of freedom, 37.7 at 0.1 %.
    counts = selection.visible(16).sum(dim=0).double()
    assert ((counts - 1000).square() / 500).sum() * 15 / 16 < 37.7


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
def test_leverage_draws_without_replacement_by_its_scores(mask_ratio):
    images = photo_like(3, 48, 64)
    images[2, :, :, :32] = 0.5  # half of the third is plain
    spec = {"name": "leverage", "mask_ratio": mask_ratio}
    visible = select_patches(spec, images).visible(48)
    scores = build_patch_mask(spec, patch_size=8).scores(images)
    noise = torch.rand(3, 48, generator=torch.Generator().manual_seed(0))
    for image, row, seen, own in zip(images, noise.tolist(), visible.tolist(), scores, strict=True):
        expected, expected_scores = slow_leverage(image, row, keep_count(48, mask_ratio))
        assert seen == expected
        torch.testing.assert_close(own.double(), torch.tensor(expected_scores, dtype=torch.float64), rtol=1e-3, atol=1e-5)


def test_leverage_keeps_what_has_none_like_it():
    """A coloured patch among others that all are alike; and where nothing differs, chance decides."""
    images = 0.05 * photo_like(200, 48, 48)
    images[:, :, 16:24, 24:32] = torch.tensor([2.0, -1.0, 0.5])[:, None, None]
    stands_out = select_patches("leverage", images).visible(36).float().mean(dim=0)
    assert stands_out[2 * 6 + 3] > 0.95
    assert_uniform(select_patches("leverage", torch.ones(1000, 3, 64, 64)).visible(64))


def test_gaussian_draws_without_replacement_by_its_weights():
    """The probability of a first draw is the weight; the noise is that of the definition, one patch at a time."""
    images, sigma = torch.zeros(3, 3, 32, 48), 0.3
    visible = select_patches({"name": "gaussian", "sigma": sigma}, images).visible(24)
    noise = torch.rand(3, 24, generator=torch.Generator().manual_seed(0))
    for row, seen in zip(noise.tolist(), visible.tolist(), strict=True):
        race = []  # an exponential race: the patch of weight w arrives after -log(u) / w
        for i, u in enumerate(row):
            y, x = (i // 6 + 0.5) / 4 - 0.5, (i % 6 + 0.5) / 6 - 0.5
            race.append((-math.log(u) / math.exp(-(x**2 + y**2) / (2 * sigma**2)), i))
        kept = {i for _, i in sorted(race)[:12]}
        assert seen == [i in kept for i in range(24)]

    # One patch of 2 x 4 stays: how often it is each one is its weight, by a chi-square of 7 degrees of freedom at 0.1 %.
    counts = (
        select_patches({"name": "gaussian", "mask_ratio": 0.87}, torch.zeros(4000, 3, 16, 32)).visible(8).sum(dim=0).double()
    )
    x = torch.tensor([-0.375, -0.125, 0.125, 0.375])
    weights = torch.exp(-(x.square() + 0.0625) / (2 * 0.2**2)).repeat(2).double()
    expected = 4000 * weights / weights.sum()
    assert counts.sum() == 4000
    assert ((counts - expected).square() / expected).sum() < 24.3


def test_block_masks_rectangles_until_the_ratio_is_met():
    images = torch.zeros(20, 3, 64, 96)
    visible = select_patches("block", images).visible(96)
    generator = torch.Generator().manual_seed(0)
    draws, noise = torch.rand(4, 20, 32, generator=generator), torch.rand(20, 96, generator=generator)
    for b, seen in enumerate(visible):
        rectangles = list(zip(*draws[:, b].tolist(), strict=True))
        assert seen.tolist() == slow_block(rectangles, noise[b].tolist(), 8, 12, 48)
    together = (visible.view(20, 8, 12)[:, :, 1:] == visible.view(20, 8, 12)[:, :, :-1]).float().mean()
    assert together > 0.75  # against 0.5 at random: what is dropped hangs together


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.8])
def test_grid_keeps_every_nth_patch_of_each_row_shifted_row_by_row(ratio):
    n = round(1 / (1 - ratio))
    visible = select_patches({"name": "grid", "mask_ratio": ratio}, torch.zeros(6, 3, 8 * 2 * n, 8 * 2 * n)).visible(4 * n * n)
    offsets = set()
    for seen in visible.view(6, 2 * n, 2 * n).tolist():
        (offset,) = {(x + round(n / 2) * y) % n for y, row in enumerate(seen) for x, kept in enumerate(row) if kept}
        assert all(kept == ((x + round(n / 2) * y) % n == offset) for y, row in enumerate(seen) for x, kept in enumerate(row))
        offsets.add(offset)
    assert len(offsets) > 1


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (4, 9)])
def test_attentive_keeps_what_the_teacher_attends_to(grid, merge):
    rows, columns = grid
    scores = torch.rand(4, rows * columns, generator=torch.Generator().manual_seed(7))
    images = torch.zeros(4, 3, 8 * rows, 8 * columns)
    visible = select_patches({"name": "attentive", "merge": merge}, images, patch_scores=scores).visible(rows * columns)
    num_kept = keep_count(rows * columns, 0.5)
    for seen, row in zip(visible.tolist(), scores.tolist(), strict=True):
        assert seen == slow_attentive(row, rows, columns, merge, num_kept)


def test_attentive_takes_equal_scores_in_random_order_and_says_what_it_needs():
    spec, images = {"name": "attentive", "merge": 2}, torch.zeros(1000, 3, 48, 48)
    assert_uniform(select_patches(spec, images, patch_scores=torch.ones(1000, 36)).visible(36))
    for scores in (None, torch.ones(1000, 35)):
        with pytest.raises(ValueError, match=r"teacher's attention to each patch, \(1000, 36\)"):
            select_patches(spec, images, patch_scores=scores)


@pytest.mark.parametrize("threshold", [0.1, 0.3])
def test_cluster_masks_what_resembles_an_anchor_and_fills_up_at_random(threshold):
    images = torch.stack([flat_and_textured(), *photo_like(3, 32, 48)])
    spec = {"name": "cluster", "similarity_threshold": threshold, "anchor_ratio": 0.1}
    visible = select_patches(spec, images).visible(24)
    generator = torch.Generator().manual_seed(0)
    anchor_noise, surplus_noise = (torch.rand(4, 24, generator=generator) for _ in range(2))
    for image, anchor_row, surplus_row, seen in zip(images, anchor_noise, surplus_noise, visible, strict=True):
        masked, _ = slow_cluster(image, anchor_row.argsort(descending=True)[:2].tolist(), threshold)
        for i in surplus_row.argsort(descending=True).tolist():
            masked[i] = masked[i] or sum(masked) < 7  # 24 - keep_count(24, 0.3)
        assert seen.tolist() == [not m for m in masked]


@pytest.mark.parametrize(("floor", "most"), [(0.3, 14), (0.3, 9), (0.375, 9)])
def test_cluster_gives_back_the_least_similar_of_what_lies_over_the_ceiling(floor, most):
    images = torch.stack([flat_and_textured(), *photo_like(3, 32, 48)])
    spec = {"name": "cluster", "similarity_threshold": 0.1, "anchor_ratio": 0.1, "min_mask_ratio": floor}
    unbounded = select_patches(spec, images).visible(24)
    selection = select_patches(spec | {"max_mask_ratio": most / 24}, images)
    generator = torch.Generator().manual_seed(0)
    anchor_noise, second_noise = (torch.rand(4, 24, generator=generator) for _ in range(2))
    over = 0
    for number, (image, anchor_row, noise) in enumerate(zip(images, anchor_noise, second_noise, strict=True)):
        masked, closest = slow_cluster(image, anchor_row.argsort(descending=True)[:2].tolist(), 0.1)
        over += sum(masked) > most
        while sum(masked) > most:
            # Flat patches of one colour are ties at 1.
            back = min((i for i in range(24) if masked[i]), key=lambda i: (round(closest[i], 4), noise[i]))
            masked[back] = False
        for i in noise.argsort(descending=True).tolist():
            masked[i] = masked[i] or sum(masked) < 24 - keep_count(24, floor)
        seen = selection.visible(24)[number]
        assert seen.tolist() == [not m for m in masked]
        assert (seen >= unbounded[number]).all()
    assert over >= 2
    assert (selection.lengths is None) == (floor == most / 24)


def test_a_ceiling_that_no_image_reaches_changes_nothing_and_one_scaled_by_a_ramp_gives_back_anchors():
    images = photo_like(8, 56, 56)
    spec = {"name": "cluster", "similarity_threshold": 0.4}
    unbounded = select_patches(spec, images)
    assert int(unbounded.lengths.min()) > 1
    bounded = select_patches(spec | {"max_mask_ratio": 0.99}, images)
    assert all(torch.equal(one, other) for one, other in zip(unbounded, bounded, strict=True))
    half = select_patches(scale_mask_ratios({**spec, "min_mask_ratio": 0.3, "max_mask_ratio": 0.6}, 0.5), images)
    assert int(half.lengths.min()) == keep_count(49, 0.3)  # what resembles an anchor goes up to half the ceiling
    start = scale_mask_ratios(resolve_patch_mask({"name": "cluster", "max_mask_ratio": 0.6}), 0.0)
    assert select_patches(start, images).visible(49).all()


def test_a_ceiling_keeps_patches_of_a_picture_that_is_nearly_all_background():
    images = torch.ones(8, 3, 96, 96) * torch.tensor([1.93, 2.07, 2.15])[:, None, None]
    images[:, :, 40:56, 40:56] = photo_like(8, 16, 16, seed=5)
    kept = {most: select_patches({"name": "cluster", "max_mask_ratio": most}, images).lengths for most in (None, 0.75)}
    assert kept[None].min() <= 5
    assert kept[0.75].tolist() == [36] * 8


def test_cluster_auto_threshold_removes_the_ratio_asked_for_on_average():
    for ratio in (0.35, 0.5, 0.7):
        selection = select_patches({"name": "cluster", "mask_ratio": ratio, "min_mask_ratio": 0}, photo_like(16, 112, 112))
        assert selection.lengths.unique().numel() > 5
        # Anchors below the threshold are masked on top: 3 % of the patches at most.
        assert ratio - 0.005 <= 1 - selection.kept_share(196).item() <= ratio + 0.03


def test_cluster_masks_a_plain_background_as_one_cluster():
    images = torch.ones(8, 3, 64, 64) * torch.tensor([1.93, 2.07, 2.15])[:, None, None]
    images[:, :, 24:40, 24:40] = photo_like(8, 16, 16, seed=5)
    seen = select_patches({"name": "cluster", "anchor_ratio": 0.1}, images).visible(64).view(8, 8, 8)
    inside = seen[:, 3:5, 3:5].float().mean()
    assert seen.sum(dim=(1, 2)).max() <= 4
    assert inside > 0.5


@pytest.mark.parametrize("edges", ["sobel", "none"])
@pytest.mark.parametrize("transport", [True, False])
@pytest.mark.parametrize("bounds", [(0.3, 0.5), (0.5, 0.5), (0.0, 0.9)])
def test_pgs_follows_its_definition_step_by_step(bounds, transport, edges):
    images = torch.stack([flat_and_textured(), *photo_like(3, 32, 48, seed=2)])
    spec = {"name": "pgs", "min_mask_ratio": bounds[0], "max_mask_ratio": bounds[1], "transport": transport, "edges": edges}
    visible = select_patches(spec, images).visible(24)
    noise = torch.rand(4, 24, generator=torch.Generator().manual_seed(0))
    for image, row, seen in zip(images, noise, visible, strict=True):
        options = {"min_ratio": bounds[0], "max_ratio": bounds[1], "transport": transport, "edges": edges}
        assert seen.tolist() == slow_pgs(image, row.tolist(), **options)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 20])
@pytest.mark.parametrize("bounds", [(0.75, 0.75), (0.3, 0.9)])
def test_pgs_takes_edge_patches_in_order_of_strength_with_noise(bounds, temperature):
    images = torch.stack([flat_and_textured(), *photo_like(3, 32, 48, seed=2)])
    spec = {"name": "pgs", "min_mask_ratio": bounds[0], "max_mask_ratio": bounds[1]}
    visible = select_patches(spec | {"edge_temperature": temperature}, images).visible(24)
    generator = torch.Generator().manual_seed(0)
    noise, uniform = (torch.rand(4, 24, generator=generator).tolist() for _ in range(2))
    for b, seen in enumerate(visible):
        options = {"min_ratio": bounds[0], "max_ratio": bounds[1], "temperature": temperature, "uniform": uniform[b]}
        assert seen.tolist() == slow_pgs(images[b], noise[b], **options)
    assert (visible == select_patches(spec, images).visible(24)).all() == (bounds[0] == 0.3)  # there is room for all edges


def test_where_edges_overflow_a_temperature_draws_them_and_strong_ones_stay_more_often():
    images = photo_like(1, 64, 64).expand(1000, -1, -1, -1)
    spec = {"name": "pgs", "min_mask_ratio": 0.85, "max_mask_ratio": 0.85}
    strength = patch_edges(images[:1], 8)[0]
    is_edge = strength > strength.mean()
    assert is_edge.sum() > 1.5 * keep_count(64, 0.85)
    paper, drawn = (select_patches(spec | {"edge_temperature": t}, images).visible(64) for t in (0, 0.1))
    assert len(paper.unique(dim=0)) == 1
    assert len(drawn.unique(dim=0)) > 100
    assert not drawn[:, ~is_edge].any()
    shares = drawn.float().mean(dim=0)[is_edge][strength[is_edge].argsort()]
    assert shares[0] < 0.5 * shares[-1]
    assert shares.min() > 0


@pytest.mark.parametrize("regularization", [0.1, 0.5])
def test_the_sinkhorn_matrix_is_that_of_pot(regularization):
    similarity = PatchFeatures(photo_like(2, 56, 56), 8).similarity().double()
    kernel = ((similarity - 1) / regularization).exp()
    row_scale, column_scale = sinkhorn_scaling(kernel, 5000)
    plans = row_scale[:, :, None] * kernel * column_scale[:, None, :]
    for dim in (1, 2):
        torch.testing.assert_close(plans.sum(dim=dim), torch.ones(2, 49, dtype=torch.float64), atol=1e-6, rtol=0)
    marginal = torch.full((49,), 1 / 49, dtype=torch.float64)
    for plan, s in zip(plans, similarity, strict=True):
        expected = ot.sinkhorn(marginal, marginal, 1 - s, reg=regularization, numItermax=10_000, stopThr=1e-12) * 49
        torch.testing.assert_close(plan, expected, atol=1e-6, rtol=1e-4)


def test_five_sinkhorn_iterations_come_close_to_the_limit():
    similarity = PatchFeatures(photo_like(2, 112, 112), 8).similarity()
    kernel = ((similarity - 1) / 0.1).exp()
    plans = [r[:, :, None] * kernel * c[:, None, :] for r, c in (sinkhorn_scaling(kernel, n) for n in (5, 200))]
    assert (plans[0] - kernel).abs().max() > 0.1  # balancing does something here
    assert (plans[0] - plans[1]).abs().max() < 0.02


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_pgs_protects_edges_on_photo_like_images(ratio):
    images = photo_like(16, 224, 224)
    spec = {"name": "pgs", "min_mask_ratio": ratio, "max_mask_ratio": ratio}
    selection = build_patch_mask(spec, patch_size=16)(images, generator=torch.Generator().manual_seed(0))
    strength = patch_edges(images, 16)
    is_edge = strength > strength.mean(dim=1, keepdim=True)
    assert 0.2 < is_edge.float().mean() < 0.6
    kept = selection.visible(196)[is_edge].float().mean()
    assert kept >= 0.95
