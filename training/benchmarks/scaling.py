"""How the cost of a training step grows: with the batch, the image, the patches, and the processes.

    python training/benchmarks/scaling.py              # the small preset, a masked step at pgs 0.5
    python training/benchmarks/scaling.py --quick

A step's time over its visible tokens should stay the same as the batch grows. All sizes take turns in one run. Processes: the
training program's own images per second under `torchrun` on one machine, whose cores they share.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import arguments, print_table, random_batch, side_by_side, training_step

from hf_maskclip import MaskCLIPModel
from hf_maskclip.distributed import usable_cpus
from training.model.presets import preset_config

CAPTION_TOKENS = 24
PGS_05 = {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}

parser = arguments("How the cost of a training step grows.", model="small")
parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="pairs a step")
parser.add_argument("--image_sizes", type=int, nargs="+", default=[64, 96, 128, 192], help="in pixels, at the preset's patches")
parser.add_argument("--patch_sizes", type=int, nargs="+", default=[6, 8, 12, 16], help="in pixels, at the preset's image size")
options = parser.parse_args()
if options.quick:
    options.rounds, options.batch_sizes = 3, [16, 64, 128]
    options.image_sizes, options.patch_sizes = [64, 96], [8, 16]


def model_and_step(batch_size: int, **vision_options: int):
    """A masked step of the preset with another image or patch size, and the tokens that it encodes."""
    config = preset_config(options.model, "none")
    for key, value in vision_options.items():
        setattr(config.vision_config, key, value)
    torch.manual_seed(0)
    model = MaskCLIPModel(config).to(options.device).train()
    model.set_patch_mask(PGS_05)
    images, input_ids = random_batch(model, batch_size, options.device, CAPTION_TOKENS, padded_tokens=CAPTION_TOKENS)
    step = training_step(model, lambda: model(input_ids=input_ids, pixel_values=images, return_loss=True).loss, options.device)
    visible = model.vision_model.select_patches(images).indices.shape[1]
    return step, batch_size * (1 + visible + CAPTION_TOKENS)


def grow(name: str, cases: dict[int, dict[str, int]]) -> None:
    """Print a table of steps that differ in one size."""
    built = {value: model_and_step(**case) for value, case in cases.items()}
    times = side_by_side({value: step for value, (step, _) in built.items()}, options.rounds, options.device)
    rows = []
    for value, (_, tokens) in built.items():
        median = statistics.median(times[value])
        rows.append({name: value, "tokens": tokens, "step, s": f"{median:.2f}", "us a token": f"{1e6 * median / tokens:.0f}"})
    print_table(f"{options.model}, pgs 0.5, {options.device}: {name}", rows, output_for(name))


def output_for(name: str) -> Path | None:
    return options.output and options.output.with_stem(f"{options.output.stem}-{name.replace(' ', '-')}")


def processes(counts: list[int]) -> None:
    """Print the training program's speed on several processes that share this machine's cores."""
    train, rows = Path(__file__).resolve().parents[1] / "train.py", []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), str(train)]
            run = {"output_dir": folder, "max_steps": 12, "batch_size": 128 // count, "num_workers": 1}
            options_of_run = [word for key, value in run.items() for word in (f"--{key}", str(value))]
            environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if options.device == "cpu" else {})
            subprocess.run([*launch, *options_of_run], check=True, env=environment, capture_output=True)
            records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        speed = statistics.median(record["samples_per_second"] for record in records[4:] if "loss" in record)
        rows.append({"processes": count, "pairs/s": f"{speed:.0f}"})
    title = f"tiny on scenes, 128 pairs in all, {options.device}, {usable_cpus()} CPUs: processes"
    print_table(title, rows, output_for("processes"))


grow("batch size", {size: {"batch_size": size} for size in options.batch_sizes})
grow("image size", {size: {"batch_size": options.batch_size, "image_size": size} for size in options.image_sizes})
grow("patch size", {size: {"batch_size": options.batch_size, "patch_size": size} for size in options.patch_sizes})
processes([1, 2])
