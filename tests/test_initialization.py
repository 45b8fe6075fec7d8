"""Proves that a preset begins with weights of the sizes of open_clip's, which are CLIP's own; those of Transformers are not;
and that from the same weights it has open_clip's loss and gradients."""

import pytest
import torch

from hf_maskclip import ContrastiveLoss, MaskCLIPModel
from hf_maskclip.conversion.open_clip_weights import from_open_clip_weights
from training.model.initialization import initialize_as_clip
from training.model.presets import preset_config


@pytest.fixture
def peer_of():
    """open_clip's model of a configuration."""
    pytest.importorskip("open_clip", reason="open_clip is of the test extra")
    from training.study.peer import OpenCLIP

    return lambda model: OpenCLIP(model.config, patch_dropout=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny-96", "small"])
def test_weights_begin_as_open_clips_do(preset, peer_of):
    torch.manual_seed(0)
    model = MaskCLIPModel(preset_config(preset, "none", vocab_size=1000))
    names = list(model.state_dict())
    wanted = from_open_clip_weights(peer_of(model).clip.state_dict(), names)
    before = {name: value.std().item() for name, value in model.state_dict().items() if value.ndim}
    initialize_as_clip(model)
    spread = {name: value.std().item() for name, value in model.state_dict().items() if value.ndim}
    expected = {name: wanted[name].std().item() for name in spread}
    assert len(spread) > 50
    assert spread == pytest.approx(expected, rel=0.2, abs=1e-6)
    changed = {name for name in spread if before[name] != pytest.approx(expected[name], rel=0.2, abs=1e-6)}
    assert any("q_proj" in name for name in changed)
    assert "vision_model.embeddings.patch_embedding.weight" in changed


@pytest.mark.slow
def test_from_one_set_of_weights_losses_and_gradients_are_open_clips(peer_of):
    torch.manual_seed(0)
    model = MaskCLIPModel(preset_config("tiny-96", "none", vocab_size=100, eos_token_id=1))
    peer = peer_of(model)
    names = list(model.state_dict())
    model.load_state_dict(from_open_clip_weights(peer.clip.state_dict(), names))
    input_ids = torch.randint(2, 100, (4, 9))
    input_ids[:, -1], input_ids[0, 5:] = 1, 1  # captions of two lengths
    inputs = {"input_ids": input_ids, "pixel_values": torch.randn(4, 3, 96, 96), "apply_patch_mask": False}
    losses = []
    for each, logit_scale in ((model, model.logit_scale), (peer, peer.clip.logit_scale)):
        outputs = each.train()(**inputs)
        losses.append(ContrastiveLoss()(outputs.image_embeds, outputs.text_embeds, logit_scale.exp()))
        losses[-1].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    wanted = from_open_clip_weights({name: parameter.grad for name, parameter in peer.clip.named_parameters()}, list(gradients))
    torch.testing.assert_close(*losses)
    for name, gradient in gradients.items():  # of the biases of keys they are 0 but for rounding
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert all(gradient.abs().max() > 1e-4 for name, gradient in gradients.items() if not name.endswith("k_proj.bias"))
