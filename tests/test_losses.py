"""Proves that the contrastive loss is CLIP's, and that two processes get the loss and gradients of one with the whole batch."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from hf_maskclip import ContrastiveLoss


def features(pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(pairs, 6, generator=generator), torch.randn(pairs, 6, generator=generator)


def towers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"image": nn.Linear(6, 5), "text": nn.Linear(6, 5)}).double()


def loss_of(model: nn.ModuleDict, images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    embeds = (nn.functional.normalize(model[key](x.double()), dim=-1) for key, x in (("image", images), ("text", texts)))
    return ContrastiveLoss()(*embeds, scale.exp())


def test_the_loss_is_that_of_clip():
    images, texts = (nn.functional.normalize(x, dim=-1) for x in features(8))
    expected = image_text_contrastive_loss(texts @ images.t() * 10)
    torch.testing.assert_close(ContrastiveLoss()(images, texts, torch.tensor(10.0)), expected)


def test_half_precision_features_give_a_float32_loss():
    images, texts = (nn.functional.normalize(x, dim=-1) for x in features(8))
    loss = ContrastiveLoss()(images.bfloat16(), texts.bfloat16(), torch.tensor(10.0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(ContrastiveLoss()(images, texts, torch.tensor(10.0)).item(), abs=1e-2)


def _train_step_on_one_of_two(rank: int, init_file: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    images, texts = features(8)
    model, scale = towers(), nn.Parameter(torch.tensor(2.0))
    model.scale = scale
    loss = loss_of(model, images[rank * 4 : rank * 4 + 4], texts[rank * 4 : rank * 4 + 4], scale)
    loss.backward()
    for parameter in model.parameters():  # what DDP does
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= 2
    torch.distributed.all_reduce(loss.detach())
    results[rank] = (loss.item() / 2, [p.grad for p in model.parameters()])
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_train_step_on_one_of_two, args=(str(tmp_path / "init"), results), nprocs=2)
        shares = dict(results)
    model, scale = towers(), nn.Parameter(torch.tensor(2.0))
    model.scale = scale
    loss = loss_of(model, *features(8), scale)
    loss.backward()
    expected = [p.grad for p in model.parameters()]
    assert all(gradient.abs().max() > 1e-4 for gradient in expected)
    for rank_loss, gradients in shares.values():
        assert rank_loss == pytest.approx(loss.item(), rel=1e-5)
        for gradient, want in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-8)
