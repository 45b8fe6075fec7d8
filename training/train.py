"""Pre-train or fine-tune a CLIP with masked patches.

    accelerate launch training/train.py                                  # the quickstart, on scenes drawn on the fly
    accelerate launch training/train.py --config FILE.yaml --key value   # any other run; --help lists the options

Shapes: B pairs per process, S caption tokens, E projection size.
"""

import json
import math
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from datasets import IterableDataset
from torchvision.transforms.v2.functional import normalize
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file runs as a script from anywhere

from hf_maskclip import (
    ContrastiveLoss,
    MaskCLIPModel,
    MaskCLIPVisionConfig,
    PatchSelection,
    cached_contrastive_backward,
    export_to_clip,
)
from hf_maskclip.visualization import draw_patch_masks
from training.checkpoint import DataProgress, checkpoint_step, latest_checkpoint, prepare_output_dir, save_checkpoint
from training.config import ConfigError, TrainingConfig, describe_options, fail, load_config
from training.data import (
    PairBatches,
    PairDecoder,
    build_loader,
    captions_of,
    first_pair,
    sample_images,
    shard_stream,
    train_transform,
)
from training.evaluate import evaluate_sets, load_evaluation_sets
from training.masking import ChunkInputs, PatchSelector
from training.model import CONTEXT_LENGTH, build_model, build_processor, check_names, load_tokenizer
from training.sources import open_stream
from training.text_masking import TextMask
from training.tokenizer import train_tokenizer
from training.tracking import MetricsLog, check_tracker, draw_curves

TOKENIZER_CAPTIONS = 20_000  # captions that a tokenizer is trained on
MAX_LOGIT_SCALE = math.log(100)  # CLIP's bound, without which training can diverge


def main(config: TrainingConfig) -> dict[str, Any]:
    """Run a training and return its evaluation, which is also in `eval.json`.

    Raises:
        ConfigError: an option or the data it names cannot be used; raised before training starts.
    """
    check_names(config.model, config.tokenizer)
    check_tracker(config.report_to)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
    )
    use_all_cores(accelerator)
    set_seed(config.seed)
    num_steps, warmup_steps = config.schedule(accelerator.num_processes)
    output_dir = Path(config.output_dir)
    checkpoint = latest_checkpoint(output_dir) if config.resume == "auto" else None
    model_source = str(checkpoint) if checkpoint else config.model  # with the tokenizer and the processor that go with it

    # ---- Data ----------------------------------------------------------------------------------------------------------
    decoder = PairDecoder(config.image_key, config.caption_key)
    stream = open_stream(config.train_data, seed=config.seed)
    first_pair(stream, decoder, config.train_data)
    shard = dict(process=accelerator.process_index, num_processes=accelerator.num_processes, num_workers=config.num_workers)
    buffer_size = 0 if config.train_data == "scenes" else config.shuffle_buffer  # scenes are independent of each other
    train_stream = shard_stream(stream, seed=config.seed, buffer_size=buffer_size, **shard)

    # ---- Model ---------------------------------------------------------------------------------------------------------
    tokenizer = load_tokenizer("" if checkpoint else config.tokenizer, model_source)
    if tokenizer is None:
        captions = captions_of(stream, decoder, TOKENIZER_CAPTIONS)
        tokenizer = train_tokenizer(captions, config.vocab_size, CONTEXT_LENGTH)
    model = build_model(model_source, config.patch_mask, tokenizer)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.compile:
        for tower in (model.vision_model, model.text_model):
            tower.encoder.compile()  # in place: the keys of the weights stay
    processor = build_processor(model_source, model, tokenizer)
    vision_config, text_config = model.config.vision_config, model.config.text_config
    decoder.image_size = vision_config.image_size
    eval_data = config.eval_data or ("scenes" if config.train_data == "scenes" else "")
    eval_sets = load_evaluation_sets(eval_data, decoder, vision_config.image_size)

    flip = 0.0 if config.train_data == "scenes" else config.flip
    transform = train_transform(vision_config.image_size, config.crop_scale, flip)
    context_length = text_config.max_position_embeddings
    if config.text_tokens > context_length:
        fail(f"text_tokens={config.text_tokens}: the context of model={config.model!r} has {context_length}")
    text_mask = TextMask(config.text_mask, config.text_tokens or context_length)
    train_decoder = replace(decoder, crop_scale=config.crop_scale)
    progress = DataProgress(accelerator, config.num_workers)
    positions, used_batches = progress.load(checkpoint) if checkpoint else ({}, 0)
    batches = PairBatches(
        train_stream, train_decoder, transform, tokenizer, text_mask, config.batch_size, config.seed, positions
    )
    loader = build_loader(batches, config.num_workers)

    # ---- Optimizer -----------------------------------------------------------------------------------------------------
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps, num_steps)
    # The schedule is stepped by the loop alone: prepared, it would advance once for every process.
    trained_model, optimizer = accelerator.prepare(model, optimizer)
    contrastive_loss = ContrastiveLoss()
    patches = PatchSelector(model.vision_model, config, num_steps, accelerator)
    accelerator.register_for_checkpointing(schedule)
    first_step = 1
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        first_step = checkpoint_step(checkpoint) + 1
    chunk_size = config.chunk_size or config.batch_size
    image_mean, image_std = processor.image_processor.image_mean, processor.image_processor.image_std

    def to_model(pixels: torch.Tensor) -> torch.Tensor:  # bytes (B, C, H, W), normalised on the device
        return normalize(pixels.to(accelerator.device).float() / 255, image_mean, image_std)

    # ---- Loop ----------------------------------------------------------------------------------------------------------
    if accelerator.is_main_process:
        if checkpoint:
            print(f"going on from {checkpoint}")
        elif moved := prepare_output_dir(output_dir):
            print(f"{output_dir} held an earlier run: moved to {moved}")
        (output_dir / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    accelerator.wait_for_everyone()
    if config.report_to != "none":
        accelerator.init_trackers("hf_maskclip", config=asdict(config))
    log = MetricsLog(accelerator, output_dir)
    log.forget_after(first_step - 1)
    samples_per_step = config.batch_size * accelerator.num_processes
    num_patches = (vision_config.image_size // vision_config.patch_size) ** 2
    shows_bar = accelerator.is_main_process and sys.stderr.isatty()
    progress_bar = tqdm(total=num_steps, initial=first_step - 1, unit="step", disable=not shows_bar)
    trained_model.train()
    loop_start = step_end = time.perf_counter()
    batch_iterator = iter(loader)
    for _ in range(used_batches):
        progress.use(next(batch_iterator), again=True)
    for step in range(first_step, num_steps + 1):
        batch = next(batch_iterator)
        data_seconds = time.perf_counter() - step_end
        progress.use(batch)

        # -- one training step --
        chunks = [
            ChunkInputs(batch, slice(start, start + chunk_size), to_model, partial(patches.select, step=step, chunk=number))
            for number, start in enumerate(range(0, config.batch_size, chunk_size))
        ]
        if len(chunks) == 1:
            outputs = trained_model(**chunks[0]())
            loss = contrastive_loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp())
            accelerator.backward(loss)
        else:
            loss = cached_contrastive_backward(trained_model, model.logit_scale, chunks, contrastive_loss)
        if config.max_grad_norm:
            accelerator.clip_grad_norm_(trained_model.parameters(), config.max_grad_norm)
        learning_rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        patches.after_step(step)
        # -- end of the step --

        if config.log_every and step % config.log_every == 0:
            mean_loss = accelerator.reduce(loss.detach(), reduction="mean").item()
            step_seconds = time.perf_counter() - step_end
            values = {
                "loss": mean_loss,
                "learning_rate": learning_rate,
                "logit_scale": model.logit_scale.exp().item(),
                "kept_share": sum(kept_share(chunk.selection, num_patches) for chunk in chunks) / len(chunks),
                "samples_seen": step * samples_per_step,
                "samples_per_second": samples_per_step / step_seconds,
                "data_seconds": data_seconds,
                "step_seconds": step_seconds,
            }
            log.write(step, **values, skipped=total_counts(progress.skipped))
            progress_bar.set_postfix_str(
                f"loss {mean_loss:.3f}, {values['samples_per_second']:.0f} pairs/s, {values['kept_share']:.0%} of patches"
            )
        progress_bar.update()
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            save_checkpoint(accelerator, model, processor, progress, output_dir, step, config.keep_checkpoints)
        if config.eval_every and step % config.eval_every == 0 and step < num_steps:
            report_evaluation(log, step, evaluate_sets(model, processor, eval_sets))
        step_end = time.perf_counter()
    progress_bar.close()
    train_seconds = time.perf_counter() - loop_start

    # ---- Results -------------------------------------------------------------------------------------------------------
    if accelerator.is_main_process:
        export_to_clip(model, output_dir / "export", processor)  # before anything else can fail
    results = evaluate_sets(model, processor, eval_sets)
    report_evaluation(log, num_steps, results)
    summary = {
        "model": config.model,
        "patch_mask": vision_config.patch_mask,
        "eval_data": eval_data,
        "steps": num_steps,
        "samples_seen": num_steps * samples_per_step,
        "train_seconds": round(train_seconds, 1),
        "skipped": total_counts(progress.skipped),
        "results": results,
    }
    if accelerator.is_main_process:
        save_results(output_dir, summary, vision_config, stream, decoder)
        print_summary(output_dir, summary)
    accelerator.end_training()
    return summary


def use_all_cores(accelerator: Accelerator) -> None:
    """Give each training process its share of the CPU: `accelerate launch` leaves a single thread to it."""
    if accelerator.device.type == "cpu":
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, os.cpu_count() // processes_here))


def kept_share(selection: PatchSelection | None, num_patches: int) -> float:
    return 1.0 if selection is None else selection.kept_share(num_patches).item()


def total_counts(counts: Counter[str]) -> dict[str, int]:
    """The sum of the counts of all processes."""
    return dict(sum(gather_object([counts]), Counter()))


def parameter_groups(model: MaskCLIPModel, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, embeddings and the logit scale do not."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim >= 2 and "embedding" not in name].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def report_evaluation(log: MetricsLog, step: int, results: dict[str, dict[str, Any]]) -> None:
    numbers = {f"eval/{name}/{key}": value for name, metrics in results.items() for key, value in metrics.items()}
    if numbers:
        log.write(step, **{key: value for key, value in numbers.items() if isinstance(value, (int, float))})


def save_results(
    output_dir: Path,
    summary: dict[str, Any],
    vision_config: MaskCLIPVisionConfig,
    stream: IterableDataset,
    decoder: PairDecoder,
) -> None:
    """Write `eval.json`, `masks.png` (eight training pictures) and `curves.png`."""
    (output_dir / "eval.json").write_text(json.dumps(summary, indent=2) + "\n")
    images = sample_images(stream, decoder, count=8)
    masks = {"random": "random", "cluster": "cluster", "PGS 0.3": "pgs"}
    masks["PGS 0.5"] = {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}
    sizes = {"image_size": vision_config.image_size, "patch_size": vision_config.patch_size}
    draw_patch_masks(images, masks, **sizes).savefig(output_dir / "masks.png", dpi=150)
    if (output_dir / "metrics.jsonl").exists():
        draw_curves(output_dir / "metrics.jsonl").savefig(output_dir / "curves.png", dpi=150)


def print_summary(output_dir: Path, summary: dict[str, Any]) -> None:
    print(f"\n{summary['samples_seen']} pairs in {summary['steps']} steps, {summary['train_seconds']:.0f} s")
    if summary["skipped"]:
        print("skipped samples: " + ", ".join(f"{cause} {count}" for cause, count in summary["skipped"].items()))
    for name, metrics in summary["results"].items():
        shown = {k: v for k, v in metrics.items() if k in ("top1", "mean_per_class") or k.endswith("recall@10")}
        print(f"{name}: " + ", ".join(f"{key} {value:.1%}" for key, value in shown.items()))
    print(f"""
Written to {output_dir}: export/, eval.json, metrics.jsonl, masks.png, curves.png. To load the model:

    from transformers import AutoModel, pipeline
    model = AutoModel.from_pretrained("{output_dir}/export")
    classify = pipeline("zero-shot-image-classification", model="{output_dir}/export")
""")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\nOptions, with their defaults:\n{describe_options()}")
        sys.exit(0)
    try:
        main(load_config())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
