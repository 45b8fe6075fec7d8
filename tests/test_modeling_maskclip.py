"""Proves that the models are CLIP where nothing is masked, and encode only what is visible where something is."""

import pytest
import torch
from helpers import photo_like
from model_classes import ALL_CLASSES, VISION_CLASSES, as_class
from torch import nn

from hf_maskclip import (
    MaskCLIPForImageClassification,
    MaskCLIPModel,
    MaskCLIPVisionModel,
    PatchSelection,
)
from hf_maskclip.models.patch_mask_registry import patch_masks

MASKS = ["random", "cluster", "pgs", {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}]


# ---- Not masked: CLIP -------------------------------------------------------------------------------------------------


def test_one_seed_gives_the_weights_and_the_keys_of_clip(make_clip, make_model):
    clip, model = make_clip(seed=3).state_dict(), make_model(seed=3).state_dict()
    assert list(clip) == list(model)
    assert all(torch.equal(clip[key], model[key]) for key in clip)


def test_evaluation_output_is_exactly_that_of_clip(make_clip, make_model, inputs, device):
    clip, model = make_clip().eval().to(device), make_model("pgs").eval().to(device)
    inputs = {key: tensor.to(device) for key, tensor in inputs.items()}
    with torch.no_grad():
        expected, output = clip(**inputs, return_loss=True), model(**inputs, return_loss=True)
    for name in ("loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        assert torch.equal(expected[name], output[name]), name
    assert output.patch_selection is None


@pytest.mark.parametrize("cls", VISION_CLASSES)
def test_evaluation_output_of_the_vision_classes_is_exactly_that_of_clip(cls, make_model, inputs):
    model = as_class(make_model(), cls).eval()
    peer = VISION_CLASSES[cls](model.config)
    peer.load_state_dict(model.state_dict())
    with torch.no_grad():
        output, expected = model(inputs["pixel_values"]), peer.eval()(inputs["pixel_values"])
    assert all(torch.equal(expected[key], output[key]) for key in expected)


@pytest.mark.parametrize("patch_mask", ["none", {"name": "random", "mask_ratio": 0}])
def test_training_output_without_masked_patches_is_exactly_that_of_clip(patch_mask, make_clip, make_model, inputs):
    model = make_model(patch_mask).train()
    with torch.enable_grad():
        assert torch.equal(model(**inputs).logits_per_image, make_clip().train()(**inputs).logits_per_image)


# ---- Masked -----------------------------------------------------------------------------------------------------------


def one_by_one(model: MaskCLIPVisionModel, pixel_values, selection: PatchSelection) -> torch.Tensor:
    """Pooled outputs (B, D): each image alone, its dropped patches really not there."""
    pooled = []
    for image, patches in zip(pixel_values, selection.visible(16), strict=True):
        tokens = model.embeddings(image[None])  # (1, 1 + L, D)
        tokens = tokens[:, nn.functional.pad(patches, (1, 0), value=True)]
        hidden = model.encoder(inputs_embeds=model.pre_layrnorm(tokens)).last_hidden_state
        pooled.append(model.post_layernorm(hidden[:, 0]))
    return torch.cat(pooled)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("patch_mask", MASKS, ids=str)
def test_masked_output_is_that_of_each_image_alone_with_its_visible_patches(patch_mask, attention, make_model, inputs, device):
    model, pixel_values = make_model(patch_mask).vision_model.train().to(device), inputs["pixel_values"].to(device)
    model.set_attn_implementation(attention)
    output = model(pixel_values)
    selection = output.patch_selection
    assert 1 <= selection.indices.shape[1] < 16
    if patch_mask in ("cluster", "pgs"):
        assert selection.lengths is not None
    torch.testing.assert_close(output.pooler_output, one_by_one(model, pixel_values, selection))


def test_lengths_that_differ_give_the_same_output_and_gradient_as_each_image_alone(make_model, inputs):
    selection = PatchSelection(
        torch.tensor([[0, 5, 9, 15], [3, 3, 3, 3], [1, 2, 1, 1], [4, 6, 8, 4]]), torch.tensor([4, 1, 2, 3])
    )
    model = make_model("none").vision_model.train()
    pixel_values = inputs["pixel_values"].requires_grad_()
    gradients = []
    for output in (model(pixel_values, patch_selection=selection).pooler_output, one_by_one(model, pixel_values, selection)):
        weights = torch.linspace(0, 1, output.numel()).view_as(output)
        gradients.append(torch.autograd.grad((output * weights).sum(), [pixel_values, *model.parameters()]))
    assert gradients[0][0].abs().max() > 0
    for padded, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", ALL_CLASSES)
def test_outputs_do_not_depend_on_dropped_pixels(cls, make_model, inputs):
    model = as_class(make_model("pgs"), cls).train()
    selection = PatchSelection(torch.tensor([[0, 5, 9]] * 3 + [[7, 7, 7]]), torch.tensor([3, 3, 3, 1]))
    text = {"input_ids": inputs["input_ids"]} if cls is MaskCLIPModel else {}
    pixels = inputs["pixel_values"]
    dropped = ~selection.visible(16).view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(dropped, torch.full_like(pixels, 50.0), pixels)
    name = {MaskCLIPModel: "image_embeds", MaskCLIPVisionModel: "pooler_output"}.get(cls)
    name = name or ("logits" if cls is MaskCLIPForImageClassification else "image_embeds")
    first, second = (model(pixel_values=p, patch_selection=selection, **text)[name] for p in (pixels, changed))
    assert torch.equal(first, second)
    assert not torch.equal(model(pixel_values=changed, apply_patch_mask=False, **text)[name], first)


def test_the_class_token_attends_to_visible_patches_only(make_model, inputs):
    model = make_model("cluster").vision_model.train()
    model.set_attn_implementation("eager")
    output = model(inputs["pixel_values"], output_attentions=True)
    selection = output.patch_selection
    assert selection.lengths.unique().numel() > 1  # there is padding
    for attention in output.attentions:  # (B, H, 1 + K, 1 + K)
        to_patches = attention[:, :, 0, 1:]
        assert (to_patches[:, 0][~selection.valid()] == 0).all()
        assert (to_patches[:, 0][selection.valid()] > 0).all()
        torch.testing.assert_close(attention[:, :, 0].sum(dim=-1), torch.ones(4, 2))


def test_apply_patch_mask_overrides_the_mode(make_model, inputs):
    model = make_model("random")
    for training in (True, False):
        model.train(training)
        assert model(**inputs, apply_patch_mask=True).patch_selection.indices.shape == (4, 8)
        assert model(**inputs, apply_patch_mask=False).patch_selection is None
    assert model.train()(**inputs).patch_selection is not None
    with pytest.raises(ValueError, match="patch_selection and apply_patch_mask=False: contradict each other"):
        model(**inputs, apply_patch_mask=False, patch_selection=PatchSelection(torch.zeros(4, 1, dtype=torch.long)))


def test_masking_without_gradients_in_training_mode_warns(make_model, inputs, recwarn):
    model = make_model("random")
    with torch.no_grad():
        model.eval()(**inputs)
        model.train()(**inputs, apply_patch_mask=True)
        assert not [w for w in recwarn if "model.eval()" in str(w.message)]
        with pytest.warns(UserWarning, match=r"call model.eval\(\)"):
            model.train()(**inputs)


@pytest.mark.parametrize("patch_mask", [None, "random", "pgs"])
def test_hidden_states_and_attentions_have_the_length_of_what_is_kept(patch_mask, make_model, inputs):
    model = make_model(patch_mask or "none").train()
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    tokens = 1 + (16 if patch_mask is None else output.patch_selection.indices.shape[1])
    vision = output.vision_model_output
    packed = (1, int(output.patch_selection.lengths.sum()) + 4, 32) if patch_mask == "pgs" else (4, tokens, 32)
    assert [tuple(h.shape) for h in vision.hidden_states] == [packed] * 3
    assert vision.last_hidden_state.shape == (4, tokens, 32)
    assert [tuple(a.shape) for a in vision.attentions] == [(4, 2, tokens, tokens)] * 2


def test_another_image_size_and_shape_through_interpolated_positions(make_model):
    model = make_model("pgs").vision_model
    pixel_values = torch.randn(2, 3, 48, 64)
    output = model.train()(pixel_values, interpolate_pos_encoding=True)
    assert output.patch_selection.indices.max() < 48
    assert output.last_hidden_state.shape[1] < 49
    with pytest.raises(ValueError, match="doesn't match model"):
        model(pixel_values)


def test_patch_embeddings_reach_a_mask_that_compares_them(make_model, inputs):
    model = make_model({"name": "pgs", "embedding_weight": "progress"}).vision_model
    pixels = inputs["pixel_values"]
    start, end = (model.select_patches(pixels, progress=p, generator=torch.Generator().manual_seed(0)) for p in (0.0, 1.0))
    assert not torch.equal(start.visible(16), end.visible(16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("patch_mask", MASKS, ids=str)
def test_half_precision_outputs_and_gradients_are_finite(patch_mask, dtype, make_model, inputs, device):
    model = make_model(patch_mask).to(device, dtype).train()
    pixel_values = inputs["pixel_values"].to(device, dtype)
    output = model(input_ids=inputs["input_ids"].to(device), pixel_values=pixel_values, return_loss=True)
    assert output.loss.isfinite()
    assert output.loss.dtype == dtype
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in patch_masks() if name not in ("none", "attentive")])
def test_a_mask_is_the_same_inside_and_outside_of_autocast(name, make_model):
    vision = make_model(name).vision_model
    images = photo_like(8, 32, 32)
    selections = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            selections.append(vision.select_patches(images, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(selections[0].visible(16), selections[1].visible(16))
