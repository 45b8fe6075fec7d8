"""Proves of every family and mask: in evaluation mode a picture gets the same patches alone, in any batch and in any process,
by a seed that its own pixels give. And that training, and whoever gives a generator, see nothing of it."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from families import BY_TYPE, make_images, make_plain
from helpers import photo_like, rows_of

from hf_maskclip import PatchMask, PatchSelection, add_patch_mask, build_patch_mask, register_patch_mask
from hf_maskclip.models.patch_mask_registry import BUILT_IN

EMBEDS = {"embedding_weight": 0.5}
MASKS = {name: {"name": name} for name in BUILT_IN if name != "none"}
MASKS |= {"cluster embeds": {"name": "cluster"} | EMBEDS, "pgs embeds": {"name": "pgs"} | EMBEDS}
MASKS |= {"cluster ceiling": {"name": "cluster", "max_mask_ratio": 0.6}}
MASKS |= {"pgs temperature": {"name": "pgs", "max_mask_ratio": 0.8, "min_mask_ratio": 0.8, "edge_temperature": 0.2}}
ORDERS = {"alone": [[0], [1], [2], [3], [4], [5]], "in pairs": [[0, 1], [2, 3], [4, 5]], "shuffled": [[5, 2, 0], [3, 1, 4, 2]]}


def six_images(name: str) -> dict[str, torch.Tensor]:
    """Six images as the family's vision tower takes them, with the scores of a teacher."""
    halves = [make_images(name, seed) for seed in (0, 1)]
    images = {key: torch.cat([half[key] for half in halves]) for key in halves[0]}
    return images | {"patch_scores": torch.rand(6, 16, generator=torch.Generator().manual_seed(3))}


def of_rows(images: dict[str, torch.Tensor], rows: list[int], mask: str) -> dict[str, torch.Tensor]:
    """Some of them; the scores only for masks that take some."""
    needed = images if BUILT_IN[MASKS[mask]["name"]].needs_patch_scores else images.keys() - {"patch_scores"}
    return {key: images[key][rows] for key in needed}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", BY_TYPE)
def test_a_picture_gets_the_same_patches_and_features_whatever_its_batch(name, mask):
    model, images = add_patch_mask(make_plain(name), MASKS[mask]), six_images(name)
    with torch.no_grad():
        whole = model.get_image_features(**of_rows(images, list(range(6)), mask), apply_patch_mask=True)
    patches = rows_of(whole.patch_selection)
    sizes = [16, 10, 10] * 2 if name == "siglip2" else [16] * 6
    assert all(1 <= len(row) < size for row, size in zip(patches, sizes, strict=True))
    assert len({tuple(row) for row in patches[::3]}) + len({tuple(row) for row in patches[1::3]}) > 2  # of one grid each
    for batches in ORDERS.values():
        for rows in batches:
            torch.manual_seed(rows[0])  # the global generator has no part in it
            with torch.no_grad():
                found = model.get_image_features(**of_rows(images, rows, mask), apply_patch_mask=True)
            assert rows_of(found.patch_selection) == [patches[row] for row in rows]
            torch.testing.assert_close(found.pooler_output, whole.pooler_output[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_it_is_the_mask_of_each_picture_alone_by_the_hash_of_its_bytes(mask):
    """The definition, literally; cluster's automatic threshold is so that of the picture."""
    model, images = add_patch_mask(make_plain("clip"), MASKS[mask]), six_images("clip")
    given = of_rows(images, list(range(6)), mask)
    selection = model.select_patches(**given)
    alone = build_patch_mask(MASKS[mask], patch_size=8)
    for row, found in enumerate(rows_of(selection)):
        picture = given["pixel_values"][row]
        digest = hashlib.blake2b(picture.numpy().tobytes(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") // 2)
        embeds = model.vision_model.embeddings.patch_embedding(picture[None]).flatten(2).transpose(1, 2)
        scores = {"patch_scores": given["patch_scores"][row : row + 1]} if "patch_scores" in given else {}
        expected = alone(picture[None], embeds.detach(), generator=generator, **scores)
        assert found == rows_of(expected)[0]
        assert (selection.lengths is None) == (expected.lengths is None)


@pytest.mark.parametrize("mask", MASKS)
def test_training_and_a_given_generator_choose_from_the_batch_at_once(mask):
    model, images = add_patch_mask(make_plain("clip"), MASKS[mask]), six_images("clip")
    given = of_rows(images, list(range(6)), mask)
    by_picture = model.select_patches(**given)
    embeds = model.vision_model.embeddings.patch_embedding(given["pixel_values"]).flatten(2).transpose(1, 2).detach()
    given_mask = {key: given[key] for key in given.keys() & {"patch_scores"}}

    def at_once(generator=None) -> list[list[int]]:
        torch.manual_seed(7)
        alone = build_patch_mask(MASKS[mask], patch_size=8)
        return rows_of(alone(given["pixel_values"], embeds, generator=generator, **given_mask))

    found = model.select_patches(**given, generator=torch.Generator().manual_seed(5))
    assert rows_of(found) == at_once(torch.Generator().manual_seed(5))
    torch.manual_seed(7)
    trained = model.train().get_image_features(**given).patch_selection
    assert rows_of(trained) == at_once()
    if mask != "attentive":  # its scores, which have no ties, leave nothing to chance
        assert rows_of(trained) != rows_of(by_picture)


def test_a_mask_given_for_one_call_and_images_of_another_size_follow_the_same_rule():
    model = add_patch_mask(make_plain("clip"), "none")
    pictures = photo_like(3, 48, 40)
    options = {"patch_mask": {"name": "cluster", "max_mask_ratio": 0.75}, "interpolate_pos_encoding": True}
    whole = model.get_image_features(pictures, **options).patch_selection
    for row in range(3):
        one = model.get_image_features(pictures[row : row + 1], **options).patch_selection
        assert rows_of(one) == rows_of(whole)[row : row + 1]
    assert not whole.visible(30).all(dim=1).any()
    laid_out_otherwise = pictures.to(memory_format=torch.channels_last)
    assert rows_of(model.get_image_features(laid_out_otherwise, **options).patch_selection) == rows_of(whole)


def test_other_pixels_are_another_picture_to_the_last_bit():
    model = add_patch_mask(make_plain("clip"), "random")
    picture = photo_like(1, 32, 32)
    changed = picture.clone()
    changed[0, 0, 0, 0] = torch.nextafter(changed[0, 0, 0, 0], torch.tensor(9.0))
    first = rows_of(model.select_patches(picture))
    assert first == rows_of(model.select_patches(picture.clone()))
    assert first != rows_of(model.select_patches(changed))
    assert first != rows_of(model.select_patches(picture.bfloat16()))


class BrightestPatchMask(PatchMask):
    """A mask of one's own, whose count goes by the batch."""

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
        brightness = torch.nn.functional.avg_pool2d(pixel_values.mean(dim=1, keepdim=True), self.patch_size).flatten(1)
        count = max(1, int((brightness > 0).sum(dim=1).max()))
        return PatchSelection(brightness.argsort(dim=1, descending=True)[:, :count].sort(dim=1).values)


def test_a_mask_of_ones_own_may_keep_another_number_of_each_picture():
    register_patch_mask("brightest", BrightestPatchMask)
    model = add_patch_mask(make_plain("clip"), "brightest")
    pictures = photo_like(4, 32, 32) - 0.2
    together = model.get_image_features(pictures, apply_patch_mask=True)
    alone = [model.get_image_features(pictures[row : row + 1], apply_patch_mask=True) for row in range(4)]
    assert len(together.patch_selection.lengths.unique()) > 1
    assert rows_of(together.patch_selection) == [rows_of(one.patch_selection)[0] for one in alone]
    torch.testing.assert_close(together.pooler_output, torch.cat([one.pooler_output for one in alone]), rtol=1e-4, atol=1e-5)


def test_scores_of_another_number_of_pictures_are_refused():
    model, images = add_patch_mask(make_plain("clip"), "attentive"), six_images("clip")
    with pytest.raises(ValueError, match="^patch_scores of 6 images: there are 4 images"):
        model.select_patches(images["pixel_values"][:4], patch_scores=images["patch_scores"])


PROCESS = """
import json, sys, torch
from hf_maskclip import MaskCLIPVisionModel
torch.manual_seed(int(sys.argv[2]))
tower = MaskCLIPVisionModel.from_pretrained(sys.argv[1]).eval()
pictures = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32)[int(sys.argv[3]):].sin()
print(json.dumps(tower.select_patches(pictures).visible(16).tolist()))
"""


@pytest.mark.slow
def test_another_process_with_other_seeds_gives_a_picture_the_same_patches(make_model, tmp_path):
    make_model("random").save_pretrained(tmp_path)
    found = []
    for number in ("0", "1"):
        command = [sys.executable, "-c", PROCESS, str(tmp_path), number, number]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": number})
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert (len(found[0]), len(found[1])) == (2, 1)
    assert found[0][1] == found[1][0]
    assert found[0][0] != found[0][1]
