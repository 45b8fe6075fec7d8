"""What fewer tokens of a caption save of a training step, beside what the FLOPs promise.

    python training/benchmarks/text_tokens.py

The saving is a few percent of a step, less than the spread of its time. So it is measured where it arises, in forward and
backward of the text tower alone, by the seconds of the processor, and stands beside those of the whole step. All take turns.
"""

import statistics
import time
from functools import partial

import torch
from measure import arguments, build_model, print_table, random_batch, step_flops

LENGTHS = (24, 8)

options = arguments("What fewer tokens of a caption save of a training step, beside what the FLOPs promise.").parse_args()
model = build_model(options.model, options.device)
images, captions = random_batch(model, options.batch_size, options.device, caption_tokens=LENGTHS[0])
vision = model.config.vision_config
patches = [(vision.image_size // vision.patch_size) ** 2] * options.batch_size


def whole_step() -> torch.Tensor:
    return model(input_ids=captions, pixel_values=images, return_loss=True).loss


def text_tower(length: int) -> torch.Tensor:
    return model.text_model(input_ids=captions[:, :length]).last_hidden_state.float().sum()


def processor_seconds(function) -> float:
    """Of forward and backward."""
    start = time.process_time()
    with torch.autocast(options.device, torch.bfloat16):
        value = function()
    value.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return time.process_time() - start


functions = {"step": whole_step} | {length: partial(text_tower, length) for length in LENGTHS}
times: dict = {name: [processor_seconds(function)] for name, function in functions.items()}  # the first call allocates
for _ in range(options.rounds):
    for name, function in functions.items():
        times[name].append(processor_seconds(function))
step, long, short = (statistics.median(times[name][1:]) for name in functions)
flops = [step_flops(model, patches, [length] * options.batch_size) for length in LENGTHS]
saved, promised = (long - short) / step, 1 - flops[1] / flops[0]
row = {"step, CPU seconds": f"{step:.1f}", "text tower": f"{long:.2f} with {LENGTHS[0]} tokens, {short:.2f} with {LENGTHS[1]}"}
row |= {"saved of the step": f"{saved:.2%}", "promised": f"{promised:.2%}", "of the promise": f"{saved / promised:.0%}"}
print_table(
    f"{options.model}, {options.batch_size} pairs, {options.device}, medians of {options.rounds}", [row], options.output
)
