"""Proves that the study's peer trains open_clip's own model, with its patch dropout, and that what is evaluated and exported
computes as that model does."""

import pytest
import torch
from transformers import CLIPModel

from hf_maskclip.errors import ConfigError
from training.config import TrainingConfig
from training.loop import train
from training.run import prepare
from training.stopping import StopRequest
from training.summary import finish, start_reports
from training.tracking import MetricsLog, read_metrics


@pytest.mark.slow
def test_the_peer_trains_open_clips_model_and_leaves_it_as_a_clip(options, tmp_path):
    """Patch dropout is on in the masked steps only, and what is evaluated and exported computes as open_clip's model does."""
    pytest.importorskip("open_clip", reason="open_clip is of the test extra")
    from training.study import peer

    mask = {"name": "random", "mask_ratio": 0.5}
    config = TrainingConfig(**(options | {"model": "tiny", "patch_mask": mask, "unmasked_tuning_steps": 1}))
    run, tokens = prepare(config, peer.PeerParallel), []
    theirs = run.learner.parallel.peer
    theirs.clip.visual.transformer.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].shape[1]))
    before = theirs.clip.logit_scale.item()
    with StopRequest() as stop:
        assert train(run, start_reports(run), stop)
    assert tokens == [33, 33, 33, 65]  # half of 64 patches, and the class token
    assert theirs.clip.logit_scale.item() != before
    assert [record["kept_patches"] for record in read_metrics(run.output_dir / "metrics.jsonl")] == [32, 32, 32, 64]
    finish(run, MetricsLog(run.accelerator, run.output_dir))
    exported = CLIPModel.from_pretrained(run.output_dir / "export").eval()
    bos, eos = exported.config.text_config.bos_token_id, exported.config.text_config.eos_token_id
    input_ids = torch.tensor([[bos, 300, 400, eos], [bos, 500, eos, eos]])
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.eval()(input_ids, pixels, apply_patch_mask=False)
        ours = exported(input_ids=input_ids, pixel_values=pixels)
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(ours[name], expected[name], atol=1e-5, rtol=0)

    run.lock.release()
    refused = {
        "patch_mask='pgs': must be random": {"patch_mask": "pgs"},
        "learning_rate_text=0.1: must be 0.0, for open_clip's model": {"patch_mask": mask, "learning_rate_text": 0.1},
    }
    for message, changed in refused.items():
        with pytest.raises(ConfigError, match=message):
            prepare(TrainingConfig(**(options | {"model": "tiny"} | changed)), peer.PeerParallel)
