"""Proves that every patch mask keeps its contract, and that each selects what its definition says, element by element.

The contract tests run for all masks in one table. The `slow_*` functions are literal transcriptions of the definitions, for one
image, with loops; they share nothing with the package but the random numbers.
"""

import math
import typing

import kornia
import numpy as np
import ot
import pytest
import torch
from conftest import photo_like
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hf_maskclip import PatchMask, PatchSelection, build_patch_mask, register_patch_mask
from hf_maskclip.configuration_maskclip import PatchMaskName
from hf_maskclip.patch_edges import patch_edges, sobel_magnitude
from hf_maskclip.patch_masking import keep_count, patch_grid, patch_masks, patchify, resolve_patch_mask, scale_mask_ratios
from hf_maskclip.patch_masking_pgs import sinkhorn_scaling
from hf_maskclip.patch_similarity import PatchFeatures
from training.scene_drawing import draw_scene
from training.scenes import sample_scene

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
    "pgs": ("pgs", 0.3, 0.5),
    "pgs 0.5": (PGS_05, 0.5, 0.5),
    "pgs canny": ({"name": "pgs", "edges": "canny"}, 0.3, 0.5),
    "pgs plain": ({"name": "pgs", "edges": "none", "transport": False}, 0.3, 0.5),
    "pgs embeds": ({"name": "pgs", "embedding_weight": 0.5}, 0.3, 0.5),
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
        order = torch.rand(len(pixel_values), rows * columns, generator=generator).argsort(dim=1)
        return PatchSelection(order[:, : keep_count(rows * columns, self.mask_ratio)].sort(dim=1).values)


@pytest.fixture(autouse=True)
def users_own_mask(built_in_masks_only):
    register_patch_mask("sparse", SparsePatchMask)


def select(spec, images, seed=0, **kwargs) -> PatchSelection:
    """Run a mask; the attention of its teacher, where it has one, changes with the seed as it would with the epoch."""
    mask = build_patch_mask(spec, patch_size=8)
    num_patches = patchify(images, 8).shape[1]
    embeds = torch.randn(len(images), num_patches, 12, generator=torch.Generator().manual_seed(1))
    if mask.needs_patch_scores and "patch_scores" not in kwargs:
        kwargs["patch_scores"] = torch.rand(len(images), num_patches, generator=torch.Generator().manual_seed(seed + 100))
    return mask(images, embeds, generator=torch.Generator().manual_seed(seed), **kwargs)


def rows_of(selection: PatchSelection) -> list[list[int]]:
    lengths = [selection.indices.shape[1]] * len(selection.indices) if selection.lengths is None else selection.lengths.tolist()
    return [row[:length] for row, length in zip(selection.indices.tolist(), lengths, strict=True)]


# ---- The contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", MASKS)
def test_kept_counts_are_within_bounds_and_indices_in_order(name, grid):
    spec, least, most = MASKS[name]
    images = photo_like(6, *GRIDS[grid])
    num_patches = math.prod(GRIDS[grid]) // 64
    for row in rows_of(select(spec, images, progress=0.5)):
        assert row == sorted(set(row)) and 0 <= row[0] and row[-1] < num_patches
        assert len(row) <= keep_count(num_patches, least)
        assert len(row) >= (1 if most is None else keep_count(num_patches, most))


@pytest.mark.parametrize("name", MASKS)
def test_same_seed_same_mask_other_seed_other_mask(name):
    spec, _, most = MASKS[name]
    images = photo_like(6, 112, 112)
    first, again, other = (select(spec, images, seed) for seed in (0, 0, 1))
    assert torch.equal(first.indices, again.indices)
    if most == 0:
        assert first.indices.shape[1] == 196
    else:
        assert rows_of(first) != rows_of(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_half_precision_input_gives_a_valid_selection(name, dtype):
    spec, least, _ = MASKS[name]
    selection = select(spec, photo_like(4, 112, 112).to(dtype))
    assert all(1 <= len(row) <= keep_count(196, least) for row in rows_of(selection))


@pytest.mark.parametrize("name", MASKS)
def test_flat_and_noisy_images_give_a_valid_selection(name):
    spec, least, _ = MASKS[name]
    for images in (torch.zeros(3, 3, 56, 56), torch.full((3, 3, 56, 56), 2.0), torch.randn(3, 3, 56, 56) * 1e-3):
        assert all(1 <= len(row) <= keep_count(49, least) for row in rows_of(select(spec, images)))


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
    assert not mask.state_dict() and not list(mask.parameters())
    full = resolve_patch_mask(spec)
    assert resolve_patch_mask(full) == full
    images = photo_like(2, 56, 56)
    assert torch.equal(select(spec, images).indices, select(full, images).indices)


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
    assert_uniform(select(spec, images.expand(1000, -1, -1, -1)).visible(64)[:, background.flatten()])


def test_the_surplus_rule_of_cluster_favours_no_place():
    # Patches of noise resemble nothing, so that all but the anchors are surplus.
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(1000, -1, -1, -1)
    assert_uniform(select({"name": "cluster", "similarity_threshold": 0.9}, images).visible(64))


def assert_uniform(visible: torch.Tensor) -> None:
    """Each share is a mean of 1000 draws: it lies within five standard errors of the mean of all."""
    shares = visible.double().mean(dim=0)
    assert len(visible) == 1000 and 0.1 < shares.mean() < 0.9
    assert (shares - shares.mean()).abs().max() < 5 * (shares.mean() * (1 - shares.mean()) / 1000).sqrt()


def test_the_registry_and_the_literal_of_the_configuration_agree():
    assert {*typing.get_args(PatchMaskName), "sparse"} == set(patch_masks())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "pqs",
            "unknown patch mask 'pqs': must be one of none, random, gaussian, block, grid, cluster, attentive, pgs, sparse",
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
        ({"name": "pgs", "min_mask_ratio": 0.6}, "min_mask_ratio=0.6: must be at most max_mask_ratio=0.5"),
        ({"name": "pgs", "edges": "prewitt"}, "edges='prewitt': must be one of 'sobel', 'canny', 'none'"),
        ({"name": "pgs", "sinkhorn_iterations": 0}, "sinkhorn_iterations=0: must be"),
        ({"name": "pgs", "sinkhorn_iterations": 2.5}, "sinkhorn_iterations=2.5: must be a whole number from 1 to 1000"),
        ({"name": "pgs", "candidate_ratio": -0.1}, "candidate_ratio=-0.1: must be a number from 0 to 1"),
        ({"name": "gaussian", "sigma": 0}, "sigma=0: must be a number from 0.01 to 100"),
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
        kept = [select(scale_mask_ratios(full, factor), images).kept_share(196).item() for factor in (0.0, 0.5, 1.0)]
        assert kept[0] >= 0.96 and (most == 0 or kept[0] > kept[1] > kept[2])  # cluster always masks its anchors


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


# ---- Similarity and edges ---------------------------------------------------------------------------------------------


def slow_similarity(image: torch.Tensor, i: int, j: int, patch: int = 8) -> float:
    columns = image.shape[2] // patch
    first, second = (
        image[:, y : y + patch, x : x + patch]
        for y, x in (divmod(k, columns) for k in (i, j))
        for y, x in [(y * patch, x * patch)]
    )
    colours = [p.mean(dim=(1, 2)) for p in (first, second)]
    deviations = [(p - c[:, None, None]).square().mean().sqrt() for p, c in zip((first, second), colours, strict=True)]
    if deviations[0] < 0.02 or deviations[1] < 0.02:
        same = max(deviations) < 0.02 and (colours[0] - colours[1]).abs().max() < 0.05
        return float(same)
    first, second = ((p - p.mean()) / (p.std() + 1e-6) for p in (first, second))
    return (first * second).sum().item() / (first.norm() * second.norm()).item()


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
    assert similarity[0, 1] == 1 and similarity[0, 6] == 1 and similarity[0, 7] == 0 and similarity[0, 12] == 1
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
    selection = select("random", images)
    noise = torch.rand(2000, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(selection.indices, noise.argsort(dim=1)[:, :8].sort(dim=1).values)
    # Chi-square of 16 counts, each 1000 expected, variance 500 each: 15 degrees of freedom, 37.7 at 0.1 %.
    counts = selection.visible(16).sum(dim=0).double()
    assert ((counts - 1000).square() / 500).sum() * 15 / 16 < 37.7


def test_gaussian_draws_without_replacement_by_its_weights():
    """The probability of a first draw is the weight; the noise is that of the definition, one patch at a time."""
    images, sigma = torch.zeros(3, 3, 32, 48), 0.3
    visible = select({"name": "gaussian", "sigma": sigma}, images).visible(24)
    noise = torch.rand(3, 24, generator=torch.Generator().manual_seed(0))
    for row, seen in zip(noise.tolist(), visible.tolist(), strict=True):
        race = []  # an exponential race: the patch of weight w arrives after -log(u) / w
        for i, u in enumerate(row):
            y, x = (i // 6 + 0.5) / 4 - 0.5, (i % 6 + 0.5) / 6 - 0.5
            race.append((-math.log(u) / math.exp(-(x**2 + y**2) / (2 * sigma**2)), i))
        kept = {i for _, i in sorted(race)[:12]}
        assert seen == [i in kept for i in range(24)]

    # One patch of 2 x 4 stays: how often it is each one is its weight, by a chi-square of 7 degrees of freedom at 0.1 %.
    counts = select({"name": "gaussian", "mask_ratio": 0.87}, torch.zeros(4000, 3, 16, 32)).visible(8).sum(dim=0).double()
    x = torch.tensor([-0.375, -0.125, 0.125, 0.375])
    weights = torch.exp(-(x.square() + 0.0625) / (2 * 0.2**2)).repeat(2).double()
    expected = 4000 * weights / weights.sum()
    assert counts.sum() == 4000 and ((counts - expected).square() / expected).sum() < 24.3


def slow_block(draws: list[list[float]], noise: list[float], rows: int, columns: int, num_masked: int) -> list[bool]:
    """Visible patches of one image; `draws` are area, aspect, top and left of each rectangle, in [0, 1)."""
    masked: set[int] = set()
    for area, aspect, top, left in draws:
        area, aspect = 0.08 + area * (0.3 - 0.08), (0.3 ** (0.5 - aspect)) ** 2  # aspect: height over width, in [0.3, 1 / 0.3]
        height = min(rows, max(1, round(math.sqrt(area * aspect) * rows)))
        width = min(columns, max(1, round(math.sqrt(area / aspect) * columns)))
        y, x = int(top * (rows - height + 1)), int(left * (columns - width + 1))
        rectangle = {r * columns + c for r in range(y, y + height) for c in range(x, x + width)} - masked
        surplus = len(masked) + len(rectangle) - num_masked
        masked |= set(sorted(rectangle, key=lambda i: noise[i])[: len(rectangle) - max(0, surplus)])
        if surplus >= 0:
            break
    return [i not in masked for i in range(rows * columns)]


def test_block_masks_rectangles_until_the_ratio_is_met():
    images = torch.zeros(20, 3, 64, 96)
    visible = select("block", images).visible(96)
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
    visible = select({"name": "grid", "mask_ratio": ratio}, torch.zeros(6, 3, 8 * 2 * n, 8 * 2 * n)).visible(4 * n * n)
    offsets = set()
    for seen in visible.view(6, 2 * n, 2 * n).tolist():
        (offset,) = {(x + round(n / 2) * y) % n for y, row in enumerate(seen) for x, kept in enumerate(row) if kept}
        assert all(kept == ((x + round(n / 2) * y) % n == offset) for y, row in enumerate(seen) for x, kept in enumerate(row))
        offsets.add(offset)
    assert len(offsets) > 1


def slow_attentive(scores: list[float], rows: int, columns: int, merge: int, num_kept: int) -> list[bool]:
    """Visible patches of one image, the blocks of the highest mean score first, their patches by their own."""
    blocks: dict[tuple[int, int], list[int]] = {}
    for i in range(rows * columns):
        blocks.setdefault((i // columns // merge, i % columns // merge), []).append(i)
    kept: list[int] = []
    for block in sorted(blocks.values(), key=lambda block: -sum(scores[i] for i in block) / len(block)):
        kept += sorted(block, key=lambda i: -scores[i])[: num_kept - len(kept)]
    return [i in kept for i in range(rows * columns)]


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (4, 9)])
def test_attentive_keeps_what_the_teacher_attends_to(grid, merge):
    rows, columns = grid
    scores = torch.rand(4, rows * columns, generator=torch.Generator().manual_seed(7))
    images = torch.zeros(4, 3, 8 * rows, 8 * columns)
    visible = select({"name": "attentive", "merge": merge}, images, patch_scores=scores).visible(rows * columns)
    num_kept = keep_count(rows * columns, 0.5)
    for seen, row in zip(visible.tolist(), scores.tolist(), strict=True):
        assert seen == slow_attentive(row, rows, columns, merge, num_kept)


def test_attentive_takes_equal_scores_in_random_order_and_says_what_it_needs():
    spec, images = {"name": "attentive", "merge": 2}, torch.zeros(1000, 3, 48, 48)
    assert_uniform(select(spec, images, patch_scores=torch.ones(1000, 36)).visible(36))
    for scores in (None, torch.ones(1000, 35)):
        with pytest.raises(ValueError, match=r"teacher's attention to each patch, \(1000, 36\)"):
            select(spec, images, patch_scores=scores)


def slow_cluster(image: torch.Tensor, anchors: list[int], threshold: float) -> list[bool]:
    num_patches = image.shape[1] * image.shape[2] // 64
    closest = [max(slow_similarity(image, a, i) for a in anchors) for i in range(num_patches)]
    return [i in anchors or closest[i] > threshold for i in range(num_patches)]


@pytest.mark.parametrize("threshold", [0.1, 0.3])
def test_cluster_masks_what_resembles_an_anchor_and_fills_up_at_random(threshold):
    images = torch.stack([flat_and_textured(), *photo_like(3, 32, 48)])
    spec = {"name": "cluster", "similarity_threshold": threshold, "anchor_ratio": 0.1}
    visible = select(spec, images).visible(24)
    generator = torch.Generator().manual_seed(0)
    anchor_noise, surplus_noise = (torch.rand(4, 24, generator=generator) for _ in range(2))
    for image, anchor_row, surplus_row, seen in zip(images, anchor_noise, surplus_noise, visible, strict=True):
        masked = slow_cluster(image, anchor_row.argsort(descending=True)[:2].tolist(), threshold)
        for i in surplus_row.argsort(descending=True).tolist():
            masked[i] = masked[i] or sum(masked) < 7  # 24 - keep_count(24, 0.3)
        assert seen.tolist() == [not m for m in masked]


def test_cluster_auto_threshold_removes_the_ratio_asked_for_on_average():
    for ratio in (0.35, 0.5, 0.7):
        selection = select({"name": "cluster", "mask_ratio": ratio, "min_mask_ratio": 0}, photo_like(16, 112, 112))
        assert selection.lengths.unique().numel() > 5
        # Anchors below the threshold are masked on top: 3 % of the patches at most.
        assert ratio - 0.005 <= 1 - selection.kept_share(196).item() <= ratio + 0.03


def test_cluster_masks_a_plain_background_as_one_cluster():
    images = torch.ones(8, 3, 64, 64) * torch.tensor([1.93, 2.07, 2.15])[:, None, None]
    images[:, :, 24:40, 24:40] = photo_like(8, 16, 16, seed=5)
    seen = select({"name": "cluster", "anchor_ratio": 0.1}, images).visible(64).view(8, 8, 8)
    inside = seen[:, 3:5, 3:5].float().mean()
    assert seen.sum(dim=(1, 2)).max() <= 4 and inside > 0.5


def slow_sinkhorn(kernel: np.ndarray, iterations: int) -> np.ndarray:
    plan = kernel.copy()
    for _ in range(iterations):
        plan = plan / plan.sum(axis=1, keepdims=True)
        plan = plan / plan.sum(axis=0, keepdims=True)
    return plan


def slow_pgs(image, noise, *, min_ratio, max_ratio, transport, edges) -> list[bool]:
    """Visible patches of one image, by the definition's four steps; `noise` (L,) draws the candidates."""
    num_patches = len(noise)
    strength = patch_edges(image[None], 8, edges)[0].tolist()
    is_edge = [e > sum(strength) / num_patches for e in strength]
    order = sorted(range(num_patches), key=lambda i: (is_edge[i], strength[i] if is_edge[i] else -noise[i]))
    candidates = order[: max(1, round(num_patches * 0.05))]
    similarity = np.array([[slow_similarity(image, i, j) for j in range(num_patches)] for i in range(num_patches)])
    weight = slow_sinkhorn(np.exp((similarity - 1) / 0.1), 5) if transport else similarity
    w = [round(max(weight[c, i] for c in candidates), 9) for i in range(num_patches)]
    similar = [max(similarity[c, i] for c in candidates) > 0.5 for i in range(num_patches)]
    order = sorted(range(num_patches), key=lambda i: (is_edge[i], strength[i] if is_edge[i] else -w[i], -noise[i]))
    n = sum(s and not e for s, e in zip(similar, is_edge, strict=True))
    low, high = (num_patches - keep_count(num_patches, r) for r in (min_ratio, max_ratio))
    masked = set(order[: min(max(n, low), high)])
    return [i not in masked for i in range(num_patches)]


@pytest.mark.parametrize("edges", ["sobel", "none"])
@pytest.mark.parametrize("transport", [True, False])
@pytest.mark.parametrize("bounds", [(0.3, 0.5), (0.5, 0.5), (0.0, 0.9)])
def test_pgs_follows_its_definition_step_by_step(bounds, transport, edges):
    images = torch.stack([flat_and_textured(), *photo_like(3, 32, 48, seed=2)])
    spec = {"name": "pgs", "min_mask_ratio": bounds[0], "max_mask_ratio": bounds[1], "transport": transport, "edges": edges}
    visible = select(spec, images).visible(24)
    noise = torch.rand(4, 24, generator=torch.Generator().manual_seed(0))
    for image, row, seen in zip(images, noise, visible, strict=True):
        options = {"min_ratio": bounds[0], "max_ratio": bounds[1], "transport": transport, "edges": edges}
        assert seen.tolist() == slow_pgs(image, row.tolist(), **options)


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


# ---- Objects and their background -------------------------------------------------------------------------------------


def normalised_scene(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values (3, 224, 224) of a scene, and which of its 196 patches are mostly object."""
    picture, mask = draw_scene(sample_scene(index, split="test"), 224)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    is_object = torch.from_numpy(mask).view(14, 16, 14, 16).float().mean(dim=(1, 3)).flatten() > 0.5
    return (pixels - 0.45) / 0.27, is_object


def test_pgs_keeps_the_objects_of_scenes():
    images, is_object = map(torch.stack, zip(*map(normalised_scene, range(40)), strict=True))
    assert 0.05 < is_object.float().mean() < 0.3
    kept = {}
    for name, spec in {"random": "random", "pgs 0.5": PGS_05, "cluster": "cluster"}.items():
        mask = build_patch_mask(spec, patch_size=16)
        visible = mask(images, generator=torch.Generator().manual_seed(0)).visible(196)
        kept[name] = visible[is_object].float().mean().item()
    assert 0.45 < kept["random"] < 0.55 and kept["pgs 0.5"] > 0.85 and kept["cluster"] > 0.75


def test_what_pgs_drops_around_a_textured_object_on_a_plain_background_is_background():
    texture = photo_like(20, 224, 224)
    texture += 0.3 * torch.randn(texture.shape, generator=torch.Generator().manual_seed(0))
    y, x = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    disc = torch.hypot(y - 111.5, x - 111.5) < 67
    images = torch.where(disc, texture, 1.9)
    is_object = torch.nn.functional.avg_pool2d(disc[None, None].float(), 16).flatten() > 0
    dropped = ~build_patch_mask(PGS_05, patch_size=16)(images, generator=torch.Generator().manual_seed(0)).visible(196)
    assert is_object.float().mean() > 0.35 and dropped.float().mean() == 0.5
    assert dropped[:, ~is_object].sum() / dropped.sum() >= 0.95


@pytest.mark.parametrize("name", [name for name, (_, _, most) in MASKS.items() if most != 0])
def test_two_epochs_give_an_image_two_masks(name):
    """The trainer seeds a mask by its step; the attentive mask's scores move with its teacher."""
    images = photo_like(16, 112, 112)
    first, second = (select(MASKS[name][0], images, seed).visible(196) for seed in (1, 2))
    differs = (first != second).any(dim=1)
    assert differs.any() if "grid" in name else differs.all()  # a checkerboard is one of two
