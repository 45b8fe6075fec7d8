"""One command for whoever has a GPU: is what it computes right, and how fast is it.

    python training/benchmarks/gpu.py --output gpu.json          # at most 8 minutes, ViT-B/16
    python training/benchmarks/gpu.py --device cpu --quick       # a small model, to see that the command works

First the checks of gpu_checks.py. Then training steps in bf16 on images that lie on the device, at batches of 256 to 2,048:
`CLIPModel`, open_clip with and without patch dropout, and ours with each mask; and whole runs that the loader feeds. Peers get
captions padded to 77 tokens, as their processors pad; ours get the 24 that our loader leaves. What would go beyond the time is
left out, and said. MFU is of the dense bf16 peak of the card, and empty for a card that is not known here.

It ends with code 1 where a check has failed.
"""

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_checks import CHECKS, Setting, run_training
from measure import (
    MASKS,
    arguments,
    build_model,
    build_open_clip,
    build_plain_model,
    peak_memory,
    print_table,
    random_batch,
    seconds,
    step_flops,
    training_step,
)

from hf_maskclip import ContrastiveLoss
from hf_maskclip.distributed import usable_cpus
from training.model.loss import prepare_loss

MOST_SECONDS = 8 * 60
CAPTION_TOKENS, PADDED_TOKENS = 24, 77
BATCH_SIZES = (256, 512, 1024, 2048)
# Dense bf16 FLOP/s, by a part of the card's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12}
PEAKS |= {"RTX 4090": 165e12, "RTX 3090": 71e12}

Step = Callable[[], None]


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "a CPU"


def run_checks(setting: Setting, has_time: Callable[[], bool]) -> list[dict[str, str]]:
    """A line of each check as it comes, and what was found."""
    results = []
    for name, check in CHECKS.items():
        try:
            found, result = (check(setting), "ok") if has_time() else ("no time was left", "left out")
        except Exception as error:  # one check that fails, in whatever way, is not to hide the others
            found, result = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "FAILED"
        results.append({"check": name, "result": result, "found": found})
        print(f"{result:8} {name}: {found}", flush=True)
    return results


class Speed:
    """Training steps of one preset on a device, at one batch size after another."""

    def __init__(self, preset: str, device: str, rounds: int):
        self.device, self.rounds = device, rounds
        self.model = build_model(preset, device)
        self.pair_loss = prepare_loss("auto", self.model, is_fresh=True)
        self.inputs: dict[str, torch.Tensor] = {}
        self.our_step = training_step(self.model, lambda: self.pair_loss(self.model(**self.inputs)), device)
        self.peers = {"CLIPModel": self._plain_step(build_plain_model(self.model, device))}
        for dropout in (0.0, 0.5):
            if (peer := build_open_clip(preset, dropout, device)) is not None:
                self.peers[f"open_clip, patch dropout {dropout}" if dropout else "open_clip"] = self._peer_step(peer)
        vision = self.model.config.vision_config
        self.num_patches = (vision.image_size // vision.patch_size) ** 2
        known = [peak for part, peak in PEAKS.items() if part in device_name(device)]
        self.peak = known[0] if known else None

    def _plain_step(self, plain: torch.nn.Module) -> Step:
        return training_step(plain, lambda: plain(**self.inputs, return_loss=True).loss, self.device)

    def _peer_step(self, peer: torch.nn.Module) -> Step:
        loss = ContrastiveLoss()
        return training_step(peer, lambda: loss(*peer(self.inputs["pixel_values"], self.inputs["input_ids"])), self.device)

    def rows(self, batch_size: int, has_time: Callable[[], bool]) -> list[dict[str, Any]]:
        """A row of each peer and mask at a batch size."""
        images, padded = random_batch(self.model, batch_size, self.device, CAPTION_TOKENS, PADDED_TOKENS)
        rows = []
        self.inputs = {"pixel_values": images, "input_ids": padded}
        for name, step in self.peers.items():
            visible = self.num_patches // 2 if "dropout" in name else self.num_patches
            rows.append(self._row(name, step, batch_size, [visible] * batch_size, PADDED_TOKENS, has_time))
        self.inputs = {"pixel_values": images, "input_ids": padded[:, :CAPTION_TOKENS].contiguous()}
        for name, spec in MASKS.items():
            self.model.set_patch_mask(spec)
            visible = self.model.select_patches(images[:256]).valid().sum(dim=1).tolist()
            visible = (visible * -(-batch_size // len(visible)))[:batch_size]
            rows.append(self._row(name, self.our_step, batch_size, visible, CAPTION_TOKENS, has_time))
        return rows

    def _row(self, name, step, batch_size, visible, caption_tokens, has_time) -> dict[str, Any]:
        row = {"model": name, "pairs a step": batch_size, "fed": "from memory"}
        row |= {"patches": round(sum(visible) / batch_size), "images/s": "", "MFU": "", "memory, GB": ""}
        if not has_time():
            return row | {"images/s": "no time"}
        try:
            for _ in range(2):  # the first steps allocate
                step()
            median = statistics.median(seconds(step, self.device) for _ in range(self.rounds))
            memory = peak_memory(step, self.device)
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            return row | {"images/s": "out of memory"}
        row |= {"images/s": f"{batch_size / median:.0f}", "memory, GB": f"{memory / 1e9:.1f}"}
        if self.peak:
            row["MFU"] = f"{step_flops(self.model, visible, [caption_tokens] * batch_size) / median / self.peak:.0%}"
        return row


def loader_rows(setting: Setting, preset: str, batch_size: int, num_steps: int, masks, has_time) -> list[dict[str, Any]]:
    """Whole runs of the training program on JPEGs: the second half of their steps."""
    rows = []
    for name in masks:
        row = {"model": name, "pairs a step": batch_size, "fed": "by the loader"}
        row |= {"patches": "", "images/s": "no time", "MFU": "", "memory, GB": ""}
        if has_time():
            workers = min(8, usable_cpus())
            options = {"model": preset, "patch_mask": name, "batch_size": batch_size, "max_steps": num_steps}
            records = run_training(setting, f"loader-{name}", num_workers=workers, **options)[num_steps // 2 :]
            waits = statistics.median(record["data_seconds"] / record["step_seconds"] for record in records)
            row["fed"] += f", {workers} workers, {waits:.0%} of the time waited for"
            row["patches"] = round(statistics.mean(record["kept_patches"] for record in records))
            row["images/s"] = f"{statistics.median(record['samples_per_second'] for record in records):.0f}"
        rows.append(row)
    return rows


def main() -> int:
    """The exit code."""
    parser = arguments("Is what a GPU computes right, and how fast is it.", model="vit-b-16", rounds=3)
    parser.set_defaults(device="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("device='cuda': PyTorch sees no GPU here; --device cpu --quick shows that the command works", file=sys.stderr)
        return 2
    start = time.monotonic()
    is_quick = options.quick
    preset, checked, batch_sizes = ("tiny", "tiny", (16,)) if is_quick else (options.model, "small", BATCH_SIZES)

    def has_time(most: float = MOST_SECONDS) -> bool:
        return is_quick or time.monotonic() - start < most

    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(options.device, checked, Path(folder), shard_samples=64 if is_quick else 2 * batch_sizes[0])
        checks = run_checks(setting, partial(has_time, MOST_SECONDS / 2))
        num_steps, masks = (6, ("pgs",)) if is_quick else (30, ("none", "random", "pgs"))
        rows = loader_rows(setting, preset, batch_sizes[0], num_steps, masks, partial(has_time, MOST_SECONDS * 0.6))
        speed = Speed(preset, options.device, 2 if is_quick else options.rounds)
        rows = [row for size in batch_sizes for row in speed.rows(size, partial(has_time, MOST_SECONDS - 15))] + rows
    title = f"{preset} on {device_name(options.device)}, bf16, PyTorch {torch.__version__}"
    print_table(title, rows, None)
    if options.output:
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__}
        about = {"title": title, "seconds": round(time.monotonic() - start), "versions": versions}
        options.output.write_text(json.dumps(about | {"checks": checks, "speed": rows}, indent=2) + "\n", encoding="utf-8")
    failed = [check["check"] for check in checks if check["result"] == "FAILED"]
    print(f"\n{len(failed)} of {len(checks)} checks have failed{': ' if failed else ''}{', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
