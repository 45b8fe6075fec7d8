"""Proves that the masks which the study tried beside CLIP-PGS, and their controls, do what they say."""

import pytest
import torch
from helpers import PATCH_SIZE, photo_like

from hf_maskclip.models.masked_tower import PatchMaskedTower
from hf_maskclip.models.patch_edges import patch_edges
from hf_maskclip.models.patch_masking_pgs import PGSPatchMask
from training.study import pages
from training.study.run import ROOT
from training.study.study import read_study, runs_of


@pytest.fixture
def ideas(masks_of_ideas):
    """Imported in tests alone, so that the tables of other tests have no masks of a study."""
    from training.study import ideas

    return ideas


@pytest.fixture
def idea_tokens(masks_of_ideas):
    from training.study import idea_tokens

    return idea_tokens


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def visible(mask, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """(B, L) of images (B, C, H, W)."""
    return mask(images, generator=seeded(seed)).visible(images.shape[2] * images.shape[3] // mask.patch_size**2)


def is_edge(images: torch.Tensor) -> torch.Tensor:
    strength = patch_edges(images, 8)
    return strength > strength.mean(dim=1, keepdim=True)


@pytest.fixture
def images() -> torch.Tensor:
    """Six pictures of 6 x 6 patches, of which two are mostly plain."""
    images = photo_like(6, 48, 48)
    images[4:, :, 8:] = torch.tensor([1.0, 0.5, -0.5])[:, None, None]
    return images


def test_edges_are_drawn_where_there_are_edges(images, ideas):
    mask = ideas.EdgeDrawMask(patch_size=8)
    drawn = torch.stack([visible(mask, images, seed) for seed in range(8)])
    assert (drawn.sum(dim=2) == 18).all()
    assert drawn[:, is_edge(images)].float().mean() > 0.7
    assert (drawn[0] != drawn[1]).any(dim=1).all()


def test_edges_at_random_are_as_many_as_pgs_keeps(images, ideas):
    edges, pgs = is_edge(images), PGSPatchMask(0.75, 0.75, patch_size=8)
    mask = ideas.EdgeShareMask(0.75, patch_size=8)
    assert (edges.sum(dim=1) > 9).any()  # some have more edges than there is room for
    assert (edges.sum(dim=1) < 9).any()  # and some have room for others
    draws = [visible(mask, images, seed) for seed in range(2)]
    for drawn in draws:
        assert torch.equal((drawn & edges).sum(dim=1), (visible(pgs, images) & edges).sum(dim=1))
        assert (drawn.sum(dim=1) == 9).all()
    crowded = edges.sum(dim=1) > 9
    assert (draws[0] != draws[1])[crowded].any(dim=1).all()


def test_a_budget_for_the_batch_gives_more_to_pictures_that_have_more(images, ideas):
    selection = ideas.BatchBudgetMask(patch_size=8)(images, generator=seeded(0))
    assert selection.lengths.sum() == 6 * 18
    assert selection.lengths.min() >= 9
    assert selection.lengths.max() <= 27
    assert selection.lengths[:4].min() > selection.lengths[4:].max()
    # Each picture keeps the first of CLIP-PGS's order.
    stages = PGSPatchMask(0.5, 0.5, patch_size=8).stages(images, generator=seeded(0))
    for order, length, kept in zip(stages.order, selection.lengths, selection.visible(36), strict=True):
        assert set(order[:length].tolist()) == set(kept.nonzero().flatten().tolist())
    shuffled = ideas.BatchBudgetMask(shuffled=True, patch_size=8)(images, generator=seeded(0))
    assert shuffled.lengths.tolist() != selection.lengths.tolist()
    assert sorted(shuffled.lengths.tolist()) == sorted(selection.lengths.tolist())


@pytest.mark.parametrize("choose", ["edges", "random"])
def test_coarse_tokens_and_fine_patches_show_each_patch_once(choose, idea_tokens):
    images = photo_like(3, 64, 64)  # 8 x 8 patches, 4 x 4 blocks
    selection = idea_tokens.CoarseMask(choose=choose, patch_size=8)(images, generator=seeded(0))
    fine, coarse = selection.visible(64), selection.members
    assert torch.equal(fine.float() + (coarse > 0).sum(dim=1), torch.ones(3, 64))
    assert torch.equal(coarse.sum(dim=2), torch.ones(3, coarse.shape[1]))
    assert selection.indices.shape[1] + coarse.shape[1] == pytest.approx(32, abs=2)
    # The pixels of a coarse token are its block's, averaged two by two.
    block = (coarse[1, 0] > 0).nonzero()[0].item()
    top, left = (8 * part for part in divmod(block, 8))
    expected = images[1, :, top : top + 16, left : left + 16].unfold(1, 2, 2).unfold(2, 2, 2).mean(dim=(3, 4))
    torch.testing.assert_close(selection.group_pixels[1, 0], expected)


@pytest.mark.parametrize("groups", ["candidates", "random"])
def test_a_summary_is_the_mean_of_the_dropped_patches_of_a_group(images, groups, idea_tokens):
    selection = idea_tokens.SummaryMask(groups=groups, patch_size=8)(images, generator=seeded(0))
    assert selection.indices.shape[1] + selection.members.shape[1] == 18
    assert selection.kept_share(36) == 0.5
    is_member = selection.members > 0
    assert torch.equal(selection.visible(36) | is_member.any(dim=1), torch.ones(6, 36, dtype=torch.bool))
    assert not (selection.visible(36) & is_member.any(dim=1)).any()
    members = is_member[2, 1].nonzero().flatten().tolist()
    assert members
    pixels = [images[2, :, y : y + 8, x : x + 8] for y, x in ((8 * (i // 6), 8 * (i % 6)) for i in members)]
    torch.testing.assert_close(selection.group_pixels[2, 1], torch.stack(pixels).mean(dim=0))


def test_a_group_is_embedded_as_the_mean_of_its_patches(make_model, idea_tokens):
    tower = make_model().eval().vision_model
    assert isinstance(tower, PatchMaskedTower)
    size = tower.config.image_size
    images = photo_like(2, size, size)
    selection = idea_tokens.SummaryMask(patch_size=PATCH_SIZE)(images, generator=seeded(0))
    tokens = tower.embeddings(images, patch_selection=selection)
    whole = tower.embeddings(images)[:, 1:]
    num_groups = selection.members.shape[1]
    torch.testing.assert_close(tokens[:, -num_groups:], selection.members @ whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        tokens[:, 1:-num_groups], torch.stack([w[i] for w, i in zip(whole, selection.indices, strict=True)])
    )
    assert tower.train()(images, patch_selection=selection).last_hidden_state.shape[1] == tokens.shape[1]


def test_a_mask_with_an_error_has_16_choices(images, ideas):
    mask = ideas.RepeatedRandomMask(patch_size=8)
    choices = [mask(images, generator=seeded(number)).indices.tolist() for number in range(40)]
    assert len({str(choice) for choice in choices}) == 16
    assert choices[1] == choices[17] != choices[2]


@pytest.mark.parametrize("name", ["ideas_scenes", "ideas_pairs"])
def test_each_idea_of_a_study_has_its_control(name, masks_of_ideas):
    study = read_study(ROOT / "training" / "study" / f"{name}.yaml")
    assert len(runs_of(study, ROOT)) >= len(study.methods)
    for idea, control in pages.CONTROLS.items():
        assert {idea, control} <= study.methods.keys()
