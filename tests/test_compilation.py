"""Proves that with `--compile` lengths that differ from step to step are of one graph for each tower, and change no result."""

import pytest
import torch
from families import BY_TYPE, make_plain
from helpers import photo_like

from hf_maskclip import add_patch_mask
from hf_maskclip.models import attention
from training.model.compilation import compile_encoders

PGS = {"name": "pgs", "min_mask_ratio": 0.1, "max_mask_ratio": 0.8, "candidate_ratio": 0.2, "similarity_threshold": 0.2}


def batch(name: str, step: int) -> dict[str, torch.Tensor]:
    """Six pairs, whose captions and visible patches differ in length from step to step."""
    generator = torch.Generator().manual_seed(step)
    length = 64 if BY_TYPE[name].pads_texts else 8 * (1 + step % 7)
    input_ids = torch.randint(4, 50, (6, length), generator=generator)
    if name == "clip":
        input_ids[:, -1] = 2
    inputs = {"pixel_values": photo_like(6, 32, 32, seed=step), "input_ids": input_ids}
    if BY_TYPE[name].needs_attention_mask:
        inputs["attention_mask"] = (torch.arange(length) < torch.tensor([length, 4, 5, 6, 7, 8])[:, None]).long()
    return inputs


def train(model, name: str, num_steps: int) -> tuple[list[torch.Tensor], set[int], set[int]]:
    """Losses of steps whose weights stay as they are, and the numbers of packed and of caption tokens that there were."""
    losses, packed, captions = [], set(), set()
    for step in range(num_steps):
        torch.manual_seed(step)  # of the mask, and of the text tower's dropout
        inputs = batch(name, step)
        outputs = model(**inputs, return_loss=True)
        outputs.loss.backward()
        losses.append(outputs.loss.detach())
        packed.add(int(outputs.patch_selection.lengths.sum()))
        captions.add(inputs["input_ids"].shape[1])
    return losses, packed, captions


@pytest.mark.slow
@pytest.mark.parametrize("by_kernel", [False, True], ids=["padded", "kernel"])
@pytest.mark.parametrize("name", ["clip", "altclip", "siglip"])
def test_fifty_steps_of_different_lengths_are_two_compilations(name, by_kernel, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", lambda query, key, value, *_: query + key + value)  # as good as another
    monkeypatch.setattr(attention, "_varlen_kernel_takes", lambda config, states: by_kernel)
    model = add_patch_mask(make_plain(name), PGS).train()
    model.set_attn_implementation("fastest")
    keys, expected = list(model.state_dict()), train(model, name, 3)[0]
    graphs = []
    torch._dynamo.reset()
    compile_encoders(model, backend=lambda graph, inputs: graphs.append(graph) or graph)  # captures graphs, and runs them
    losses, packed, captions = train(model, name, 50)
    assert len(packed) > 10
    assert len(captions) == (1 if BY_TYPE[name].pads_texts else 7)
    assert len(graphs) == 2
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(losses[:3], expected)
