"""Proves that a preset begins with weights of the sizes of open_clip's, which are CLIP's own; those of Transformers are not."""

import pytest
import torch

from hf_maskclip import MaskCLIPModel
from hf_maskclip.conversion_open_clip import from_open_clip_weights
from training.benchmarks.study_peer import OpenCLIP
from training.initialization import initialize_as_clip
from training.model import preset_config


@pytest.mark.parametrize("preset", ["tiny-96", "small"])
def test_weights_begin_as_open_clips_do(preset):
    torch.manual_seed(0)
    model = MaskCLIPModel(preset_config(preset, "none", vocab_size=1000))
    names = list(model.state_dict())
    wanted = from_open_clip_weights(OpenCLIP(model.config, patch_dropout=0.5).clip.state_dict(), names)
    before = {name: value.std().item() for name, value in model.state_dict().items() if value.ndim}
    initialize_as_clip(model)
    spread = {name: value.std().item() for name, value in model.state_dict().items() if value.ndim}
    expected = {name: wanted[name].std().item() for name in spread}
    assert len(spread) > 50 and spread == pytest.approx(expected, rel=0.2, abs=1e-6)
    changed = {name for name in spread if before[name] != pytest.approx(expected[name], rel=0.2, abs=1e-6)}
    assert any("q_proj" in name for name in changed) and "vision_model.embeddings.patch_embedding.weight" in changed
