"""Pre-train or fine-tune a CLIP with masked patches.

    accelerate launch training/train.py                                  # the quickstart, on scenes drawn on the fly
    accelerate launch training/train.py --config FILE.yaml --key value   # any other run; --help lists the options
    python training/train.py --config FILE.yaml --dry_run                # what that run would take, and one small step of it

Shapes: B pairs per process, S caption tokens, E projection size.
"""

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from datasets import IterableDataset
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import normalize
from tqdm.auto import tqdm
from transformers import CLIPProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file runs as a script from anywhere

from hf_maskclip import ContrastiveLoss, MaskCLIPConfig, MaskCLIPModel, cached_contrastive_backward, export_to_clip
from hf_maskclip.losses import cpu_group, world_size
from hf_maskclip.visualization import draw_patch_masks
from training.checkpoint import Position, Progress, checkpoint_step, latest_checkpoint, prepare_output_dir, save_checkpoint
from training.config import TrainingConfig, describe_options, load_config
from training.data import (
    PairBatches,
    PairDecoder,
    build_loader,
    captions_of,
    first_pair,
    sample_images,
    shard_stream,
    start_workers,
    train_transform,
)
from training.errors import ConfigError, TrainingStopped, fail
from training.evaluate import EvaluationSet, evaluate_sets, load_evaluation_sets
from training.masking import ChunkInputs, PatchSelector, kept_patches
from training.model import CONTEXT_LENGTH, build_model, build_processor, check_names, load_tokenizer
from training.optimization import build_average, build_optimizer, clamp_logit_scale
from training.sources import open_stream
from training.stopping import NumberOnHost, StopRequest
from training.text_masking import TextMask
from training.tokenizer import train_tokenizer
from training.tracking import MetricsLog, SlowDataWarning, check_tracker, draw_curves, start_tracker

TOKENIZER_CAPTIONS = 20_000  # captions that a tokenizer is trained on


@dataclass
class Run:
    """What a run works with, on this process."""

    config: TrainingConfig
    accelerator: Accelerator
    num_steps: int
    checkpoint: Path | None  # that the run goes on from
    stream: IterableDataset
    decoder: PairDecoder
    processor: CLIPProcessor
    eval_sets: list[EvaluationSet]
    progress: Progress
    loader: DataLoader
    num_batches_used: int  # of the loader, before the checkpoint
    model: MaskCLIPModel
    trained_model: torch.nn.Module  # the same, in the wrapper that makes the gradients of all processes one
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    patches: PatchSelector

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def samples_per_step(self) -> int:
        return self.config.batch_size * self.accelerator.num_processes

    @property
    def result(self) -> MaskCLIPModel:
        """The model that is evaluated and exported."""
        return self.average.module if self.average else self.model

    def to_model(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bytes (B, C, H, W) as the model takes them, normalised on its device."""
        image_processor = self.processor.image_processor
        pixels = pixels.to(self.accelerator.device).float() / 255
        return normalize(pixels, image_processor.image_mean, image_processor.image_std)

    def save(self, step: int) -> Path:
        keep = self.config.keep_checkpoints
        return save_checkpoint(self.accelerator, self.model, self.processor, self.progress, self.output_dir, step, keep)


class NonFiniteLoss(ArithmeticError):
    """The loss of a step is not a number. Nothing has changed in that step."""


def main(config: TrainingConfig) -> dict[str, Any]:
    """Run a training and return its evaluation, which is also in `eval.json`; `{}` where SIGTERM ended it.

    Raises:
        ConfigError: an option or the data it names cannot be used; raised before training starts.
        TrainingStopped: training cannot go on; what it had learnt is in a checkpoint.
    """
    run = prepare(config)
    log = start_reports(run)
    with StopRequest() as stop:
        is_complete = train(run, log, stop)
    results = finish(run, log) if is_complete else {}
    run.accelerator.end_training()
    return results


def prepare(config: TrainingConfig) -> Run:
    """Everything that a run needs, in order: data, model, loader, optimizer. Nothing is written yet."""
    check_names(config.model, config.tokenizer)
    check_tracker(config.report_to)
    accelerator = start_accelerator(config)
    num_steps, warmup_steps = config.schedule(accelerator.num_processes)
    checkpoint = latest_checkpoint(Path(config.output_dir)) if config.resume == "auto" else None

    decoder = PairDecoder(config.image_key, config.caption_key)
    stream = open_stream(config.train_data, seed=config.seed)
    first_pair(stream, decoder, config.train_data)
    open_epoch = epoch_opener(stream, config, accelerator)

    captions = captions_of(stream, decoder, TOKENIZER_CAPTIONS)
    model, processor = load_model(config, checkpoint, captions)
    decoder.image_size = model.config.vision_config.image_size
    eval_data = config.eval_data or ("scenes" if config.train_data == "scenes" else "")
    eval_sets = load_evaluation_sets(eval_data, decoder, decoder.image_size)

    progress = Progress(accelerator, config.num_workers, exact=config.stream == "exact")
    positions, num_batches_used = progress.load(checkpoint) if checkpoint else ({}, 0)
    loader = training_loader(open_epoch, config, decoder, processor, model.config, positions)

    average = build_average(model, config.ema_momentum)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.compile:
        for tower in (model.vision_model, model.text_model):
            tower.encoder.compile()  # in place: the keys of the weights stay
    optimizer, schedule = build_optimizer(model, config, num_steps, warmup_steps)
    # The schedule is stepped by the loop alone: prepared, it would advance once for every process.
    trained_model, optimizer = accelerator.prepare(model, optimizer)
    patches = PatchSelector(model.vision_model, config, num_steps, accelerator)
    accelerator.register_for_checkpointing(schedule)
    if average:
        accelerator.register_for_checkpointing(average.to(accelerator.device))
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    return Run(
        config=config,
        accelerator=accelerator,
        num_steps=num_steps,
        checkpoint=checkpoint,
        stream=stream,
        decoder=decoder,
        processor=processor,
        eval_sets=eval_sets,
        progress=progress,
        loader=loader,
        num_batches_used=num_batches_used,
        model=model,
        trained_model=trained_model,
        average=average,
        optimizer=optimizer,
        schedule=schedule,
        patches=patches,
    )


def start_accelerator(config: TrainingConfig) -> Accelerator:
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            fail(
                f"ACCELERATE_USE_{name}: weights cannot be split over processes here (their scalar logit_scale cannot); use DDP"
            )
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
    )
    if accelerator.device.type == "cpu":  # `accelerate launch` leaves a single thread to each process
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, os.cpu_count() // processes_here))
    set_seed(config.seed)
    return accelerator


def epoch_opener(stream: IterableDataset, config: TrainingConfig, accelerator: Accelerator) -> Callable[[int], IterableDataset]:
    """A function that gives this process its part of the stream in an epoch.

    Raises:
        ConfigError: too few shards.
    """
    open_epoch = partial(
        shard_stream,
        stream,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=config.num_workers,
        seed=config.seed,
        buffer_size=0 if config.train_data == "scenes" else config.shuffle_buffer,  # scenes are independent of each other
        resampled=config.stream == "resampled",
    )
    open_epoch(0)  # so that it raises now, not in a worker
    return open_epoch


def load_model(config: TrainingConfig, checkpoint: Path | None, captions: Iterator[str]) -> tuple[MaskCLIPModel, CLIPProcessor]:
    """The model and its processor, of the checkpoint or as the options say; a missing tokenizer is trained on the captions."""
    source = str(checkpoint) if checkpoint else config.model
    tokenizer = load_tokenizer("" if checkpoint else config.tokenizer, source)
    if tokenizer is None:
        tokenizer = train_tokenizer(captions, config.vocab_size, CONTEXT_LENGTH)
    model = build_model(source, config.patch_mask, tokenizer)
    return model, build_processor(source, model, tokenizer)


def training_loader(
    open_epoch: Callable[[int], IterableDataset],
    config: TrainingConfig,
    decoder: PairDecoder,
    processor: CLIPProcessor,
    model_config: MaskCLIPConfig,
    positions: dict[int, Position],
) -> DataLoader:
    context_length = model_config.text_config.max_position_embeddings
    if config.text_tokens > context_length:
        fail(f"text_tokens={config.text_tokens}: the context of model={config.model!r} has {context_length}")
    flip = 0.0 if config.train_data == "scenes" else config.flip
    batches = PairBatches(
        open_epoch,
        replace(decoder, crop_scale=config.crop_scale),
        train_transform(decoder.image_size, config.crop_scale, flip),
        processor.tokenizer,
        TextMask(config.text_mask, config.text_tokens or context_length),
        config.batch_size,
        config.seed,
        config.max_skipped_share,
        positions,
    )
    return build_loader(batches, config.num_workers)


def start_reports(run: Run) -> MetricsLog:
    """The run's folder, its configuration and its log, from which the records of steps that come again are gone."""
    if run.accelerator.is_main_process:
        if run.checkpoint:
            print(f"going on from {run.checkpoint}")
        elif moved := prepare_output_dir(run.output_dir):
            print(f"{run.output_dir} held an earlier run: moved to {moved}")
        (run.output_dir / "config.yaml").write_text(yaml.safe_dump(asdict(run.config), sort_keys=False))
    run.accelerator.wait_for_everyone()
    start_tracker(run.accelerator, run.config)
    log = MetricsLog(run.accelerator, run.output_dir)
    log.forget_after(checkpoint_step(run.checkpoint) if run.checkpoint else 0)
    return log


def train(run: Run, log: MetricsLog, stop: StopRequest) -> bool:
    """The steps that are left of a run, with reports, evaluations and checkpoints. False where SIGTERM has ended it early."""
    config, progress = run.config, run.progress
    first_step = checkpoint_step(run.checkpoint) + 1 if run.checkpoint else 1
    bar = progress_bar(run, first_step - 1)
    slow_data = SlowDataWarning()
    run.trained_model.train()
    batches = start_workers(run.loader)
    step_end = time.perf_counter()
    for _ in range(run.num_batches_used):
        progress.use(next(batches), again=True)
    for step in range(first_step, run.num_steps + 1):
        batch = next(batches)
        data_seconds = time.perf_counter() - step_end
        if reason := stop.agreed(batch):
            bar.close()
            end_early(run, step - 1, reason, batch)
            return False
        learning_rate = run.schedule.get_last_lr()[0]
        try:
            loss, kept = training_step(run, batch, step)
        except NonFiniteLoss as error:
            report_nonfinite_loss(run, step, str(error), batch["keys"])
        progress.use(batch)
        step_seconds = time.perf_counter() - step_end
        progress.train_seconds += step_seconds
        slow_data.watch(data_seconds, step_seconds)

        if config.log_every and step % config.log_every == 0:
            values = {
                "loss": loss,
                "learning_rate": learning_rate,
                "logit_scale": run.model.logit_scale.exp().item(),
                "kept_patches": kept(),
                "samples_seen": step * run.samples_per_step,
                "samples_per_second": run.samples_per_step / step_seconds,
                "data_seconds": data_seconds,
                "step_seconds": step_seconds,
            }
            log.write(step, **values, skipped=total_counts(progress.skipped))
            bar.set_postfix_str(f"loss {loss:.3f}, {values['kept_patches']:.0f} patches")
        bar.update(run.samples_per_step)
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            run.save(step)
        if config.eval_every and step % config.eval_every == 0 and step < run.num_steps:
            report_evaluation(log, step, evaluate_sets(run.result, run.processor, run.eval_sets))
        step_end = time.perf_counter()
    bar.close()
    return True


def training_step(run: Run, batch: dict[str, Any], step: int) -> tuple[float, Callable[[], float]]:
    """Learn from a batch. Returns the loss, and a function that gives the visible patches per image.

    Raises:
        NonFiniteLoss: the loss, on any process, is not a number.
    """
    config, accelerator, contrastive_loss = run.config, run.accelerator, ContrastiveLoss()
    chunk_size = config.chunk_size or config.batch_size
    chunks = [
        ChunkInputs(batch, slice(start, start + chunk_size), run.to_model, partial(run.patches.select, step=step, chunk=number))
        for number, start in enumerate(range(0, config.batch_size, chunk_size))
    ]
    if len(chunks) == 1:
        outputs = run.trained_model(**chunks[0]())
        loss = contrastive_loss(outputs.image_embeds, outputs.text_embeds, run.model.logit_scale.exp())
        mean_loss = NumberOnHost(accelerator.reduce(loss.detach(), reduction="mean"))
        accelerator.backward(loss)
    else:
        loss = cached_contrastive_backward(run.trained_model, run.model.logit_scale, chunks, contrastive_loss)
        mean_loss = NumberOnHost(accelerator.reduce(loss, reduction="mean"))
    if not math.isfinite(mean_loss.read()):
        run.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteLoss(mean_loss.read())

    if config.max_grad_norm:
        accelerator.clip_grad_norm_(run.trained_model.parameters(), config.max_grad_norm)
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    clamp_logit_scale(run.model)
    if run.average:
        run.average.update_parameters(run.model)
    run.patches.after_step(step)
    return mean_loss.read(), partial(kept_patches, chunks, run.model.vision_model.embeddings.num_patches)


def end_early(run: Run, last_step: int, reason: int, batch: dict[str, Any]) -> None:
    """Save what was learnt up to a step, and say why the run ends.

    Raises:
        TrainingStopped: the data of this process gave out.
    """
    where = f"saved {run.save(last_step)}" if last_step else "nothing was learnt yet"
    if "stopped" in batch:
        raise TrainingStopped(f"train_data={run.config.train_data!r}: {batch['stopped']}; {where}")
    if reason == StopRequest.DATA:
        raise TrainingStopped(f"another process ran out of data after step {last_step}; {where}")
    if run.accelerator.is_main_process:
        print(f"SIGTERM after step {last_step}; {where}; the same command with --resume auto goes on from there")


def report_nonfinite_loss(run: Run, step: int, loss: str, keys: list[str]) -> None:
    """Save the state before a step, and the keys of its batches, to look at.

    Raises:
        TrainingStopped: always.
    """
    keys_of_processes = gather_object([keys])
    file = run.output_dir / f"nonfinite_step_{step}.json"
    if run.accelerator.is_main_process:
        file.write_text(json.dumps({"step": step, "loss": loss, "keys": keys_of_processes}, indent=2) + "\n")
    where = f"the state before it is {run.save(step - 1)}" if step > 1 else "it is the first step"
    raise TrainingStopped(f"step {step}: the loss is {loss}; {where}, the keys of its batch are in {file}")


def finish(run: Run, log: MetricsLog) -> dict[str, Any]:
    """Export and evaluate the model; write the results and pictures, and say how to load it."""
    if run.accelerator.is_main_process:
        export_to_clip(run.result, run.output_dir / "export", run.processor)  # before anything else can fail
    results = evaluate_sets(run.result, run.processor, run.eval_sets)
    report_evaluation(log, run.num_steps, results)
    summary = {
        "model": run.config.model,
        "patch_mask": run.model.config.vision_config.patch_mask,
        "eval_data": run.config.eval_data or [evaluation.name for evaluation in run.eval_sets],
        "ema_momentum": run.config.ema_momentum,
        "steps": run.num_steps,
        "samples_seen": run.num_steps * run.samples_per_step,
        "train_seconds": round(run.progress.train_seconds, 1),
        "skipped": total_counts(run.progress.skipped),
        "results": results,
    }
    if run.accelerator.is_main_process:
        save_results(run, summary)
        print_summary(run.output_dir, summary)
    return summary


def progress_bar(run: Run, steps_done: int) -> tqdm:
    """In pairs; off where the output is no terminal."""
    total, initial = (steps * run.samples_per_step for steps in (run.num_steps, steps_done))
    shows = run.accelerator.is_main_process and sys.stderr.isatty()
    return tqdm(total=total, initial=initial, unit="pair", unit_scale=True, disable=not shows)


def total_counts(counts: Counter[str]) -> dict[str, int]:
    """The sum of the counts of all processes."""
    everywhere = [counts] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everywhere, counts, group=cpu_group())
    return dict(sum(everywhere, Counter()))


def report_evaluation(log: MetricsLog, step: int, results: dict[str, dict[str, Any]]) -> None:
    numbers = {f"eval/{name}/{key}": value for name, metrics in results.items() for key, value in metrics.items()}
    if numbers:
        log.write(step, **{key: value for key, value in numbers.items() if isinstance(value, (int, float))})


def save_results(run: Run, summary: dict[str, Any]) -> None:
    """Write `eval.json`, `masks.png` (eight training pictures) and `curves.png`."""
    (run.output_dir / "eval.json").write_text(json.dumps(summary, indent=2) + "\n")
    masks = {"random": "random", "cluster": "cluster", "PGS 0.3": "pgs"}
    masks["PGS 0.5"] = {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}
    vision = run.model.config.vision_config
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    images = sample_images(run.stream, run.decoder, count=8)
    draw_patch_masks(images, masks, **sizes).savefig(run.output_dir / "masks.png", dpi=150)
    if (run.output_dir / "metrics.jsonl").exists():
        draw_curves(run.output_dir / "metrics.jsonl").savefig(run.output_dir / "curves.png", dpi=150)


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


def program(arguments: list[str]) -> int:
    """The command line; returns the exit code: 0, or 2 after one line that says what cannot be used or why training stopped."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nOptions, with their defaults:\n{describe_options()}")
        return 0
    try:
        if "--dry_run" in arguments:
            from training.dry_run import dry_run  # which imports this file

            dry_run(load_config([word for word in arguments if word != "--dry_run"]))
        else:
            main(load_config(arguments))
    except (ConfigError, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
