"""What the benchmarks share: a model, a batch, a training step, and times that are compared within one run.

Shapes: B pairs, C channels, S caption tokens.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the benchmarks run as scripts from anywhere

from hf_maskclip import ContrastiveLoss, MaskCLIPModel, PatchSelection
from training.model import preset_config
from training.train import parameter_groups


def arguments(description: str, *, model: str = "vit-b-16", batch_size: int = 64, rounds: int = 3) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=model, help="a preset of training/model.py")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="pairs a step")
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of each thing; the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser


def build_model(preset: str, patch_mask: dict | str, device: str) -> MaskCLIPModel:
    """A preset with random weights and CLIP's vocabulary, as `training/train.py` would set it up on that device."""
    torch.manual_seed(0)
    return MaskCLIPModel(preset_config(preset, patch_mask)).to(device).train()


def random_batch(model: MaskCLIPModel, batch_size: int, device: str, num_tokens: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random images (B, C, H, W) and captions (B, S) that end in the end token."""
    vision, text = model.config.vision_config, model.config.text_config
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch_size, 3, 16, 16, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (vision.image_size, vision.image_size), mode="bicubic")
    images += 0.1 * torch.randn(images.shape, generator=generator)
    input_ids = torch.randint(1000, 40_000, (batch_size, num_tokens), generator=generator)
    input_ids[:, -1] = text.eos_token_id
    return images.to(device), input_ids.to(device)


class TrainingStep:
    """Forward, backward and AdamW under bf16 autocast, with the loss and the optimizer of `training/train.py`."""

    def __init__(self, model: torch.nn.Module, device: str):
        self.model, self.device = model, device
        self.optimizer = torch.optim.AdamW(parameter_groups(model, 0.2), lr=1e-6, betas=(0.9, 0.98), eps=1e-6, fused=True)
        self.loss = ContrastiveLoss()

    def __call__(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, selection: PatchSelection | None) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            outputs = self.model(
                input_ids=input_ids,
                pixel_values=pixel_values,
                patch_selection=selection,
                apply_patch_mask=selection is not None,
            )
        self.loss(outputs.image_embeds, outputs.text_embeds, self.model.logit_scale.exp()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def seconds(function: Callable[[], object], device: str) -> float:
    """How long one call takes, the work that it leaves to the device included."""
    wait = torch.cuda.synchronize if device == "cuda" else nullcontext
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def side_by_side(functions: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each function. They take turns, so that what else the machine does falls on all of them alike."""
    for function in functions.values():
        function()  # the first call allocates and compiles
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return {name: statistics.median(values) for name, values in times.items()}
