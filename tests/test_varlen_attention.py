"""Proves that packed tokens go to PyTorch's kernel for different lengths where it runs, and nowhere else.

And that outputs and gradients are those of padded attention, for every family, class and mask, where the kernel is replaced by
its definition: it runs on CUDA only.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from families import BY_TYPE, make_images, make_plain
from helpers import IMAGE_SIZE, photo_like
from model_classes import ALL_CLASSES, as_class, vision_of
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig

from hf_maskclip import (
    MaskCLIPForImageClassification,
    MaskCLIPModel,
    MaskCLIPVisionModel,
    PatchSelection,
    add_patch_mask,
)
from hf_maskclip.models import attention
from hf_maskclip.models.patch_mask_registry import BUILT_IN

MASKS = [name for name in BUILT_IN if name != "none"]
# Masks under which images of one size keep different numbers of patches. Of NaFlex's images all masks keep different ones.
DIFFERENT = {
    "cluster": {"name": "cluster", "min_mask_ratio": 0.1},
    "pgs": {"name": "pgs", "min_mask_ratio": 0.1, "max_mask_ratio": 0.8, "candidate_ratio": 0.2, "similarity_threshold": 0.2},
}


@pytest.fixture
def kernel_calls(monkeypatch) -> list[tuple]:
    """Lets the default attention give packed tokens to the definition of the kernel; what that was called with."""
    calls = []

    def by_definition(query, key, value, ends, key_ends, longest, longest_key):
        """softmax(query key^T / sqrt(E)) value of each sequence by itself, for (T, H, E)."""
        assert query.shape == key.shape == value.shape
        assert ends.dtype == torch.int32
        assert ends[0] == 0
        assert ends[-1] == len(query)
        assert ends is key_ends
        assert longest == longest_key >= int(ends.diff().max())
        calls.append((tuple(query.shape), ends.tolist(), longest))
        parts = []
        for first, last in pairwise(ends.tolist()):
            q, k, v = (heads[first:last].transpose(0, 1) for heads in (query, key, value))  # (H, S, E)
            parts.append(((q @ k.transpose(1, 2) / query.shape[2] ** 0.5).softmax(dim=-1) @ v).transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(attention, "varlen_attn", by_definition)
    monkeypatch.setattr(attention, "_varlen_kernel_takes", lambda config, states: True)
    return calls


def check_same(model: torch.nn.Module, encode: Callable[[], torch.Tensor], lengths: list[int], calls: list[tuple]) -> None:
    """By the kernel and padded, a model gives the same output and the same gradients."""
    assert len(set(lengths)) > 1
    found = []
    for name in ("sdpa", "fastest"):
        calls.clear()
        model.set_attn_implementation(name)
        output = encode()
        assert bool(calls) == (name == "fastest")
        direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        (output.sin() * direction).sum().backward()
        found.append([output.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)])
        model.zero_grad()
    ends = torch.tensor([0, *lengths]).cumsum(dim=0).tolist()
    assert all(call[1] == ends and call[0][0] == sum(lengths) for call in calls)
    assert len(calls) == 2  # a layer each
    assert len(found[0]) == len(found[1]) > 20
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-12 + 1e-9 * float(padded.abs().max()))


CASES = [(name, mask) for name in BY_TYPE for mask in (MASKS if name == "siglip2" else DIFFERENT)]


@pytest.mark.parametrize("name, mask", CASES)
def test_the_kernel_of_every_family_gives_what_padded_attention_gives(name, mask, kernel_calls):
    model = add_patch_mask(make_plain(name), DIFFERENT.get(mask, mask)).double().train()
    images = {key: value.double() if value.is_floating_point() else value for key, value in make_images(name).items()}
    if name != "siglip2":
        images["pixel_values"] = photo_like(3, 32, 32).double()  # on which images' lengths differ
    given = {"patch_scores": torch.rand(3, 16)} if BUILT_IN[mask].needs_patch_scores else {}
    options = {"generator": torch.Generator().manual_seed(1), "apply_patch_mask": True}
    selection = model(**images, input_ids=torch.ones(3, 4).long(), **given, **options).patch_selection
    lengths = (selection.lengths + model.vision_model.num_prefix_tokens).tolist()
    check_same(
        model.vision_model, lambda: model.get_image_features(**images, patch_selection=selection)[1], lengths, kernel_calls
    )


@pytest.mark.parametrize("cls", ALL_CLASSES)
def test_the_kernel_in_every_class_gives_what_padded_attention_gives(cls, make_model, kernel_calls, inputs):
    model = as_class(make_model(DIFFERENT["pgs"]), cls).double().train()
    pixel_values = photo_like(4, IMAGE_SIZE, IMAGE_SIZE).double()
    selection = vision_of(model).select_patches(pixel_values, generator=torch.Generator().manual_seed(0))
    arguments = {"pixel_values": pixel_values, "patch_selection": selection}
    if cls is MaskCLIPModel:
        arguments |= {"input_ids": inputs["input_ids"]}
    field = {MaskCLIPVisionModel: "pooler_output", MaskCLIPForImageClassification: "logits"}.get(cls, "image_embeds")
    check_same(model, lambda: model(**arguments)[field], (selection.lengths + 1).tolist(), kernel_calls)


def test_gradient_checkpointing_and_whole_images_are_as_without_the_kernel(make_model, kernel_calls, inputs):
    model = make_model("none").vision_model.train()
    whole = model(inputs["pixel_values"]).pooler_output
    every = PatchSelection(torch.arange(16).expand(4, -1))
    assert torch.equal(model(inputs["pixel_values"], patch_selection=every).pooler_output, whole)
    assert not kernel_calls  # one length: nothing is packed
    selection = PatchSelection(torch.tensor([[0, 5, 9], [3, 3, 3], [1, 2, 1], [4, 6, 8]]), torch.tensor([3, 1, 2, 3]))
    found = []
    for _ in range(2):
        model(inputs["pixel_values"], patch_selection=selection).pooler_output.sin().sum().backward()
        found.append([weight.grad for weight in model.parameters()])
        model.zero_grad()
        model.gradient_checkpointing_enable()
    assert len(kernel_calls) == 2 + 4  # the checkpointed pass is made again
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# What is asked for, and whether packed tokens go to a kernel: changes of a case in which they do.
DECISIONS = {
    "the default on a GPU in bf16": ({}, True),
    "in fp16": ({"dtype": torch.float16}, True),
    "in float32": ({"dtype": torch.float32}, False),
    "in float32 under autocast": ({"dtype": torch.float32, "autocast": True}, True),
    "heads of 20": ({"hidden_size": 40}, False),
    "heads of 264": ({"hidden_size": 528}, False),
    "dropout in the attention": ({"attention_dropout": 0.1}, False),
    "on a CPU": ({"device": "cpu"}, False),
    "an older GPU": ({"capability": (7, 5)}, False),
    "PyTorch built without": ({"built": False}, False),
    "PyTorch of before 2.10": ({"kernel": None}, False),
    "sdpa by name": ({"name": "sdpa"}, False),
    "eager by name": ({"name": "eager"}, False),
    "flash by name": ({"name": "flash_attention_2"}, True),
    "flash by name, on an older GPU": ({"name": "flash_attention_2", "capability": (7, 5)}, True),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_packed_tokens_go_to_the_kernel_where_it_runs_and_nowhere_else(case, monkeypatch):
    changes, expected = DECISIONS[case]
    given = {"device": "cuda", "dtype": torch.bfloat16, "autocast": False, "name": "fastest", "capability": (9, 0)}
    given |= {"built": True, "kernel": print, "hidden_size": 32, "attention_dropout": 0.0} | changes
    monkeypatch.setattr(attention, "varlen_attn", given["kernel"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: given["built"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: given["capability"])
    sizes = {key: given[key] for key in ("hidden_size", "attention_dropout")}
    config = CLIPVisionConfig(**sizes, num_attention_heads=2)
    config._attn_implementation = given["name"]
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: given["autocast"])
    with FakeTensorMode():
        states = torch.empty(2, 3, config.hidden_size, dtype=given["dtype"], device=given["device"])
        assert attention.takes_packed_tokens(config, states) is expected
