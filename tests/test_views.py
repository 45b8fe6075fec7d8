"""Proves of two views of a picture: what the second keeps, that the loss is the mean over views with one caption encoding, that
two processes have the loss and the gradient of one, and that chunks and resumed runs agree."""

import shutil
from collections import Counter
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from families import CONTEXT, make_images, make_inputs, make_plain, save_folder
from helpers import as_killed_at, assert_equal_gradients, gradients_of, losses_of, photo_like, same, words
from processes import Processes, in_two_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_maskclip import ContrastiveLoss, PatchMask, PatchSelection, SigmoidLoss, add_patch_mask, register_patch_mask
from hf_maskclip.errors import ConfigError
from training.config import TrainingConfig
from training.data.batches import Batch
from training.model.loss import MeanOverViews, PairLoss
from training.patch_selection import Chunk, PatchSelector, complement, interleave, patches_there
from training.train import program

SEED, PAIRS = 3, 8


def visible_of(selection: PatchSelection) -> list[set[int]]:
    rows = zip(selection.indices.tolist(), selection.valid().sum(dim=1).tolist(), strict=True)
    return [set(row[:length]) for row, length in rows]


@pytest.mark.parametrize("name", ["clip", "siglip2"])
@pytest.mark.parametrize("mask", [{"name": "random", "mask_ratio": ratio} for ratio in (0.25, 0.5, 0.75)] + ["pgs", "cluster"])
def test_the_complement_keeps_what_the_first_view_dropped(name, mask):
    """Beside a literal transcription: all dropped patches, or some of them, then others, up to the same count."""
    images = make_images(name)
    model = add_patch_mask(make_plain(name), mask)
    shapes = {key: images[key] for key in ("spatial_shapes",) if key in images}
    first = model.select_patches(images["pixel_values"], **shapes, generator=torch.Generator().manual_seed(SEED))
    is_there = patches_there(images["pixel_values"], 8, **shapes)
    counts = is_there.sum(dim=1)
    assert counts.tolist() == ([16, 10, 10] if name == "siglip2" else [16, 16, 16])
    second = complement(first, is_there, torch.Generator().manual_seed(SEED))
    for kept, others, number in zip(visible_of(first), visible_of(second), counts.tolist(), strict=True):
        dropped = set(range(number)) - kept
        assert len(others) == len(kept)
        assert others <= dropped or dropped <= others
        assert others <= set(range(number))
    other = complement(first, is_there, torch.Generator().manual_seed(SEED + 1))
    if mask == {"name": "random", "mask_ratio": 0.75}:
        assert visible_of(other) != visible_of(second)  # some of many dropped ones, by chance


def test_views_of_a_picture_follow_one_another():
    first = PatchSelection(torch.tensor([[0, 1], [2, 3]]))
    second = PatchSelection(torch.tensor([[4, 5, 6], [7, 7, 7]]), torch.tensor([3, 1]))
    assert visible_of(interleave([first, second])) == [{0, 1}, {4, 5, 6}, {2, 3}, {7}]
    assert interleave([first, first]).lengths is None
    assert interleave([first]) is first


def test_the_loss_is_the_mean_over_views_with_one_encoding_of_the_captions():
    model, inputs = add_patch_mask(make_plain("clip"), "pgs").train(), make_inputs("clip")
    selections = [model.select_patches(inputs["pixel_values"]) for _ in range(2)]
    expected = 0
    for selection in selections:
        outputs = model(**inputs, patch_selection=selection)
        expected += ContrastiveLoss()(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp()) / 2
    twice = inputs | {"pixel_values": inputs["pixel_values"].repeat_interleave(2, dim=0)}
    outputs = model(**twice, patch_selection=interleave(selections))
    assert len(outputs.image_embeds) == 2 * len(outputs.text_embeds)
    found = MeanOverViews(ContrastiveLoss())(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class LeftPart(PatchMask):
    """A mask of a user's own, which does not say that it has no chance."""

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
        return PatchSelection(torch.arange(9).expand(len(pixel_values), -1))


def test_two_masks_without_chance_are_refused_or_said_and_two_crops_are_not(run, caplog):
    options = {"patch_mask": {"name": "attentive", "mask_ratio": 0.5}, "max_steps": 2}
    with pytest.raises(ConfigError, match="views='two': the patch mask has no chance, so both views of a picture are the same"):
        run(**options, views="two")
    for views in ("complementary", "crops"):
        _, steps, _ = run(**options, views=views)
        assert [step["kept_patches"] for step in steps] == [32, 32]
    assert "the second view adds nothing" not in caplog.text
    register_patch_mask("left_part", LeftPart)
    run(patch_mask="left_part", views="two", max_steps=1)
    assert "both masks of each of the first 4 pictures are the same" in caplog.text
    _, steps, _ = run(patch_mask="random", views="two", mask_schedule=1.0)  # whose first step has the same whole pictures twice
    assert steps[-1]["kept_patches"] < 64


@pytest.mark.parametrize("views, masked, whole", [("one", 1, 1), ("two", 2, 1), ("complementary", 2, 1), ("crops", 2, 2)])
def test_a_step_says_how_many_views_of_a_picture_it_encodes(views, masked, whole, run, capsys):
    _, steps, _ = run(views=views, patch_mask={"name": "random", "mask_ratio": 0.75}, max_steps=2, unmasked_tuning_steps=1)
    assert [(step["views"], step["kept_patches"]) for step in steps] == [(masked, 16), (whole, 64)]
    assert f"loss {steps[0]['loss']:.4f}, {'2 x ' if masked == 2 else ''}16 of 64 patches, " in capsys.readouterr().err


@pytest.mark.parametrize("naflex", [False, True])
def test_two_crops_of_a_picture_follow_one_another_and_each_has_its_mask(naflex, run, tmp_path):
    model = {"model": str(save_folder("siglip2", tmp_path / "model"))} if naflex else {}
    seen = []
    look = PatchSelector.select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PatchSelector, "select", lambda *args, **images: seen.append((args, images)) or look(*args, **images))
        _, whole, _ = run(views="crops", crop_scale=0.2, patch_mask="random", **model, output_dir=str(tmp_path / "a"))
    pictures = seen[0][0][1]
    assert len(pictures) == 8
    pairs = [(pictures[number], pictures[number + 1]) for number in range(0, 8, 2)]
    assert not any(torch.equal(*pair) for pair in pairs)
    means = torch.stack([torch.stack([crop.mean() for crop in pair]) for pair in pairs])  # of a picture they are alike
    assert (means[:, 0] - means[:, 1]).abs().mean() < (means[:, 0] - means.roll(1, 0)[:, 1]).abs().mean()
    assert len(look(*seen[0][0], **seen[0][1]).indices) == 8
    options = {"views": "crops", "crop_scale": 0.2, "patch_mask": "none", **model}
    _, whole, _ = run(**options, output_dir=str(tmp_path / "b"))
    _, chunked, _ = run(**options, chunk_size=2, output_dir=str(tmp_path / "c"))
    assert [step["loss"] for step in chunked] == pytest.approx([step["loss"] for step in whole], rel=1e-4)


@pytest.mark.parametrize("views", ["two", "complementary", "crops"])
def test_chunks_and_resumed_runs_agree(views, run, tmp_path):
    options = {"views": views, "patch_mask": {"name": "random", "mask_ratio": 0.75}, "checkpoint_every": 2}
    _, steps, written = run(**options, output_dir=str(tmp_path / "a"))
    _, one_view, _ = run(**options | {"views": "one"}, output_dir=str(tmp_path / "one"))
    assert [step["kept_patches"] for step in steps] == [step["kept_patches"] for step in one_view] == [16] * 4
    assert steps[0]["loss"] != pytest.approx(one_view[0]["loss"], rel=1e-4)  # by more than rounding: the views differ
    shutil.copytree(written, tmp_path / "b")
    as_killed_at(tmp_path / "b", 2)
    _, again, _ = run(**options, output_dir=str(tmp_path / "b"), resume="auto")
    assert same(again) == same(steps)


def test_a_chunked_step_has_the_loss_of_the_whole_batch(run, tmp_path):
    options = {"views": "two", "patch_mask": {"name": "random", "mask_ratio": 0.0}}  # so that chunks draw alike
    _, whole, _ = run(**options, output_dir=str(tmp_path / "a"))
    _, chunked, _ = run(**options, chunk_size=2, output_dir=str(tmp_path / "b"))
    assert [step["loss"] for step in chunked] == pytest.approx([step["loss"] for step in whole], rel=1e-4)


def model_for(loss: str) -> nn.Module:
    """A CLIP; for the sigmoid loss a SigLIP, whose bias and scale are such that all pairs count."""
    model = add_patch_mask(make_plain("siglip" if loss == "sigmoid" else "clip"), "cluster").train()
    nn.init.constant_(model.logit_scale, 1.0)
    if loss == "sigmoid":
        nn.init.constant_(model.logit_bias, -1.0)
    return model


def whole_batch() -> Batch:
    texts = torch.randint(4, 200, (PAIRS, CONTEXT), generator=torch.Generator().manual_seed(SEED))
    where = {"of_sources": Counter(), "worker": 0, "starts": (), "ends": ()}
    return Batch(photo_like(PAIRS, 32, 32), {"input_ids": texts}, [str(n) for n in range(PAIRS)], Counter(), **where)


def views_of_the_batch(model: nn.Module, views: str) -> list[PatchSelection]:
    config = TrainingConfig(views=views, seed=SEED)
    patches = PatchSelector(model.vision_model, config, config.timeline(1, 10), Accelerator(cpu=True))
    chosen = patches.select_views(whole_batch().pixel_values, step=1)
    assert len(chosen) == 2
    assert all(selection.lengths.unique().numel() > 1 for selection in chosen)
    assert visible_of(chosen[0]) != visible_of(chosen[1])
    return chosen


def views_one_by_one(loss: str, model: nn.Module, chosen: list[PatchSelection]) -> tuple[float, list[torch.Tensor]]:
    """Mean loss and gradients of one process, where each view of all pictures goes through the model by itself."""
    batch, bias = whole_batch(), [model.logit_bias] if loss == "sigmoid" else []
    total = 0.0
    for selection in chosen:
        outputs = model(**batch.texts, pixel_values=batch.pixel_values, patch_selection=selection)
        one_view = SigmoidLoss() if loss == "sigmoid" else ContrastiveLoss()
        value = one_view(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp(), *bias) / 2
        value.backward()
        total += value.item()
    return total, gradients_of(model)


def rows_of_views(chosen: list[PatchSelection], rows: slice, **images: torch.Tensor) -> list[PatchSelection]:
    return [PatchSelection(selection.indices[rows], selection.lengths[rows]) for selection in chosen]


def half_of_the_batch(loss: str, num_chunks: int, chosen: list[PatchSelection], rank: int) -> tuple[float, list[torch.Tensor]]:
    """Mean loss of two processes and the gradients that DDP leaves on one of them, by the chunks and the loss of a run."""
    model = model_for(loss)
    trained, pair_loss = DistributedDataParallel(model), PairLoss(loss, model)
    size = PAIRS // 2 // num_chunks
    starts = range(rank * PAIRS // 2, (rank + 1) * PAIRS // 2, size)
    parts = [slice(start, start + size) for start in starts]
    chunks = [Chunk(whole_batch(), rows, pixels_of, partial(rows_of_views, chosen, rows), {}) for rows in parts]
    if num_chunks == 1:
        value = pair_loss(trained(**chunks[0].encode_inputs()))
        value.backward()
    else:
        value = pair_loss.backward_in_chunks(trained, [chunk.encode_inputs for chunk in chunks])
    mean = value.detach().clone()
    torch.distributed.all_reduce(mean)
    return mean.item() / 2, gradients_of(model)


def pixels_of(batch: Batch, rows: slice) -> dict[str, torch.Tensor]:
    return {"pixel_values": batch.pixel_values[rows]}


@pytest.mark.slow
@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("views", ["two", "complementary"])
@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
def test_two_processes_have_the_loss_and_the_gradient_of_one(loss, views, num_chunks, tmp_path):
    model = model_for(loss)
    chosen = views_of_the_batch(model, views)
    expected, gradients = views_one_by_one(loss, model, chosen)
    for value, given in in_two_processes(partial(half_of_the_batch, loss, num_chunks, chosen), tmp_path):
        assert value == pytest.approx(expected, rel=1e-5)
        assert_equal_gradients(given, gradients, rtol=1e-5 if num_chunks == 1 else 1e-4)


@pytest.mark.slow
def test_two_processes_see_two_views_as_well(options, tmp_path):
    options |= {"views": "two", "patch_mask": "pgs", "batch_size": 2, "output_dir": str(tmp_path / "run")}
    processes = Processes(2, tmp_path / "printed", program, words(options))
    assert set(processes.wait(200)) == {0}, processes.printed()[-3000:]
    assert len(losses_of(tmp_path / "run")) == 4


def test_two_views_of_whole_pictures_are_refused(run):
    with pytest.raises(ConfigError, match="views='two': two views of a picture differ by their patch mask"):
        run(views="two", patch_mask="none")
