"""What a run says at its start and at its end: its folder, its evaluation, its pictures, and how to load the model."""

import json
from pathlib import Path
from typing import Any

import yaml
from transformers import CLIPImageProcessorPil, CLIPProcessor

from hf_maskclip import MaskCLIPModel, export_to_clip
from hf_maskclip.distributed import sum_counts
from hf_maskclip.evaluation import Encoder
from hf_maskclip.evaluation.runner import run_evaluations
from hf_maskclip.visualization import draw_patch_masks
from training.run import Run
from training.saving.checkpoint import prepare_output_dir
from training.saving.folder import FolderLock, write_state
from training.tracking import MetricsLog, draw_curves, start_tracker

# The masks of `masks.png`. PGS 0.5 is not among them: of scenes it leaves the same patches as PGS 0.3.
SHOWN_MASKS = {"random": "random", "cluster": "cluster", "PGS 0.3": "pgs"}


def start_reports(run: Run) -> MetricsLog:
    """The run's folder, its configuration and its log, from which the records of steps that come again are gone."""
    if run.accelerator.is_main_process:
        if run.checkpoint:
            print(f"going on from {run.checkpoint}")
        elif moved := prepare_output_dir(run.output_dir):
            print(f"{run.output_dir} held an earlier run: moved to {moved}")
        run.lock = FolderLock(run.output_dir)
        write_state(run.output_dir, is_resumed=run.checkpoint is not None)
        options = yaml.safe_dump(run.config.as_options(), sort_keys=False, allow_unicode=True)
        (run.output_dir / "config.yaml").write_text(options, encoding="utf-8")
    run.accelerator.wait_for_everyone()
    start_tracker(run.accelerator, run.config, run.steps_done)
    log = MetricsLog(run.accelerator, run.output_dir)
    log.forget_after(run.steps_done)
    return log


def finish(run: Run, log: MetricsLog) -> dict[str, Any]:
    """Export and evaluate the model; write the results and pictures, and say how to load it."""
    model = run.learner.result()
    if run.accelerator.is_main_process:
        export_to_clip(model, run.output_dir / "export", run.learner.processor)  # before anything else can fail
    results = evaluate(run, model)
    report_evaluation(log, run.num_steps, results)
    summary = {
        "model": run.config.model,
        "patch_mask": run.learner.model.config.vision_config.patch_mask,
        "eval_data": run.eval_data,
        "ema_momentum": run.config.ema_momentum,
        "steps": run.num_steps,
        "samples_seen": run.samples_seen(run.num_steps),
        "train_seconds": round(run.data.state.train_seconds, 1),
        "skipped": sum_counts(run.data.state.skipped),
        "results": results,
    }
    if run.accelerator.is_main_process:
        (run.output_dir / "eval.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        draw_pictures(run)
        print_summary(run.output_dir, summary)
    return summary


def evaluate(run: Run, model: MaskCLIPModel) -> dict[str, dict[str, Any]]:
    """The records of the run's evaluations by their names, as `hf-maskclip evaluate` gives them for the export."""
    processor = run.learner.processor
    image_processor = CLIPImageProcessorPil(**processor.image_processor.to_dict())
    encoder = Encoder(model, CLIPProcessor(image_processor=image_processor, tokenizer=processor.tokenizer))
    return dict(run_evaluations(encoder, run.data.evaluations))


def report_evaluation(log: MetricsLog, step: int, results: dict[str, dict[str, Any]]) -> None:
    numbers = {f"eval/{name}/{key}": value for name, metrics in results.items() for key, value in metrics.items()}
    if numbers:
        log.write(step, **{key: value for key, value in numbers.items() if isinstance(value, (int, float))})


def results_in_words(results: dict[str, dict[str, Any]]) -> str:
    """The main numbers of evaluations, as one line."""
    parts = []
    for name, metrics in results.items():
        recall = "recall@10" if any(key.endswith("recall@10") for key in metrics) else "recall@1"  # of fewer than ten
        shown = {k: v for k, v in metrics.items() if k in ("top1", "mean_per_class") or k.endswith(recall)}
        parts.append(f"{name}: " + ", ".join(f"{key} {value:.1%}" for key, value in shown.items()))
    return "; ".join(parts) or "no data to evaluate on"


def draw_pictures(run: Run) -> None:
    """Write `masks.png` (eight training pictures) and `curves.png`."""
    vision = run.learner.model.config.vision_config
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    figure = draw_patch_masks(run.data.source.pictures(count=8), SHOWN_MASKS, **sizes)
    figure.savefig(run.output_dir / "masks.png", dpi=150)
    if (run.output_dir / "metrics.jsonl").exists():
        draw_curves(run.output_dir / "metrics.jsonl").savefig(run.output_dir / "curves.png", dpi=150)


def print_summary(output_dir: Path, summary: dict[str, Any]) -> None:
    print(f"\n{summary['samples_seen']} pairs in {summary['steps']} steps, {summary['train_seconds']:.0f} s")
    if summary["skipped"]:
        print("skipped samples: " + ", ".join(f"{cause} {count}" for cause, count in summary["skipped"].items()))
    for name, metrics in summary["results"].items():
        print(results_in_words({name: metrics}))
    print(f"""
Written to {output_dir}: export/, eval.json, metrics.jsonl, masks.png, curves.png. To load the model:

    from transformers import AutoModel, pipeline
    model = AutoModel.from_pretrained("{output_dir}/export")
    classify = pipeline("zero-shot-image-classification", model="{output_dir}/export")
""")
