"""The time and the memory of a training step: every mask beside its peers, in one run.

    python training/benchmarks/step_time.py            # ViT-B/16 at 224 pixels, 64 pairs
    python training/benchmarks/step_time.py --quick    # the small preset, in two minutes
    python training/benchmarks/step_time.py --model siglip-b-16 --masks "pgs 0.5"

A step is a plain call of the model, the contrastive loss, backward and AdamW, in bf16 autocast. All things take turns, round
after round; times are medians, ratios are taken within each round and given with their spread. Images and captions are the
same, captions padded as the family's processor pads them: what `MaskCLIPModel` saves there, it saves by itself. SigLIP always
encodes its 64 tokens.
open_clip is compared where it is installed. Masks share one set of weights.
"""

import gc
import statistics
from functools import partial

import torch
from measure import (
    arguments,
    build_model,
    build_plain_model,
    peak_memory,
    print_table,
    random_batch,
    ratio,
    seconds,
    side_by_side,
    step_flops,
    token_counts,
    training_step,
)

from hf_maskclip import ContrastiveLoss
from hf_maskclip.models.attention import fastest_attention
from hf_maskclip.models.patch_mask_registry import patch_masks

try:
    import open_clip
except ImportError:
    open_clip = None

# A teacher is measured by mask_cost.py.
MASKS = {name: {"name": name} for name, mask in patch_masks().items() if not mask.needs_patch_scores}
MASKS |= {"pgs 0.5": {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}}
OPEN_CLIP_NAMES = {"vit-b-16": "ViT-B-16", "vit-b-32": "ViT-B-32"}

parser = arguments("The time and the memory of a training step: every mask beside its peers, in one run.")
parser.add_argument("--variants", action="store_true", help="also pgs 0.5 compiled, and with gradient checkpointing")
parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS), help="those to measure; none is always")
options = parser.parse_args()
if options.quick:
    options.model, options.rounds = "small", 3
masks = ["none"] + [name for name in options.masks if name != "none"]

model = build_model(options.model, options.device)
caption_tokens, padded_tokens = token_counts(model, caption_tokens=24)
images, input_ids = random_batch(model, options.batch_size, options.device, caption_tokens, padded_tokens)
vision, text = model.config.vision_config, model.config.text_config
num_patches = (vision.image_size // vision.patch_size) ** 2
steps, flops, kept = {}, {}, {}

# ---- Ours ------------------------------------------------------------------------------------------------------------------
our_step = training_step(model, lambda: model(input_ids=input_ids, pixel_values=images, return_loss=True).loss, options.device)


def masked_step(spec: dict) -> None:
    model.set_patch_mask(spec)
    our_step()


for name in masks:
    steps[name] = partial(masked_step, MASKS[name])
    model.set_patch_mask(MASKS[name])
    visible = model.vision_model.select_patches(images).visible(num_patches).sum(dim=1).tolist()
    kept[name], flops[name] = sum(visible) / len(visible), step_flops(model, visible, caption_tokens)

if options.variants:
    for variant in ("compiled", "checkpointed"):
        other = build_model(options.model, options.device)
        other.set_patch_mask(MASKS["pgs 0.5"])
        if variant == "compiled":
            other.vision_model.encoder.compile()
            other.text_model.encoder.compile()
        else:
            other.gradient_checkpointing_enable()
        name = f"pgs 0.5, {variant}"
        steps[name] = training_step(
            other,
            lambda other=other: other(input_ids=input_ids, pixel_values=images, return_loss=True).loss,
            options.device,
        )
        kept[name], flops[name] = num_patches / 2, step_flops(model, [num_patches // 2] * options.batch_size, caption_tokens)

# ---- Peers -----------------------------------------------------------------------------------------------------------------
model.set_patch_mask("none")
plain = build_plain_model(model, options.device)
plain_name = type(plain).__name__
steps[plain_name] = training_step(
    plain, lambda: plain(input_ids=input_ids, pixel_values=images, return_loss=True).loss, options.device
)
peers = {plain_name: num_patches}
if open_clip is not None and options.model in OPEN_CLIP_NAMES:
    loss = ContrastiveLoss()
    for dropout in (0.0, 0.5):
        name = f"open_clip, patch dropout {dropout}" if dropout else "open_clip"
        peer = open_clip.create_model(OPEN_CLIP_NAMES[options.model], force_patch_dropout=dropout).to(options.device).train()
        steps[name] = training_step(peer, lambda peer=peer: loss(*peer(images, input_ids)), options.device)
        peers[name] = int(num_patches * (1 - dropout))
for name, count in peers.items():
    kept[name], flops[name] = count, step_flops(model, [count] * options.batch_size, input_ids.shape[1])


def attention_seconds(config, num_tokens: int, causal: bool) -> float:
    """Forward and backward of the attention of all layers of a tower, without its linear layers."""
    shape = (options.batch_size, config.num_attention_heads, num_tokens, config.hidden_size // config.num_attention_heads)
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, device=options.device, requires_grad=True) for _ in range(3))
    module = torch.nn.Module()
    module.is_causal = causal

    def forward_and_backward() -> None:
        output, _ = fastest_attention(module, query, key, value, None, scaling=shape[-1] ** -0.5)
        output.backward(torch.ones_like(output))

    forward_and_backward()
    each = statistics.median(seconds(forward_and_backward, options.device) for _ in range(5))
    return config.num_hidden_layers * each


# ---- Measure ---------------------------------------------------------------------------------------------------------------
times = side_by_side(steps, options.rounds, options.device)
memory, making, attention = {}, {}, {}
for name, step in steps.items():
    gc.collect()
    memory[name] = peak_memory(step, options.device)
    if name in masks:
        model.set_patch_mask(MASKS[name])
        making[name] = statistics.median(
            seconds(lambda: model.vision_model.select_patches(images), options.device) for _ in range(5)
        )
        attention[name] = attention_seconds(vision, 1 + round(kept[name]), False) + attention_seconds(
            text, caption_tokens, plain_name == "CLIPModel"
        )

rows = []
for name in [*peers, *(name for name in steps if name not in peers)]:
    median = statistics.median(times[name])
    faster = "{:.2f} ({:.2f} to {:.2f})".format(*ratio(times[plain_name], times[name]))
    relative = "{:.2f} ({:.2f} to {:.2f})".format(*ratio(times[name], times["none"])) if name not in peers else ""
    saved, promised = 1 - median / statistics.median(times["none"]), 1 - flops[name] / flops["none"]
    rows.append(
        {
            "model": name,
            "patches encoded": f"{kept[name]:.0f}",
            "images/s": f"{options.batch_size / median:.1f}",
            f"times {plain_name}'s speed": faster,
            "time, of our unmasked": relative,
            "TFLOP": f"{flops[name] / 1e12:.2f}",
            "of the saving by FLOPs": f"{saved / promised:.0%}" if name in masks and promised > 0 else "",
            "attention": f"{attention[name] / median:.0%}" if name in masks else "",
            "making the mask": f"{making[name] / median:.2%}" if name in masks and name != "none" else "",
            "memory beyond weights, GB": f"{memory[name] / 1e9:.2f}",
        }
    )
title = (
    f"{options.model}, {vision.image_size} pixels, {options.batch_size} pairs, "
    f"captions of {caption_tokens} tokens padded to {padded_tokens}"
)
title += f", {options.device}, {torch.get_num_threads()} threads, medians of {options.rounds}"
print_table(title, rows, options.output)
