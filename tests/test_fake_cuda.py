"""Proves on a GPU that is not there: a forward pass of every family under every mask mixes no devices, and waits for nothing
but the one size of packed tokens; a step of training waits for its numbers once more. And that what breaks this is found."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import fake_cuda, move_to_fake_cuda, on_fake_cuda, on_host
from families import BY_TYPE, make_inputs, make_plain
from helpers import IMAGE_SIZE
from transformers.masking_utils import create_bidirectional_mask

from hf_maskclip import PatchSelection, add_patch_mask, register_patch_mask
from hf_maskclip.models import attention, packed_attention
from hf_maskclip.models.patch_mask_registry import BUILT_IN
from hf_maskclip.models.patch_masking import keep_first, patch_grid
from hf_maskclip.models.patch_masking_random import RandomPatchMask
from training.config import TrainingConfig
from training.data.batches import Batch
from training.data.windows import Place
from training.loop import training_step
from training.model.loss import prepare_loss
from training.patch_selection import PatchSelector
from training.run import Run
from training.stopping import NumbersOnHost

MASKS = {name: {"name": name} for name in BUILT_IN}
VARIANTS = {
    "attentive by blocks": {"name": "attentive", "merge": 2},
    "cluster by a threshold": {"name": "cluster", "similarity_threshold": 0.5},
    "cluster with a ceiling": {"name": "cluster", "max_mask_ratio": 0.7},
    "pgs at 0.5": {"name": "pgs", "min_mask_ratio": 0.5},
    "pgs by embeddings": {"name": "pgs", "embedding_weight": "progress", "edge_temperature": 0.5},
    "pgs without edges": {"name": "pgs", "edges": "none", "transport": False},
}
THE_SIZE = "positions = is_token.flatten().nonzero()[:, 0]"


@pytest.fixture(autouse=True)
def a_gpu_with_flash_kernels(monkeypatch):
    monkeypatch.setattr(attention, "_has_flash_kernels", lambda device: True)
    # Transformers looks at NaFlex's grids, and waits for that.
    monkeypatch.setattr("transformers.models.siglip2.modeling_siglip2.torch_compilable_check", lambda *_: None)


@pytest.fixture(autouse=True)
def no_look_at_what_is_no_fake(monkeypatch):
    """Transformers looks whether a mask leaves out anything, and so waits, but does not where a tensor is fake."""

    def without_looking(*args, allow_is_bidirectional_skip=True):
        assert not allow_is_bidirectional_skip
        return create_bidirectional_mask(*args)

    monkeypatch.setattr(packed_attention, "create_bidirectional_mask", without_looking)


def encode(name: str, patch_mask, half_precision: bool):
    """A training pass of a family's dual encoder on a GPU: its outputs, and what it waits for."""
    model, inputs = add_patch_mask(make_plain(name), patch_mask).train(), make_inputs(name)
    model.set_attn_implementation("fastest")
    grids = inputs.pop("spatial_shapes", None)
    with fake_cuda(half_precision) as notes:
        move_to_fake_cuda(model)
        given = {key: on_fake_cuda(tensor) for key, tensor in inputs.items()}
        if grids is not None:
            given["spatial_shapes"] = on_host(grids)  # where they are read
        if model.patch_mask.needs_patch_scores:
            given["patch_scores"] = torch.rand(3, 16, device="cuda")
        outputs = model(**given, return_loss=True)
    assert outputs.loss.device.type == "cuda"
    # Of what NaFlex's own code copies, none of ours is told.
    notes[:] = [line for line in notes if "resize_positional_embeddings" not in line and "super().forward" not in line]
    return outputs, notes


CASES = [(name, mask, True) for name in BY_TYPE for mask in MASKS]
CASES += [(name, mask, True) for name in ("clip", "siglip2") for mask in VARIANTS]
# In float32 attention is padded, which matters to masks of different lengths.
CASES += [(name, mask, False) for name in BY_TYPE for mask in ("none", "cluster")]


@pytest.mark.parametrize("name, mask, half_precision", CASES)
def test_a_pass_mixes_no_devices_and_waits_for_the_one_size(name, mask, half_precision):
    outputs, notes = encode(name, (MASKS | VARIANTS)[mask], half_precision)
    is_packed = outputs.patch_selection is not None and outputs.patch_selection.lengths is not None
    assert notes == [THE_SIZE] * is_packed
    assert is_packed == (
        mask != "none" if name == "siglip2" else "cluster" in mask or mask.startswith("pgs") and "0.5" not in mask
    )
    takes_kernel = any("_varlen_attn" in operation for operation in notes.operations)
    assert takes_kernel == (is_packed and half_precision)


class WithHostTensor(RandomPatchMask):
    """Adds noise of the host."""

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
        rows, columns = patch_grid(pixel_values, self.patch_size)
        scores = pixel_values.new_zeros(len(pixel_values), rows * columns) + torch.rand(len(pixel_values), rows * columns)
        return keep_first(scores.argsort(dim=1), 4)


class WithItem(RandomPatchMask):
    """Looks at a number of the GPU."""

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
        count = 4 if pixel_values.mean().item() > 0 else 5
        return PatchSelection(torch.arange(count, device=pixel_values.device).expand(len(pixel_values), -1))


class WithHostNumbers(RandomPatchMask):
    """Sends numbers of the host."""

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
        kept = torch.tensor([0, 3, 5], device=pixel_values.device)
        return PatchSelection(kept.expand(len(pixel_values), -1))


class WithCopies(RandomPatchMask):
    """Lets the host choose."""

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
        scores = pixel_values.mean(dim=1).flatten(1)[:, :16].cpu()
        return PatchSelection(scores.argsort(dim=1)[:, :4].sort(dim=1).values.to(pixel_values.device))


class WithMaskAsIndex(RandomPatchMask):
    """Takes as many numbers as a mask says."""

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
        pixel_values[pixel_values > 0].mean()
        return super().forward(pixel_values, generator=generator)


FAULTS = {
    "a tensor on the host": (WithHostTensor, "two devices, cuda:0 and cpu"),
    "a number that is looked at": (WithItem, "_local_scalar_dense"),
    "numbers of the host": (WithHostNumbers, ["kept = torch.tensor([0, 3, 5], device=pixel_values.device)"]),
    "copies": (
        WithCopies,
        [
            "scores = pixel_values.mean(dim=1).flatten(1)[:, :16].cpu()",
            "return PatchSelection(scores.argsort(dim=1)[:, :4].sort(dim=1).values.to(pixel_values.device))",
        ],
    ),
    "a mask as index": (WithMaskAsIndex, ["pixel_values[pixel_values > 0].mean()"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_mixes_devices_or_waits_is_found(fault):
    mask_class, found = FAULTS[fault]
    register_patch_mask("faulty", mask_class)
    if isinstance(found, str):
        with pytest.raises(Exception, match=found):
            encode("clip", "faulty", half_precision=False)
    else:
        assert encode("clip", "faulty", half_precision=False)[1] == found


def test_cannys_edges_wait_as_they_say():
    with pytest.raises(Exception, match="_local_scalar_dense"):
        encode("clip", {"name": "pgs", "edges": "canny"}, half_precision=False)


STEPS = [("random", "one"), ("random", "two"), ("random", "crops"), ("cluster", "two"), ("pgs", "one")]
STEPS += [("pgs", "complementary"), ("attentive", "one"), ("none", "one")]


@pytest.mark.parametrize("mask, views", STEPS)
def test_a_step_of_training_waits_for_its_numbers_and_the_one_size(mask, views, make_model, processor, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    monkeypatch.setattr(NumbersOnHost, "read", lambda numbers: notes.append("read") or [1.0] * len(numbers.copy))
    model, config = make_model(mask).train(), TrainingConfig(batch_size=4, views=views)
    timeline = config.timeline(1, 10)
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=0, autocast=nullcontext)
    accelerator.register_for_checkpointing = lambda average: None
    patches = PatchSelector(model.vision_model, config, timeline, accelerator)  # its generator is the host's
    patches.compares_views = False  # the first step looks at them
    accelerator.device, accelerator.reduce = torch.device("cuda"), lambda tensor, reduction: tensor
    accelerator.backward = lambda loss: notes.append("backward")
    loss, parallel = prepare_loss("auto", model, is_fresh=False), SimpleNamespace(wrapped_model=model)
    learner = SimpleNamespace(model=model, processor=processor, patches=patches, loss=loss, parallel=parallel)
    learner.train_mode, learner.update = model.train, lambda: notes.append("update")
    run = Run(config, accelerator, timeline, None, {}, SimpleNamespace(), learner)
    with fake_cuda(half_precision=True) as notes:
        move_to_fake_cuda(model)
        if patches.schedule.teacher is not None:
            move_to_fake_cuda(patches.schedule.teacher.average)
        pixels = torch.empty(8 if views == "crops" else 4, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        texts = {"input_ids": torch.empty(4, 16, dtype=torch.long)}
        batch = Batch(pixels, texts, ["a", "b", "c", "d"], Counter(), Counter(), 0, (Place(),), (Place(),))
        training_step(run, batch, step=5)
    is_packed = mask in ("cluster", "pgs")
    assert notes == [THE_SIZE] * is_packed + ["backward", "read", "update"]
