"""A run of `training/train.py` with open_clip's own model and patch dropout instead of ours; needs open_clip_torch.

    python -m training.study.peer --model small --patch_mask '{name: random, mask_ratio: 0.5}' --output_dir runs/peer

Architecture, data, budget, schedule, autocast, loss, bound of the logit scale and evaluation are the run's own. open_clip's are
the model's code, its initial weights, its patch dropout (of the mask's ratio, off in the last steps on whole images), and what
follows from its names of weights: that of its patch embedding decays. Its text tower always encodes the whole context.
"""

import sys
from typing import Any

import open_clip
import torch
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import CLIPOutput

from hf_maskclip import MaskCLIPConfig, MaskCLIPModel
from hf_maskclip.conversion.open_clip_architecture import open_clip_config
from hf_maskclip.conversion.open_clip_weights import from_open_clip_weights
from hf_maskclip.errors import ConfigError, TrainingStopped, fail
from hf_maskclip.models.patch_masking_random import RandomPatchMask
from training.config import TrainingConfig, load_config
from training.loop import train
from training.model.optimization import build_optimizer
from training.parallel.ddp import DataParallel
from training.run import prepare
from training.stopping import StopRequest
from training.summary import finish, start_reports


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


class PeerParallel(DataParallel):
    """open_clip's model learns; ours, which gets its weights, is evaluated and exported."""

    title = "open_clip's model"

    def wrap(self, config: TrainingConfig) -> None:
        mask = self.model.vision_model.patch_mask
        if not isinstance(mask, RandomPatchMask):
            name = self.model.config.vision_config.patch_mask["name"]
            fail(f"patch_mask={name!r}: must be random, for open_clip's patch dropout")
        whole = {"freeze": "none", "lora_rank": 0, "learning_rate_vision": 0.0, "learning_rate_text": 0.0}
        constant = {"image_size": 0, "phases": "", "mask_schedule": 0.0, "views": "one"}
        for option, default in (whole | constant).items():
            if (value := config.as_options()[option]) != default:
                reason = "is trained as a whole" if option in whole else "drops patches of whole pictures at one ratio"
                fail(f"{option}={value!r}: must be {default!r}, for open_clip's model {reason}")
        self.peer = OpenCLIP(self.model.config, mask.mask_ratio)
        self.model.logit_scale = self.peer.clip.logit_scale  # the one that the loop reads and bounds
        self.wrapped_model = self.accelerator.prepare(self.peer)
        self.optimizer = self.accelerator.prepare(build_optimizer(self.peer, config))

    def whole_model(self, model: MaskCLIPModel) -> MaskCLIPModel:
        model.load_state_dict(from_open_clip_weights(self.peer.clip.state_dict(), list(model.state_dict())))
        return model


def main(config: TrainingConfig) -> dict[str, Any]:
    """As `training/train.py` has it."""
    run = prepare(config, PeerParallel)
    log = start_reports(run)
    with StopRequest() as stop:
        is_complete = train(run, log, stop)
    return finish(run, log) if is_complete else {}


if __name__ == "__main__":
    try:
        main(load_config())
    except (ConfigError, TrainingStopped) as error:
        sys.exit(f"error: {error}")
