"""The checks of gpu.py: what a GPU computes is what the definitions say. Each says what it found, or raises a [`CheckFailed`].

Shapes: B pairs.
"""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from measure import ROOT, build_model, random_batch
from photographs import write_shards

from hf_maskclip import ContrastiveLoss, PatchSelection, build_patch_mask, cached_contrastive_backward
from hf_maskclip.models.attention import takes_packed_tokens
from hf_maskclip.models.patch_mask_registry import BUILT_IN
from training.model.compilation import compile_encoders
from training.parallel.fsdp import shard
from training.tracking import read_metrics

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Under which images keep different numbers of patches.
WIDE_PGS = {"name": "pgs", "min_mask_ratio": 0.1, "max_mask_ratio": 0.8, "candidate_ratio": 0.2, "similarity_threshold": 0.2}
# The largest relative difference, by precision.
LIMITS = {"float32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}


class CheckFailed(AssertionError):
    """A GPU computes something else."""


@dataclass(frozen=True)
class Setting:
    """Where the checks run: a device, a preset that is small, an empty folder, and the samples of a shard there.

    A shard is read by one data worker, which needs a batch of different ones.
    """

    device: str
    preset: str
    folder: Path
    shard_samples: int

    @property
    def num_cards(self) -> int:
        return torch.cuda.device_count() if self.device == "cuda" else 2  # of processes on a CPU there are always two

    def autocast(self, precision: str):
        return torch.autocast(self.device, HALVES[precision]) if precision in HALVES else nullcontext()


def demand(what: str, value: float, limit: float) -> str:
    if not value <= limit:
        raise CheckFailed(f"{what} {value:.2g}, which is more than {limit:g}")
    return f"{what} {value:.1e}"


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """Of all weights, as one vector; it is forgotten in the model."""
    found = torch.cat([weight.grad.flatten().float() for weight in model.parameters() if weight.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def packed_is_one_by_one(setting: Setting, precision: str) -> str:
    model = build_model(setting.preset, setting.device)
    model.set_patch_mask(WIDE_PGS)
    images, _ = random_batch(model, 8, setting.device)
    selection = model.select_patches(images)
    lengths = selection.lengths.tolist()
    if len(set(lengths)) == 1:
        raise CheckFailed(f"all images keep {lengths[0]} patches, so nothing is packed")

    def features(rows: slice, selection: PatchSelection) -> torch.Tensor:
        with setting.autocast(precision):
            pooled = model.get_image_features(images[rows], patch_selection=selection).pooler_output
        (pooled.float().sin() * torch.linspace(-1, 1, pooled.shape[1], device=pooled.device)).sum().backward()
        return pooled.detach()

    together, of_packed = features(slice(0, 8), selection), gradient(model)
    ones = [(slice(row, row + 1), PatchSelection(selection.indices[row : row + 1, :n])) for row, n in enumerate(lengths)]
    alone = torch.cat([features(rows, one) for rows, one in ones])
    states = torch.empty(1, dtype=HALVES.get(precision, torch.float32), device=setting.device)
    way = "by PyTorch's kernel" if takes_packed_tokens(model.vision_model.config, states) else "padded"
    found = demand("features differ by", difference(together, alone), LIMITS[precision])
    return f"{way}, {found}, {demand('gradients by', difference(of_packed, gradient(model)), LIMITS[precision])}"


def masks_are_the_cpus(setting: Setting) -> str:
    """With the same random numbers, for devices draw others from one seed."""
    model = build_model(setting.preset, "cpu")
    images, _ = random_batch(model, 64, "cpu")
    size = model.config.vision_config.patch_size
    num_patches = (model.config.vision_config.image_size // size) ** 2
    given = torch.rand(64, num_patches, generator=torch.Generator().manual_seed(1))
    draw = torch.rand

    def draw_on_host(*shape, generator=None, device=None, **options):
        return draw(*shape, generator=generator, **options).to(device)

    alike = {}
    for name, mask_class in BUILT_IN.items():
        mask, visible = build_patch_mask(name, patch_size=size), []
        for device in ("cpu", setting.device):
            scores = {"patch_scores": given.to(device)} if mask_class.needs_patch_scores else {}
            with patch.object(torch, "rand", draw_on_host):
                chosen = mask(images.to(device), generator=torch.Generator().manual_seed(0), **scores)
            visible.append(chosen.visible(num_patches).cpu())
        alike[name] = float((visible[0] == visible[1]).float().mean())
    worst = min(alike, key=alike.__getitem__)
    demand(f"of {worst}, the share of patches that are chosen otherwise is", 1 - alike[worst], 0.005)
    return ", ".join(f"{name} {share:.2%}" for name, share in alike.items()) + " of patches alike"


def chunks_are_one_piece(setting: Setting) -> str:
    model = build_model(setting.preset, setting.device)
    images, input_ids = random_batch(model, 32, setting.device)
    selection = model.select_patches(images, patch_mask="random")

    def rows(first: int, last: int) -> dict[str, Any]:
        part = {"pixel_values": images[first:last], "input_ids": input_ids[first:last]}
        return part | {"patch_selection": PatchSelection(selection.indices[first:last])}

    outputs = model(**rows(0, 32))
    ContrastiveLoss()(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp()).backward()
    expected = gradient(model)
    parts: list[Callable[[], dict[str, Any]]] = [partial(rows, first, first + 8) for first in range(0, 32, 8)]
    cached_contrastive_backward(model, model.logit_scale, parts, ContrastiveLoss())
    return demand("gradients differ by", difference(gradient(model), expected), LIMITS["float32"])


def compiled_is_eager(setting: Setting) -> str:
    model, losses = build_model(setting.preset, setting.device), []
    model.set_patch_mask(WIDE_PGS)
    for is_compiled in (False, True):
        if is_compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            compile_encoders(model, "inductor" if setting.device == "cuda" else "aot_eager")
        for step in range(8):
            images, input_ids = random_batch(model, 6 + 10 * (setting.device == "cuda"), setting.device)
            torch.manual_seed(step)  # of the mask, and so of the number of packed tokens
            losses.append(model(pixel_values=images, input_ids=input_ids[:, : 24 + 8 * (step % 3)], return_loss=True).loss)
            losses[-1].backward()
    values = torch.stack(losses).detach()
    found = demand("losses differ by", difference(values[8:], values[:8]), LIMITS["float32"])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    demand("compilations:", graphs, 2)
    return f"{found}, {graphs} compilations in 8 steps"


def sharded_is_whole(setting: Setting) -> str:
    backend = "nccl" if setting.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{setting.folder}/group", rank=0, world_size=1)
    try:
        # Nothing changes the outputs in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        losses = []
        for is_sharded in (False, True):
            model = build_model(setting.preset, setting.device)
            if is_sharded:
                shard(model, SimpleNamespace(device=torch.device(setting.device)))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            images, input_ids = random_batch(model, 16, setting.device)
            for _ in range(3):
                loss = model(pixel_values=images, input_ids=input_ids, return_loss=True).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
        values = torch.stack(losses)
        return demand("losses of 3 steps differ by", difference(values[3:], values[:3]), LIMITS["float32"])
    finally:
        dist.destroy_process_group()


# ---- Runs of the training program ------------------------------------------------------------------------------------------
def run_training(setting: Setting, name: str, launcher: tuple[str, ...] = (), **options: Any) -> list[dict[str, Any]]:
    """The records of the steps of a run in the folder `name`, on shards of pictures like photographs."""
    shards = setting.folder / "shards"
    if not shards.exists():
        shards.mkdir()
        write_shards(shards, count=8, samples=setting.shard_samples)
    options = {"train_data": f"{shards}/{{0..7}}.tar", "output_dir": setting.folder / name, "vocab_size": 1000} | options
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    environment = os.environ | ({} if setting.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
    command = [*(launcher or (sys.executable,)), str(ROOT / "training/train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise CheckFailed(f"a run ended with code {done.returncode}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    return [record for record in read_metrics(setting.folder / name / "metrics.jsonl") if "loss" in record]


def resumed_is_unbroken(setting: Setting) -> str:
    options = {"model": "tiny", "batch_size": 32, "max_steps": 6, "checkpoint_every": 3, "num_workers": 2, "resume": "auto"}
    unbroken = run_training(setting, "unbroken", **options)
    shutil.copytree(setting.folder / "unbroken", setting.folder / "resumed")
    for gone in ("export", "checkpoints/step-00000006"):
        shutil.rmtree(setting.folder / "resumed" / gone)
    resumed = run_training(setting, "resumed", **options)
    losses = [torch.tensor([record["loss"] for record in records]) for records in (resumed, unbroken)]
    if torch.equal(*losses):
        return f"the losses of {len(unbroken)} steps are the same to the last digit"
    return demand("losses differ by", difference(*losses), LIMITS["float32"])


def two_processes_are_one(setting: Setting) -> str:
    if setting.num_cards < 2:
        return "left out: one card"
    launch = ROOT / "training/launch" / ("ddp.yaml" if setting.device == "cuda" else "cpu-2-processes.yaml")
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch), "--num_processes", "2")
    options = {"model": "tiny", "max_steps": 3, "batch_size": 16, "num_workers": 0}
    records = run_training(setting, "two", launcher, **options)
    speed = records[-1]["samples_per_second"]
    return f"{len(records)} steps, the last at {speed:.0f} images/s, loss {records[-1]['loss']:.3f}"


CHECKS: dict[str, Callable[[Setting], str]] = {
    "packed images, float32": partial(packed_is_one_by_one, precision="float32"),
    "packed images, bf16": partial(packed_is_one_by_one, precision="bf16"),
    "packed images, fp16": partial(packed_is_one_by_one, precision="fp16"),
    "masks as on a CPU": masks_are_the_cpus,
    "chunks": chunks_are_one_piece,
    "compiled": compiled_is_eager,
    "FSDP2 on one": sharded_is_whole,
    "resume": resumed_is_unbroken,
    "two processes": two_processes_are_one,
}
