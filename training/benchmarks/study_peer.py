"""A run of `training/train.py` with open_clip's own model and patch dropout in the place of ours; needs open_clip_torch.

    python training/benchmarks/study_peer.py --model small --patch_mask '{name: random, mask_ratio: 0.5}' --output_dir runs/peer

Architecture, data, budget, schedule, autocast, loss, bound of the logit scale and evaluation are the run's own. open_clip's are
the model's code, its initial weights, its patch dropout (of the mask's ratio, off in the last steps on whole images), and what
follows from its names of weights: that of its patch embedding decays. Its text tower always encodes the whole context.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import CLIPOutput

if __name__ == "__main__":  # run as a script, it finds its package, and not itself or its siblings in the place of others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from hf_maskclip import MaskCLIPConfig, MaskCLIPModel
from hf_maskclip.conversion_open_clip import from_open_clip_weights, open_clip_config
from training.config import TrainingConfig, load_config
from training.errors import ConfigError, TrainingStopped, fail
from training.optimization import build_optimizer, build_schedule
from training.run import Run, prepare
from training.stopping import StopRequest
from training.train import finish, start_reports, train


class OpenCLIP(torch.nn.Module):
    """open_clip's model, called as ours is. Which patches it drops is its own choice; only whether it does is ours."""

    def __init__(self, config: MaskCLIPConfig, patch_dropout: float):
        super().__init__()
        sizes = open_clip_config(config)
        text = sizes["text_cfg"] | {"hf_tokenizer_name": None}
        vision = sizes["vision_cfg"] | {"patch_dropout": patch_dropout}
        self.clip = open_clip.CLIP(sizes["embed_dim"], vision, text, quick_gelu=sizes["quick_gelu"])
        self.patch_dropout = self.clip.visual.patch_dropout.prob
        self.eos_token_id = config.text_config.eos_token_id

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, apply_patch_mask: bool, **_: Any) -> CLIPOutput:
        padding = self.clip.context_length - input_ids.shape[1]
        input_ids = F.pad(input_ids, (0, padding), value=self.eos_token_id)
        self.clip.visual.patch_dropout.prob = self.patch_dropout if apply_patch_mask else 0.0
        return CLIPOutput(
            image_embeds=self.clip.encode_image(pixel_values, normalize=True),
            text_embeds=self.clip.encode_text(input_ids, normalize=True),
        )


@dataclass
class PeerRun(Run):
    """A run whose model is evaluated and exported with the weights of open_clip's, which is the one that learns."""

    peer: OpenCLIP = None

    def result(self) -> MaskCLIPModel:
        weights = self.peer.clip.state_dict()
        self.model.load_state_dict(from_open_clip_weights(weights, list(self.model.state_dict())))
        return self.model


def prepare_peer(config: TrainingConfig) -> PeerRun:
    """Raises ConfigError where the run's patch mask is not `random`."""
    run = prepare(config)
    mask = run.model.config.vision_config.patch_mask
    if mask["name"] != "random":
        fail(f"patch_mask={mask['name']!r}: must be random, for open_clip's patch dropout")
    peer = OpenCLIP(run.model.config, run.model.vision_model.patch_mask.mask_ratio)
    run.model.logit_scale = peer.clip.logit_scale  # the one that the loop reads and bounds
    trained_model = run.accelerator.prepare(peer)
    optimizer = run.accelerator.prepare(build_optimizer(peer, config))
    num_steps, warmup_steps = config.schedule(run.accelerator.num_processes)
    schedule = build_schedule(optimizer, config, num_steps, warmup_steps, steps_done=0)
    return PeerRun(**vars(replace(run, trained_model=trained_model, optimizer=optimizer, schedule=schedule)), peer=peer)


def main(config: TrainingConfig) -> dict[str, Any]:
    """As `training/train.py` has it."""
    run = prepare_peer(config)
    log = start_reports(run)
    with StopRequest() as stop:
        is_complete = train(run, log, stop)
    return finish(run, log) if is_complete else {}


if __name__ == "__main__":
    try:
        main(load_config())
    except (ConfigError, TrainingStopped) as error:
        sys.exit(f"error: {error}")
