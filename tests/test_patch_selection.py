"""Proves that each training step's patches can be replayed, that the ratio follows its schedule, and that the attentive
mask's teacher is the moving average it should be and sees what its class token attends to."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from hf_maskclip import MaskCLIPModel
from hf_maskclip.mask_schedule import AttentionTeacher
from hf_maskclip.models.patch_masking_attentive import class_attention
from training.config import TrainingConfig
from training.patch_selection import PatchSelector, step_seed


def selector(model: MaskCLIPModel, num_steps: int = 10, **options) -> PatchSelector:
    config = TrainingConfig(**options)
    return PatchSelector(model.vision_model, config, config.timeline(1, num_steps), Accelerator(cpu=True))


def test_a_mask_can_be_replayed_from_seed_step_and_process(make_model, inputs):
    cases = list(itertools.product((-1, 0, 1), (1, 2, 17, 10**6), range(8), range(3), range(2)))
    seeds = [step_seed(*case) for case in cases]
    assert max(*seeds, step_seed(10**12, 10**7, 0)) < 2**63
    # A CPU's generator reads the lower 32 bits of a seed alone: it is what is drawn that has to differ.
    drawn = {tuple(torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()) for seed in seeds}
    assert len(drawn) == len(cases) == 3 * 4 * 8 * 3 * 2
    model, images = make_model("random"), inputs["pixel_values"]
    first = [selector(model).select(images, step).indices for step in (1, 2, 3)]
    torch.manual_seed(99)  # PyTorch's own generator has no part in it
    assert torch.equal(selector(model).select(images, 2).indices, first[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    assert not torch.equal(selector(model, seed=1).select(images, 2).indices, first[1])


def test_the_ratio_grows_from_nothing_and_the_last_steps_see_whole_images(make_model, inputs):
    patches = selector(make_model("random"), mask_schedule=0.4, unmasked_tuning_steps=2)
    kept = [s and s.indices.shape[1] for s in (patches.select(inputs["pixel_values"], step) for step in range(1, 11))]
    assert kept == [16, 14, 12, 10, 8, 8, 8, 8, None, None]
    assert selector(make_model("none")).select(inputs["pixel_values"], 1) is None


def test_progress_reaches_the_mask_as_the_share_of_steps_done(make_model, inputs, monkeypatch):
    model, seen = make_model("random"), []
    original = model.vision_model.select_patches
    monkeypatch.setattr(model.vision_model, "select_patches", lambda *a, **k: seen.append(k["progress"]) or original(*a, **k))
    patches = selector(model)
    for step in (1, 6, 10):
        patches.select(inputs["pixel_values"], step)
    assert seen == [0.0, 0.5, 0.9]


def test_class_attention_is_the_mean_over_heads_and_layers_of_the_class_tokens_row(make_model, inputs):
    vision = make_model("attentive").eval().vision_model
    vision.set_attn_implementation("eager")
    attentions = vision(inputs["pixel_values"], output_attentions=True).attentions  # (B, H, 1 + L, 1 + L) of each layer
    expected = torch.stack([a[:, :, 0, 1:] for a in attentions]).mean(dim=(0, 2))
    hooks = [len(layer.self_attn._forward_hooks) for layer in vision.encoder.layers]
    scores = class_attention(vision, inputs["pixel_values"])
    assert len(attentions) == 2
    assert scores.std() > 0
    torch.testing.assert_close(scores, expected)
    assert [len(layer.self_attn._forward_hooks) for layer in vision.encoder.layers] == hooks


def test_a_teacher_without_attention_weights_is_refused(make_model, inputs):
    vision = make_model("attentive").eval().vision_model
    vision.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="set_attn_implementation"):
        class_attention(vision, inputs["pixel_values"])


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
def test_a_teacher_at_half_resolution_gives_a_score_to_each_patch_of_any_grid(size, make_model):
    vision = make_model("attentive").eval().vision_model
    vision.set_attn_implementation("eager")
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    scores = class_attention(vision, images, image_size=16)
    assert scores.shape == (2, size[0] * size[1] // 64)
    small = torch.nn.functional.interpolate(images, (16, 16), mode="bicubic", antialias=True)
    coarse = class_attention(vision, small).view(2, 1, 2, 2)
    expected = torch.nn.functional.interpolate(coarse, (size[0] // 8, size[1] // 8), mode="bilinear")
    torch.testing.assert_close(scores, expected.flatten(1))


def test_the_teacher_is_an_exponential_moving_average_with_a_momentum_that_grows_to_one(make_model):
    vision = make_model({"name": "attentive", "momentum": 0.9}).vision_model
    teacher = AttentionTeacher(vision, [vision.patch_mask])
    expected = {name: p.detach().clone() for name, p in vision.named_parameters()}
    for step in (1, 2, 3, 4):
        with torch.no_grad():
            for parameter in vision.parameters():
                parameter.add_(torch.randn_like(parameter))
        progress = step / 4
        teacher.update(vision, progress)
        momentum = 1 - 0.1 * (1 + math.cos(math.pi * progress)) / 2
        assert teacher.momentum(progress) == pytest.approx(momentum)
        for name, parameter in vision.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * parameter.detach()
    average = dict(teacher.average.module.named_parameters())
    assert average.keys() == expected.keys()
    assert not any(p.requires_grad for p in average.values())
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value)
    assert not teacher.average.training
    assert vision.training


def test_attentive_steps_use_the_teacher_not_the_student(make_model, inputs):
    model = make_model("attentive")
    patches = selector(model)
    before = patches.select(inputs["pixel_values"], 5).indices
    with torch.no_grad():
        for parameter in model.vision_model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(patches.select(inputs["pixel_values"], 5).indices, before)
    patches.schedule.teacher.mask = SimpleNamespace(
        momentum=0.0, teacher_image_size=0
    )  # the average takes the student's weights
    patches.schedule.after_step(1)
    patches.schedule.after_step(1)
    assert not torch.equal(patches.select(inputs["pixel_values"], 5).indices, before)
