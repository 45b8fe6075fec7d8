"""What the benchmarks share: a model, a batch, times that are compared within one run, peak memory, and FLOPs.

Shapes: B pairs, C channels, S caption tokens, T tokens of all sequences.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

# The benchmarks, which all import this file, run as scripts from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import CLIPConfig, CLIPModel, PreTrainedModel, SiglipConfig, SiglipModel

from hf_maskclip import MaskCLIPModel, add_patch_mask
from hf_maskclip.models.attention import DEFAULT_ATTENTION
from hf_maskclip.models.patch_mask_registry import patch_masks
from training.model.optimization import parameter_groups
from training.model.presets import preset_config

ROOT = Path(__file__).resolve().parents[2]
# A teacher is measured by mask_cost.py.
MASKS = {name: {"name": name} for name, mask in patch_masks().items() if not mask.needs_patch_scores}
MASKS |= {"pgs 0.5": {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}}
OPEN_CLIP_NAMES = {"vit-b-16": "ViT-B-16", "vit-b-32": "ViT-B-32"}


def arguments(description: str, *, model: str = "vit-b-16", batch_size: int = 64, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=model, help="a preset of training/model/presets.py")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="pairs a step")
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of each thing; the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, help="also write the results as JSON")
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds: two minutes")
    return parser


def build_model(preset: str, device: str) -> PreTrainedModel:
    """A preset without a mask, with random weights and the family's vocabulary, in training mode."""
    torch.manual_seed(0)
    config = preset_config(preset, "none")
    if isinstance(config, SiglipConfig):
        model = add_patch_mask(SiglipModel._from_config(config, attn_implementation=DEFAULT_ATTENTION))
    else:
        model = MaskCLIPModel(config)
    return model.to(device).train()


def build_plain_model(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The class of Transformers that a model is of, with other random weights, in training mode."""
    config = model.config.to_dict()
    vision = {key: value for key, value in config["vision_config"].items() if key not in ("patch_mask", "model_type")}
    parts = {"vision_config": vision, "text_config": config["text_config"]}
    if isinstance(model, SiglipModel):
        return SiglipModel(SiglipConfig(**parts)).to(device).train()
    return CLIPModel(CLIPConfig(**parts, projection_dim=config["projection_dim"])).to(device).train()


def build_open_clip(preset: str, patch_dropout: float, device: str) -> torch.nn.Module | None:
    """open_clip's model of the same size, in training mode; None where it has none, or is not installed."""
    if preset not in OPEN_CLIP_NAMES or find_spec("open_clip") is None:
        return None
    import open_clip

    return open_clip.create_model(OPEN_CLIP_NAMES[preset], force_patch_dropout=patch_dropout).to(device).train()


def token_counts(model: PreTrainedModel, caption_tokens: int) -> tuple[int, int]:
    """The tokens of a caption that are encoded, and that the processor pads it to. SigLIP encodes the padding, too."""
    context = model.config.text_config.max_position_embeddings
    return (context if isinstance(model, SiglipModel) else caption_tokens), context


def random_batch(
    model: PreTrainedModel, batch_size: int, device: str, caption_tokens: int = 24, padded_tokens: int = 77
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random images (B, C, H, W), and captions (B, S) padded with end tokens as CLIP's tokenizer pads."""
    vision, text = model.config.vision_config, model.config.text_config
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch_size, 3, 16, 16, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (vision.image_size, vision.image_size), mode="bicubic")
    images += 0.1 * torch.randn(images.shape, generator=generator)
    last = text.vocab_size - 1  # CLIP's end token, with which captions are padded; to SigLIP one as good as another
    input_ids = torch.full((batch_size, padded_tokens), last)
    highest = min(40_000, text.vocab_size)
    input_ids[:, : caption_tokens - 1] = torch.randint(1000, highest, (batch_size, caption_tokens - 1), generator=generator)
    return images.to(device), input_ids.to(device)


def training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor], device: str) -> Callable[[], None]:
    """A step: the loss under bf16 autocast, backward, and AdamW as in `training/train.py`."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.2), lr=1e-6, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_flops(model: PreTrainedModel, visible: list[int], caption_tokens: list[int]) -> float:
    """Matrix FLOPs of a training step, forward and backward, for the tokens that are encoded.

    A token costs 2 * 12 D^2 in the linear layers of a layer (4 D^2 attention, 8 D^2 MLP) and 2 * 2 S D in the attention of a
    sequence of S tokens; backward costs twice the forward pass. A visible patch costs 2 C P^2 D for its embedding, and 4 D^2
    for keys and values of SigLIP's pooling head.

    Args:
        visible: the patches of each image, or of each of its views, that are encoded.
        caption_tokens: the tokens of each caption that are encoded.
    """

    def tower(config, lengths: list[int]) -> int:
        width = config.hidden_size
        return config.num_hidden_layers * sum(length * (24 * width**2 + 4 * length * width) for length in lengths)

    vision, text = model.config.vision_config, model.config.text_config
    embedding = 2 * vision.num_channels * vision.patch_size**2 * vision.hidden_size * sum(visible)
    is_siglip = isinstance(model, SiglipModel)
    head = 4 * vision.hidden_size**2 * sum(visible) if is_siglip else 0
    encoder = tower(vision, [count + (not is_siglip) for count in visible])
    return 3.0 * (encoder + tower(text, caption_tokens) + embedding + head)


def seconds(function: Callable[[], object], device: str) -> float:
    """How long one call takes, the work that it leaves to the device included."""
    wait = torch.cuda.synchronize if device == "cuda" else nullcontext
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def side_by_side(functions: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each function, round by round. They take turns, so that what else the machine does falls on all alike."""
    for function in functions.values():
        function()  # the first call allocates and compiles
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return times


def ratio(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    """The median, the least and the largest ratio of two things over the rounds that they shared."""
    ratios = [n / d for n, d in zip(numerator, denominator, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def peak_memory(function: Callable[[], object], device: str) -> int:
    """Bytes at the peak of a call beyond those in use before it (Linux: of the whole process)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator only keeps is not in use
    Path("/proc/self/clear_refs").write_bytes(b"5")  # starts the peak anew
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def print_table(title: str, rows: list[dict[str, Any]], output: Path | None) -> None:
    """Print rows as a Markdown table, and write them as JSON where `output` says so."""
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")
    if output:
        output.write_text(json.dumps({"title": title, "rows": rows}, indent=2) + "\n", encoding="utf-8")
