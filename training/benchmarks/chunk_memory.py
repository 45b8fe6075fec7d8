"""The memory and the time of large batches, in one piece and in chunks.

    python training/benchmarks/chunk_memory.py              # the small preset at pgs 0.5, up to 4,096 pairs
    python training/benchmarks/chunk_memory.py --quick

Memory is what forward and backward take at their peak beyond weights and inputs. In chunks it should follow the chunk, not the
batch; the time should be about 4 / 3, because each pair is encoded forwards twice and backwards once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import arguments, build_model, peak_memory, print_table, random_batch, seconds

from hf_maskclip import ContrastiveLoss, PatchSelection, cached_contrastive_backward

parser = arguments("The memory and the time of large batches, in one piece and in chunks.", model="small")
parser.add_argument("--batch_sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="pairs a step")
parser.add_argument("--chunk_size", type=int, default=256, help="pairs encoded at a time")
parser.add_argument("--largest_piece", type=int, default=1024, help="the largest batch that is tried in one piece")
options = parser.parse_args()
if options.quick:
    options.batch_sizes, options.chunk_size, options.largest_piece = [64, 128, 256], 64, 128

model = build_model(options.model, options.device)
model.set_patch_mask({"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5})
loss = ContrastiveLoss()


def in_one_piece(inputs: dict[str, Any]) -> None:
    with torch.autocast(options.device, torch.bfloat16):
        outputs = model(**inputs)
    loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp()).backward()
    model.zero_grad(set_to_none=True)


def in_chunks(inputs: dict[str, Any]) -> None:
    batch_size = len(inputs["input_ids"])
    chunks = [partial(rows_of, inputs, start, start + options.chunk_size) for start in range(0, batch_size, options.chunk_size)]
    with torch.autocast(options.device, torch.bfloat16):
        cached_contrastive_backward(model, model.logit_scale, chunks, loss)
    model.zero_grad(set_to_none=True)


def rows_of(inputs: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    selection = PatchSelection(inputs["patch_selection"].indices[first:last])
    return {key: inputs[key][first:last] for key in ("pixel_values", "input_ids")} | {"patch_selection": selection}


rows = []
for batch_size in options.batch_sizes:
    images, input_ids = random_batch(model, batch_size, options.device)
    selection = model.vision_model.select_patches(images)
    inputs = {"pixel_values": images, "input_ids": input_ids, "patch_selection": selection}
    steps: dict[str, Callable[[], None]] = {"in chunks": partial(in_chunks, inputs)}
    if batch_size <= options.largest_piece:
        steps = {"in one piece": partial(in_one_piece, inputs)} | steps
    row = {"pairs": batch_size}
    for name, step in steps.items():
        row |= {
            f"{name}, GB": f"{peak_memory(step, options.device) / 1e9:.2f}",
            f"{name}, s": f"{seconds(step, options.device):.1f}",
        }
    rows.append({"pairs": batch_size, "in one piece, GB": "", "in one piece, s": ""} | row)
print_table(f"{options.model}, pgs 0.5, {options.device}: chunks of {options.chunk_size} pairs", rows, options.output)
