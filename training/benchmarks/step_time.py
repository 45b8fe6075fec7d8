"""The time and the memory of a training step: every mask and other reduction beside its peers, in one run.

    python training/benchmarks/step_time.py            # ViT-B/16 at 224 pixels, 64 pairs
    python training/benchmarks/step_time.py --quick    # the small preset, in two minutes
    python training/benchmarks/step_time.py --only "pgs 0.5" "resize 112" "text 8 tokens"
    python training/benchmarks/step_time.py --model siglip-b-16 --only "pgs 0.5"

A step is a plain call of the model, the contrastive loss, backward and AdamW, in bf16 autocast. All things take turns, round
after round; times are medians, ratios are taken within each round and given with their spread. Images and captions are the
same, captions padded as the family's processor pads them: what `MaskCLIPModel` saves there, it saves by itself. SigLIP always
encodes its 64 tokens.
`resize` has pictures of half the side, where that is a multiple of the patch size, and interpolates the position embeddings.
`text 8 tokens` has captions of 8 tokens in place of 24. `two views` encodes each picture under two masks, its caption once.
open_clip is compared where it is installed. All that is ours shares one set of weights.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measure import (
    MASKS,
    arguments,
    build_model,
    build_open_clip,
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
from training.model.loss import prepare_loss
from training.model.small_pictures import resize_positions_smoothly

QUARTER = {"name": "random", "mask_ratio": 0.75}


@dataclass(frozen=True)
class Case:
    """A step to measure.

    Attributes:
        visible: the patches of each image, or of each of its views, that are encoded.
        caption_tokens: of each caption that are encoded.
        spec: of the mask, where the step is one of ours and has no peer's or variant's own weights.
        images: that this mask chooses from.
    """

    step: Callable[[], None]
    visible: list[int]
    caption_tokens: int
    spec: dict[str, Any] | None = None
    images: torch.Tensor | None = None

    @property
    def patches(self) -> float:
        return sum(self.visible) / options.batch_size

    @property
    def flops(self) -> float:
        return step_flops(model, self.visible, [self.caption_tokens] * options.batch_size)


parser = arguments("The time and the memory of a training step: every mask and other reduction beside its peers, in one run.")
parser.add_argument("--variants", action="store_true", help="also pgs 0.5 compiled, and with gradient checkpointing")
parser.add_argument("--only", nargs="+", help="those of our rows to measure, by name; none and the peers are always")
options = parser.parse_args()
if options.quick:
    options.model, options.rounds = "small", 3

model = build_model(options.model, options.device)
resize_positions_smoothly(model)
pair_loss = prepare_loss("auto", model, is_fresh=True)
vision, text = model.config.vision_config, model.config.text_config
caption_tokens, padded_tokens = token_counts(model, caption_tokens=24)
short_tokens, _ = token_counts(model, caption_tokens=8)
images, input_ids = random_batch(model, options.batch_size, options.device, caption_tokens, padded_tokens)
num_patches = (vision.image_size // vision.patch_size) ** 2

# ---- Ours ------------------------------------------------------------------------------------------------------------------
# By row: a mask, pictures and captions.
reductions = {name: (spec, images, input_ids) for name, spec in MASKS.items()}
half = vision.image_size // 2
if half % vision.patch_size == 0:
    smaller = torch.nn.functional.interpolate(images, (half, half), mode="bicubic", antialias=True)
    reductions[f"resize {half}"] = (MASKS["none"], smaller, input_ids)
if short_tokens < caption_tokens:
    _, short = random_batch(model, options.batch_size, options.device, short_tokens, padded_tokens)
    reductions[f"text {short_tokens} tokens"] = (MASKS["none"], images, short)
    reductions[f"pgs 0.5 + text {short_tokens} tokens"] = (MASKS["pgs 0.5"], images, short)
reductions["random 0.75, two views"] = (QUARTER, images.repeat_interleave(2, dim=0), input_ids)
if unknown := [name for name in options.only or () if name not in reductions]:
    parser.error(f"--only {unknown[0]!r}: must be of {', '.join(map(repr, reductions))}")
inputs: dict[str, Any] = {}
our_step = training_step(model, lambda: pair_loss(model(**inputs)), options.device)


def reduced_step(spec: dict[str, Any], pixel_values: torch.Tensor, captions: torch.Tensor) -> None:
    model.set_patch_mask(spec)
    inputs.update(
        input_ids=captions, pixel_values=pixel_values, interpolate_pos_encoding=len(pixel_values[0, 0]) < vision.image_size
    )
    our_step()


def encoded_tokens(captions: torch.Tensor) -> int:
    """The columns of captions (B, S) that the text tower sees: `MaskCLIPModel` cuts padding on a CPU."""
    seen: list[int] = []
    hook = model.text_model.embeddings.register_forward_hook(lambda module, given, output: seen.append(output.shape[1]))
    model(input_ids=captions[:1], pixel_values=images[:1])
    hook.remove()
    return seen[0]


cases: dict[str, Case] = {}
for name in ["none", *(name for name in reductions if name != "none" and name in (options.only or reductions))]:
    spec, pixel_values, captions = reductions[name]
    model.set_patch_mask(spec)
    visible = model.vision_model.select_patches(pixel_values).valid().sum(dim=1).tolist()
    step = partial(reduced_step, spec, pixel_values, captions)
    cases[name] = Case(step, visible, encoded_tokens(captions), spec, pixel_values)

if options.variants:
    for variant in ("compiled", "checkpointed"):
        other = build_model(options.model, options.device)
        other.set_patch_mask(MASKS["pgs 0.5"])
        if variant == "compiled":
            other.vision_model.encoder.compile()
            other.text_model.encoder.compile()
        else:
            other.gradient_checkpointing_enable()
        step = training_step(
            other,
            lambda other=other: other(input_ids=input_ids, pixel_values=images, return_loss=True).loss,
            options.device,
        )
        cases[f"pgs 0.5, {variant}"] = Case(step, [num_patches // 2] * options.batch_size, cases["none"].caption_tokens)

# ---- Peers -----------------------------------------------------------------------------------------------------------------
model.set_patch_mask("none")
plain = build_plain_model(model, options.device)
plain_name = type(plain).__name__
step = training_step(plain, lambda: plain(input_ids=input_ids, pixel_values=images, return_loss=True).loss, options.device)
peers = {plain_name: Case(step, [num_patches] * options.batch_size, padded_tokens)}
loss = ContrastiveLoss()
for dropout in (0.0, 0.5):
    name = f"open_clip, patch dropout {dropout}" if dropout else "open_clip"
    if (peer := build_open_clip(options.model, dropout, options.device)) is not None:
        step = training_step(peer, lambda peer=peer: loss(*peer(images, input_ids)), options.device)
        peers[name] = Case(step, [int(num_patches * (1 - dropout))] * options.batch_size, padded_tokens)


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
times = side_by_side({name: case.step for name, case in (cases | peers).items()}, options.rounds, options.device)
unmasked, rows = cases["none"], []
for name, case in (peers | cases).items():
    median = statistics.median(times[name])
    of_unmasked, promised = ratio(times[name], times["none"]), 1 - case.flops / unmasked.flops
    row = {
        "model": name,
        "patches encoded": f"{case.patches:.0f}",
        "caption tokens encoded": case.caption_tokens,
        "images/s": f"{options.batch_size / median:.1f}",
        f"times {plain_name}'s speed": "{:.2f} ({:.2f} to {:.2f})".format(*ratio(times[plain_name], times[name])),
        "time, of our unmasked": "",
        "TFLOP": f"{case.flops / 1e12:.2f}",
        "TFLOP, of our unmasked": "",
        "of the saving by FLOPs": "",
        "attention": "",
        "making the mask": "",
    }
    if name in cases:
        row["time, of our unmasked"] = "{:.2f} ({:.2f} to {:.2f})".format(*of_unmasked)
        row["TFLOP, of our unmasked"] = f"{1 - promised:.2f}"
    if case.spec is not None:
        row["of the saving by FLOPs"] = f"{(1 - of_unmasked[0]) / promised:.0%}" if promised > 0 else ""
    if case.spec is not None and len(case.visible) == options.batch_size:
        attention = attention_seconds(vision, 1 + round(case.patches), False)
        attention += attention_seconds(text, case.caption_tokens, plain_name == "CLIPModel")
        row["attention"] = f"{attention / median:.0%}"
    if case.spec not in (None, MASKS["none"]):
        model.set_patch_mask(case.spec)
        choose = partial(model.vision_model.select_patches, case.images)
        row["making the mask"] = f"{statistics.median(seconds(choose, options.device) for _ in range(5)) / median:.2%}"
    gc.collect()
    row["memory beyond weights, GB"] = f"{peak_memory(case.step, options.device) / 1e9:.2f}"
    rows.append(row)
title = (
    f"{options.model}, {vision.image_size} pixels, {options.batch_size} pairs, "
    f"captions of {caption_tokens} tokens padded to {padded_tokens}"
)
title += f", {options.device}, {torch.get_num_threads()} threads, medians of {options.rounds}"
print_table(title, rows, options.output)
