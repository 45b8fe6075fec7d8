"""Proves that the losses are those of their papers, that two processes get the loss and the gradients of one with the whole
batch, masks on, and that a batch in chunks has the gradient of the batch in one piece."""

import math
import warnings
from functools import partial

import pytest
import torch
from families import make_plain
from helpers import assert_equal_gradients, gradients_of, photo_like
from processes import in_two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from hf_maskclip import (
    ContrastiveLoss,
    MaskCLIPConfig,
    MaskCLIPModel,
    PatchSelection,
    SigmoidLoss,
    add_patch_mask,
    cached_contrastive_backward,
    losses,
)

LOSSES = {"contrastive": ContrastiveLoss, "sigmoid": SigmoidLoss}
PAIRS = 8


def features(pairs: int = PAIRS, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(nn.functional.normalize(torch.randn(pairs, 6, generator=generator), dim=-1).to(device) for _ in range(2))


def numbers_for(name: str, device: str = "cpu") -> list[torch.Tensor]:
    """What a loss takes besides the features: a scale, and the sigmoid loss a bias."""
    return [torch.tensor(value, device=device) for value in (10.0, -10.0)][: 1 + (name == "sigmoid")]


# ---- Definitions ------------------------------------------------------------------------------------------------------


def test_the_contrastive_loss_is_that_of_clip(device):
    images, texts = features(device=device)
    expected = image_text_contrastive_loss(texts @ images.t() * 10)
    torch.testing.assert_close(ContrastiveLoss()(images, texts, torch.tensor(10.0, device=device)), expected)


def test_the_sigmoid_loss_asks_of_each_pair_alone_whether_it_matches(device):
    images, texts = features(device=device)
    total = 0.0
    for i in range(PAIRS):
        for j in range(PAIRS):
            logit = 10 * (images[i] @ texts[j]).item() - 3
            total += math.log1p(math.exp(-logit if i == j else logit))
    value = SigmoidLoss()(images, texts, torch.tensor(10.0, device=device), torch.tensor(-3.0, device=device))
    torch.testing.assert_close(value.item(), total / PAIRS, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_features_give_a_float32_loss(name, device):
    images, texts = features(device=device)
    loss, numbers = LOSSES[name](), numbers_for(name, device)
    half = loss(images.bfloat16(), texts.bfloat16(), *numbers)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss(images, texts, *numbers).item(), abs=2e-2)


@pytest.mark.parametrize("rows", [1, 3, 8])  # 3 leaves a smaller last piece
@pytest.mark.parametrize("name", LOSSES)
def test_in_pieces_the_loss_and_its_gradients_are_the_same_and_memory_follows_the_piece(name, rows, monkeypatch, device):
    found = []
    for at_once in (2**24, rows * 64):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
        given = [tensor.clone().requires_grad_() for tensor in (*features(64, device), *numbers_for(name, device))]
        saved, made = [], []

        def note(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        with monkeypatch.context() as patch:
            patch.setattr(losses, "checkpoint", lambda *a, made=made, **k: made.append(a) or checkpoint(*a, **k))
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = LOSSES[name]()(*given)
        loss.backward()
        found.append([loss.detach(), *(tensor.grad for tensor in given)])
        kinds = 2 if name == "contrastive" else 1
        assert len(made) == (0 if at_once == 2**24 else kinds * math.ceil(64 / rows))
        assert (max(saved, default=0) >= 64 * 64) == (at_once == 2**24)  # between the passes whole logits are kept, or none
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)


# ---- Two processes and one --------------------------------------------------------------------------------------------


def tiny_model(dropout: float = 0.0) -> MaskCLIPModel:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"attention_dropout": dropout, "projection_dim": 8}
    text = tower | {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49}
    vision = tower | {"image_size": 32, "patch_size": 8, "patch_mask": "cluster"}
    torch.manual_seed(0)
    config = MaskCLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return MaskCLIPModel(config)


def inputs_of(model: nn.Module, first: int = 0, last: int = PAIRS) -> dict:
    """Rows of one batch of pictures, captions, and the patches that a mask chose of the whole batch."""
    generator = torch.Generator().manual_seed(1)
    pixel_values = photo_like(PAIRS, 32, 32)
    input_ids = torch.randint(0, 48, (PAIRS, 8), generator=generator)
    input_ids[:, -1] = 49
    selection = model.vision_model.select_patches(pixel_values, generator=generator)
    assert selection.lengths is not None
    assert selection.lengths.unique().numel() > 1
    part = PatchSelection(selection.indices[first:last], selection.lengths[first:last])
    return {"pixel_values": pixel_values[first:last], "input_ids": input_ids[first:last], "patch_selection": part}


def model_for(name: str) -> nn.Module:
    """A CLIP; for the sigmoid loss a SigLIP, whose bias and scale are such that all pairs count."""
    if name == "contrastive":
        return tiny_model().train()
    model = add_patch_mask(make_plain("siglip"), "cluster").train()
    torch.nn.init.constant_(model.logit_bias, -1.0)
    torch.nn.init.constant_(model.logit_scale, 1.0)
    return model


def loss_of(name: str, model: nn.Module, outputs) -> torch.Tensor:
    bias = [model.logit_bias] if name == "sigmoid" else []
    return LOSSES[name]()(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp(), *bias)


def whole_batch(name: str) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the batch in one piece on one process; of the sigmoid loss by a loop over all pairs."""
    model = model_for(name)
    outputs = model(**inputs_of(model))
    if name == "contrastive":
        value = loss_of(name, model, outputs)
    else:
        value = torch.zeros(())
        for i in range(PAIRS):
            for j in range(PAIRS):
                cosine = (outputs.image_embeds[i] * outputs.text_embeds[j]).sum()
                logit = model.logit_scale.exp()[0] * cosine + model.logit_bias[0]
                value = value + nn.functional.softplus(-logit if i == j else logit) / PAIRS
    value.backward()
    return value.item(), gradients_of(model)


def half_of_the_batch(name: str, chunks: int, rank: int) -> tuple[float, list[torch.Tensor]]:
    """Mean loss of two processes and the gradients that DDP leaves on one of them."""
    model = model_for(name)
    trained = DistributedDataParallel(model)
    half, size = PAIRS // 2, PAIRS // 2 // chunks
    if chunks == 1:
        outputs = trained(**inputs_of(model, rank * half, rank * half + half))
        value = loss_of(name, model, outputs)
        value.backward()
    else:
        starts = range(rank * half, rank * half + half, size)
        parts = [partial(inputs_of, model, start, start + size) for start in starts]
        value = in_chunks(name, trained, model, parts)
    mean = value.detach().clone()
    torch.distributed.all_reduce(mean)
    return mean.item() / 2, gradients_of(model)


def in_chunks(name: str, trained: nn.Module, model: nn.Module, parts: list) -> torch.Tensor:
    bias = model.logit_bias if name == "sigmoid" else None
    return cached_contrastive_backward(trained, model.logit_scale, parts, LOSSES[name](), bias)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_have_the_loss_and_the_gradient_of_one(name, chunks, tmp_path):
    expected, gradients = whole_batch(name)
    for value, given in in_two_processes(partial(half_of_the_batch, name, chunks), tmp_path):
        assert value == pytest.approx(expected, rel=1e-5)
        assert_equal_gradients(given, gradients, rtol=1e-5 if chunks == 1 else 1e-4)


def sharded_half_of_the_batch(rank: int) -> tuple[float, list[torch.Tensor]]:
    """The same with weights that FSDP2 splits over the processes, all but the logit scale, which is a scalar and cannot be."""
    model = tiny_model().train()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*model.vision_model.encoder.layers, *model.text_model.encoder.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
    half = PAIRS // 2
    outputs = model(**inputs_of(model, rank * half, rank * half + half))
    value = ContrastiveLoss()(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp())
    value.backward()
    for number in (model.logit_scale.grad, mean := value.detach().clone()):
        torch.distributed.all_reduce(number)
        number /= 2
    gradients = gradients_of(model)
    assert sum(isinstance(gradient, DTensor) for gradient in gradients) == len(gradients) - 1
    return mean.item(), [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in gradients]


@pytest.mark.slow
def test_two_processes_with_sharded_weights_have_the_gradient_of_one(tmp_path):
    expected, gradients = whole_batch("contrastive")
    for value, given in in_two_processes(sharded_half_of_the_batch, tmp_path):
        assert value == pytest.approx(expected, rel=1e-5)
        assert_equal_gradients(given, gradients, rtol=1e-5)


def unequal_batches(name: str, rank: int) -> None:
    images, texts = features(3 + rank)
    LOSSES[name]()(images, texts, *numbers_for(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_unequal_batches_are_refused_on_both_processes(name, tmp_path):
    assert (
        in_two_processes(partial(unequal_batches, name), tmp_path)
        == ["batches of [3, 4] pairs on the processes: they must be equal (drop the last ones)"] * 2
    )


# ---- Chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_give_the_gradient_of_the_batch_in_one_piece(name, chunks):
    expected, gradients = whole_batch(name)
    model = model_for(name)
    size = PAIRS // chunks
    parts = [partial(inputs_of, model, start, start + size) for start in range(0, PAIRS, size)]
    value = in_chunks(name, model, model, parts)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert_equal_gradients(gradients_of(model), gradients, rtol=1e-4)


def test_both_passes_of_a_chunk_see_the_same_random_numbers():
    model = tiny_model(dropout=0.5).train()
    seen: list[torch.Tensor] = []
    model.visual_projection.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    parts = [partial(inputs_of, model, start, start + 4) for start in (0, 4)]
    torch.manual_seed(3)
    cached_contrastive_backward(model, model.logit_scale, parts, ContrastiveLoss())
    first, second = seen[:2], seen[2:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    cached_contrastive_backward(model, model.logit_scale, parts, ContrastiveLoss())
    assert not torch.equal(seen[0], seen[4])  # dropout is active


def test_both_passes_of_a_chunk_see_the_same_patches_and_warn_of_nothing():
    model = tiny_model().train()
    seen: list[torch.Tensor] = []
    model.vision_model.register_forward_hook(lambda module, args, output: seen.append(output.patch_selection.indices))
    batches = [inputs_of(model, start, start + 4) | {"patch_selection": None} for start in (0, 4)]
    parts = [lambda batch=batch: batch for batch in batches]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached_contrastive_backward(model, model.logit_scale, parts, ContrastiveLoss())
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    with torch.no_grad(), pytest.warns(UserWarning, match="here without gradients"):
        model(**batches[0])


def test_no_more_than_a_chunk_is_encoded_at_a_time():
    model, sizes = tiny_model().train(), []
    model.vision_model.register_forward_hook(lambda module, args, output: sizes.append(len(output.pooler_output)))
    parts = [partial(inputs_of, model, start, start + 2) for start in range(0, PAIRS, 2)]
    cached_contrastive_backward(model, model.logit_scale, parts, ContrastiveLoss())
    assert sizes == [2] * 8
