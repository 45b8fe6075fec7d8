"""Pre-train or fine-tune a CLIP with masked patches.

    accelerate launch training/train.py                                  # the quickstart, on scenes drawn on the fly
    accelerate launch training/train.py --config FILE.yaml --key value   # any other run; --help lists the options
    python training/train.py --config FILE.yaml --dry_run                # what that run would take, and one small step of it

Shapes: B pairs per process, S caption tokens, E projection size.
"""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import CLIPImageProcessorPil, CLIPProcessor

if __name__ == "__main__":  # run as a script, it finds its package, and not itself or its siblings in the place of others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from hf_maskclip import ContrastiveLoss, MaskCLIPModel, cached_contrastive_backward, export_to_clip
from hf_maskclip.evaluation import Encoder
from hf_maskclip.losses import cpu_group, world_size
from hf_maskclip.visualization import draw_patch_masks
from training.checkpoint import prepare_output_dir
from training.config import TrainingConfig, describe_options, load_config
from training.data import sample_images, start_workers
from training.errors import ConfigError, TrainingStopped
from training.evaluation_sets import run_evaluations
from training.masking import ChunkInputs, kept_patches
from training.run import Run, prepare
from training.stopping import NumberOnHost, StopRequest
from training.tracking import MetricsLog, SlowDataWarning, draw_curves, start_tracker


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
    log.forget_after(run.steps_done)
    return log


def train(run: Run, log: MetricsLog, stop: StopRequest) -> bool:
    """The steps that are left of a run, with reports, evaluations and checkpoints. False where SIGTERM has ended it early."""
    config, progress = run.config, run.progress
    bar = progress_bar(run, run.steps_done)
    slow_data = SlowDataWarning()
    run.trained_model.train()
    batches = start_workers(run.loader)
    step_end = time.perf_counter()
    for _ in range(run.num_batches_used):
        batch = next(batches)
        if "stopped" in batch:
            raise TrainingStopped(f"train_data={config.train_data!r}: {batch['stopped']}")
        progress.use(batch, again=True)
    for step in range(run.steps_done + 1, run.num_steps + 1):
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
            report_evaluation(log, step, evaluate(run, run.result()))
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

    run.update_weights()
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
    model = run.result()
    if run.accelerator.is_main_process:
        export_to_clip(model, run.output_dir / "export", run.processor)  # before anything else can fail
    results = evaluate(run, model)
    report_evaluation(log, run.num_steps, results)
    summary = {
        "model": run.config.model,
        "patch_mask": run.model.config.vision_config.patch_mask,
        "eval_data": run.config.eval_data,
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


def evaluate(run: Run, model: MaskCLIPModel) -> dict[str, dict[str, Any]]:
    """The records of the run's evaluations by their names, as `training/evaluate.py` gives them for the export."""
    image_processor = CLIPImageProcessorPil(**run.processor.image_processor.to_dict())
    encoder = Encoder(model, CLIPProcessor(image_processor=image_processor, tokenizer=run.processor.tokenizer))
    return dict(run_evaluations(encoder, run.evaluations))


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
