"""Proves that packed tokens are the real tokens and no others, and that packing changes neither outputs nor gradients, with any
attention implementation, with gradient checkpointing, and in half precision."""

import pytest
import torch
from helpers import IMAGE_SIZE, PATCH_SIZE, photo_like
from torch import nn

from hf_maskclip import PatchSelection, build_patch_mask
from hf_maskclip.models.attention import fastest_attention
from hf_maskclip.models.packed_attention import Packing

# Rows keep 4, 1, 2 and 3 of 16 patches.
SELECTION = PatchSelection(torch.tensor([[0, 5, 9, 15], [3, 3, 3, 3], [1, 2, 1, 1], [4, 6, 8, 4]]), torch.tensor([4, 1, 2, 3]))
IS_TOKEN = nn.functional.pad(SELECTION.valid(), (1, 0), value=True)


def test_packing_keeps_the_real_tokens_in_order_and_unpacks_them_with_zeros():
    padded = torch.arange(4 * 5 * 2.0).view(4, 5, 2) + 1
    packing = Packing.of(IS_TOKEN)
    packed = packing.pack(padded)
    assert torch.equal(packed, padded[IS_TOKEN])
    assert len(packed) == 14
    assert packing.lengths.tolist() == [5, 2, 3, 4]
    assert packing.starts.tolist() == [0, 5, 7, 10]
    assert torch.equal(packing.unpack(packed), padded * IS_TOKEN[..., None])


def test_packing_and_unpacking_have_the_gradients_of_their_definitions():
    packing = Packing.of(IS_TOKEN)
    padded = torch.randn(4, 5, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(14, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pack, padded)
    assert torch.autograd.gradcheck(packing.unpack, packed)


def encode_and_gradients(model, pixel_values, selection) -> list[torch.Tensor]:
    output = model(pixel_values, patch_selection=selection).pooler_output
    weights = torch.linspace(0, 1, output.numel(), device=output.device).view_as(output)
    gradients = torch.autograd.grad((output * weights).sum(), list(model.parameters()))
    return [output.detach(), *gradients]


def selection_of(name: str, pixel_values) -> PatchSelection:
    """Of a mask under which images keep different numbers of patches, or the one above."""
    if name == "by hand":
        return PatchSelection(tensor.to(pixel_values.device) for tensor in SELECTION)
    pgs = {"max_mask_ratio": 0.8, "candidate_ratio": 0.2, "similarity_threshold": 0.2}
    mask = build_patch_mask(name, patch_size=PATCH_SIZE, min_mask_ratio=0.1, **(pgs if name == "pgs" else {}))
    return mask(pixel_values, generator=torch.Generator(pixel_values.device).manual_seed(0))


def one_by_one(model, pixel_values, selection) -> list[torch.Tensor]:
    """Outputs and summed gradients of the four images run alone, each with its own number of patches and no padding."""
    outputs, total = [], None
    weights = torch.linspace(0, 1, 4 * 32, device=pixel_values.device).view(4, 1, 32)
    for image, indices, length, weight in zip(pixel_values, *selection, weights, strict=True):
        output = model(image[None], patch_selection=PatchSelection(indices[None, :length])).pooler_output
        gradients = torch.autograd.grad((output * weight).sum(), list(model.parameters()))
        total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
        outputs.append(output.detach())
    return [torch.cat(outputs), *total]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["fastest", "sdpa", "eager"])
@pytest.mark.parametrize("mask", ["by hand", "cluster", "pgs"])
def test_packed_outputs_and_gradients_are_those_of_each_image_alone(mask, attention, checkpointing, make_model, device):
    model, pixel_values = make_model("none").vision_model.train().to(device), photo_like(4, IMAGE_SIZE, IMAGE_SIZE).to(device)
    selection = selection_of(mask, pixel_values)
    assert len(set(selection.lengths.tolist())) > 1
    model.set_attn_implementation(attention)
    expected = one_by_one(model, pixel_values, selection)
    if checkpointing:
        model.gradient_checkpointing_enable()
        assert any(layer.gradient_checkpointing for layer in model.encoder.layers)
    packed = encode_and_gradients(model, pixel_values, selection)
    assert all(gradient.abs().max() > 0 for gradient in packed)
    for ours, alone in zip(packed, expected, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6 if device == "cpu" else 1e-5)


def test_linear_layers_see_the_visible_tokens_and_no_padding(make_model, inputs):
    model, seen = make_model("none").vision_model.train(), []
    for layer in model.encoder.layers:
        layer.mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    model(inputs["pixel_values"], patch_selection=SELECTION)
    assert set(seen) == {(1, 14, 64), (1, 14, 32)}


def test_flash_attention_gets_the_lengths_of_the_sequences(make_model, inputs, monkeypatch):
    """The kernel itself runs on CUDA only: here, what it is called with is looked at."""
    model = make_model("none").vision_model.train()
    calls = []

    def kernel(module, query, key, value, attention_mask, **kwargs):
        calls.append((tuple(query.shape), attention_mask, kwargs))
        return query.transpose(1, 2), None

    monkeypatch.setattr("hf_maskclip.models.attention.is_flash_attention_requested", lambda config: True)
    monkeypatch.setattr("transformers.models.clip.modeling_clip.ALL_ATTENTION_FUNCTIONS.get_interface", lambda *_: kernel)
    model(inputs["pixel_values"], patch_selection=SELECTION)
    shape, attention_mask, lengths = calls[0]
    assert shape == (1, 2, 14, 16)
    assert attention_mask is None
    assert len(calls) == 2
    assert lengths["cu_seq_lens_q"].tolist() == lengths["cu_seq_lens_k"].tolist() == [0, 5, 7, 10, 14]
    assert lengths["max_length_q"] == lengths["max_length_k"] == 5


@pytest.mark.parametrize("case", ["whole", "masked", "causal"])
def test_the_half_precision_attention_of_a_cpu_is_sdpas(case):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 6, 8, generator=generator).bfloat16() for _ in range(3))
    mask = None
    if case == "masked":
        mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
        mask[1, :, :, 4:] = False
    module = nn.Module()
    module.is_causal = case == "causal"
    arguments = dict(attention_mask=mask, scaling=0.3)
    query.requires_grad_()
    ours, _ = fastest_attention(module.train(), query, key, value, **arguments)
    expected, _ = fastest_attention(module.eval(), query, key, value, **arguments)
    assert type(ours.grad_fn).__name__ != type(expected.grad_fn).__name__  # two ways indeed
    assert ours.shape == expected.shape == (2, 6, 3, 8)
    torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("patch_mask", ["none", "random"])
def test_fixed_counts_compile_without_a_graph_break(patch_mask, make_model, inputs):
    vision = make_model(patch_mask).vision_model.train()
    selection = None if patch_mask == "none" else vision.select_patches(inputs["pixel_values"])
    tokens = vision.embeddings(inputs["pixel_values"])
    if selection is not None:
        tokens = vision.embeddings(inputs["pixel_values"], patch_selection=selection)
    compiled = torch.compile(vision.encoder, fullgraph=True, backend="aot_eager")
    expected = vision.encoder(inputs_embeds=tokens, attention_mask=None).last_hidden_state
    torch.testing.assert_close(compiled(inputs_embeds=tokens, attention_mask=None).last_hidden_state, expected)
    embed = torch.compile(vision.embeddings, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(embed(inputs["pixel_values"], patch_selection=selection), tokens)


def test_captions_are_trimmed_in_training_exactly(make_model, make_clip, inputs, tokenizer):
    longest = tokenizer(["a red ball on grass", "two blue fish"], padding="max_length", max_length=32, return_tensors="pt")
    input_ids = longest["input_ids"]
    model, seen = make_model("none").train(), []
    model.text_model.embeddings.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    pixels = inputs["pixel_values"][:2]
    expected = make_clip().train()(input_ids=input_ids, pixel_values=pixels)
    for mask in (None, longest["attention_mask"]):
        output = model(input_ids=input_ids, pixel_values=pixels, attention_mask=mask)
        torch.testing.assert_close(output.text_embeds, expected.text_embeds)
    assert seen == [8, 8]
    assert input_ids.shape[1] == 32
    model.eval()(input_ids=input_ids, pixel_values=pixels)
    assert seen[-1] == 32  # evaluation is CLIP's, with its shapes


def test_captions_of_old_configurations_are_cut_where_clip_pools_them(make_model, make_clip, inputs):
    """Before Transformers 4.31 the end token of a configuration was 2; CLIP then pools at the largest id."""
    input_ids = torch.full((2, 32), 0)
    input_ids[0, :12] = torch.tensor([5, 2, *range(10, 19), 90])
    input_ids[1, :3] = torch.tensor([5, 2, 90])
    model, clip, seen = make_model("none").train(), make_clip().train(), []
    for tower in (model.text_model, clip.text_model):
        tower.config.eos_token_id = tower.eos_token_id = 2
    model.text_model.embeddings.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    outputs = [m(input_ids=input_ids, pixel_values=inputs["pixel_values"][:2]).text_embeds for m in (model, clip)]
    assert seen == [16]
    torch.testing.assert_close(*outputs)


def test_half_precision_evaluation_is_clips_with_gradients_too(make_model, make_clip, inputs):
    model, clip = make_model("pgs").bfloat16().eval(), make_clip().bfloat16().eval()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert torch.equal(model(**inputs).logits_per_image, clip(**inputs).logits_per_image)


@pytest.mark.parametrize("patch_mask", ["none", "random", "pgs"])
def test_training_under_autocast_keeps_states_in_half_precision_and_the_loss(patch_mask, make_model, inputs):
    """Norms and sums between the matrix products then write half the bytes; evaluation and float32 stay CLIP's."""
    model, seen = make_model(patch_mask).train(), []
    model.vision_model.encoder.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    selection = model.vision_model.select_patches(inputs["pixel_values"]) if patch_mask != "none" else None
    losses = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(**inputs, patch_selection=selection, return_loss=True).loss.float())
    with torch.autocast("cpu", torch.bfloat16):
        model.eval()(**inputs)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    losses[0].backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.grad is not None)
