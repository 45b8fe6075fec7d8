"""The cost of making each mask, as a share of the training step that uses it.

    python training/benchmarks/mask_cost.py                                    # ViT-B/16 at 224 pixels, 64 pairs
    python training/benchmarks/mask_cost.py --model small --batch_size 256

Masks and steps take turns in one run; medians are compared. The step: forward and backward of both towers and AdamW, in bf16
autocast. The attentive mask's line includes its teacher, at half resolution.
"""

import statistics
from functools import partial

import torch
from measure import arguments, build_model, print_table, random_batch, side_by_side, training_step

from hf_maskclip import PatchSelection, build_patch_mask
from hf_maskclip.mask_schedule import AttentionTeacher
from hf_maskclip.models.patch_mask_registry import patch_masks
from hf_maskclip.models.patch_masking_attentive import AttentivePatchMask

options = arguments("The cost of making each mask, as a share of the training step that uses it.", rounds=3).parse_args()
if options.quick:
    options.model = "small"
model = build_model(options.model, options.device)
pixel_values, input_ids = random_batch(model, options.batch_size, options.device)
vision = model.config.vision_config
selection = None  # of the step that is measured
step = training_step(
    model,
    lambda: model(input_ids=input_ids, pixel_values=pixel_values, patch_selection=selection, return_loss=True).loss,
    options.device,
)

masks = {name: {"name": name} for name, mask in patch_masks().items() if not mask.keeps_all}
masks["attentive"]["teacher_image_size"] = vision.image_size // 2
masks["pgs 0.5"] = {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}


def attentive_selection(mask: AttentivePatchMask, teacher: AttentionTeacher) -> PatchSelection:
    with torch.autocast(options.device, torch.bfloat16):
        scores = teacher.scores(pixel_values)
    return mask(pixel_values, patch_scores=scores)


def step_with(given: PatchSelection) -> None:
    global selection
    selection = given
    step()


making, training = {}, {}
for name, spec in masks.items():
    mask = build_patch_mask(spec, patch_size=vision.patch_size).to(options.device)
    making[name] = partial(mask, pixel_values)
    if mask.needs_patch_scores:
        model.vision_model.patch_mask = mask
        making[name] = partial(attentive_selection, mask, AttentionTeacher(model.vision_model, [mask]))
    training[name] = partial(step_with, making[name]())

mask_times = side_by_side(making, 5 * options.rounds, options.device)
step_times = side_by_side(training, options.rounds, options.device)
rows = []
for name in masks:
    making_it, training_it = statistics.median(mask_times[name]), statistics.median(step_times[name])
    share = making_it / (making_it + training_it)
    rows.append(
        {"mask": name, "making it, ms": f"{1e3 * making_it:.1f}", "step, s": f"{training_it:.2f}", "share": f"{share:.2%}"}
    )
print_table(f"{options.model}, {options.batch_size} pairs, {vision.image_size} pixels, {options.device}", rows, options.output)
