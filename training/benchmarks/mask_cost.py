"""The cost of making each mask, as a share of the training step that uses it.

    python training/benchmarks/mask_cost.py                                    # ViT-B/16 at 224 pixels, 64 pairs
    python training/benchmarks/mask_cost.py --model small --batch_size 256

Masks and steps take turns in one run; medians are compared. The step: forward and backward of both towers and AdamW, in bf16
autocast. The attentive mask's line includes its teacher, at half resolution.
"""

from functools import partial

import torch
from measure import TrainingStep, arguments, build_model, random_batch, side_by_side

from hf_maskclip import PatchSelection, build_patch_mask
from hf_maskclip.patch_masking import patch_masks
from hf_maskclip.patch_masking_attentive import AttentivePatchMask
from training.masking import AttentionTeacher

options = arguments("The cost of making each mask, as a share of the training step that uses it.").parse_args()
model = build_model(options.model, "none", options.device)
pixel_values, input_ids = random_batch(model, options.batch_size, options.device)
vision = model.config.vision_config
step = TrainingStep(model, options.device)

masks = {name: {"name": name} for name in patch_masks() if name != "none"}
masks["attentive"]["teacher_image_size"] = vision.image_size // 2
masks["pgs 0.5"] = {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}


def attentive_selection(mask: AttentivePatchMask, teacher: AttentionTeacher) -> PatchSelection:
    with torch.autocast(options.device, torch.bfloat16):
        scores = teacher.scores(pixel_values)
    return mask(pixel_values, patch_scores=scores)


making, training = {}, {}
for name, spec in masks.items():
    mask = build_patch_mask(spec, patch_size=vision.patch_size).to(options.device)
    making[name] = partial(mask, pixel_values)
    if mask.needs_patch_scores:
        model.vision_model.patch_mask = mask
        teacher = AttentionTeacher(model.vision_model)
        making[name] = partial(attentive_selection, mask, teacher)
    training[name] = partial(step, pixel_values, input_ids, making[name]())

mask_seconds = side_by_side(making, 5 * options.rounds, options.device)
step_seconds = side_by_side(training, options.rounds, options.device)
print(f"{options.model}, {options.batch_size} pairs, {vision.image_size} pixels, {options.device}")
print("| mask | making it, ms | training step, s | share of the step with its mask |\n|---|---|---|---|")
for name in masks:
    share = mask_seconds[name] / (mask_seconds[name] + step_seconds[name])
    print(f"| {name} | {1e3 * mask_seconds[name]:.1f} | {step_seconds[name]:.2f} | {share:.2%} |")
