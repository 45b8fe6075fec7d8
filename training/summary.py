"""What a run says at its start and at its end: its folder, its evaluation, its pictures, and how to load the model."""

import copy
import json
import sys
from importlib.metadata import version
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from hf_maskclip.conversion.clip import export, exported_class
from hf_maskclip.data.mix import mix_in_words, specs_of
from hf_maskclip.data.specs import hub_ids_of, is_hub_id
from hf_maskclip.distributed import sum_counts
from hf_maskclip.dual_encoders import image_size_of
from hf_maskclip.evaluation import Encoder
from hf_maskclip.evaluation.encoder import PACKAGES
from hf_maskclip.evaluation.pixels import with_pillow
from hf_maskclip.evaluation.runner import run_evaluations
from hf_maskclip.phases import Timeline
from hf_maskclip.texts import context_length
from hf_maskclip.visualization import draw_patch_masks
from training.data.words import save_counts
from training.model.loss import without_added_bias
from training.model.presets import PRESETS
from training.model.tuning import tuning_in_words
from training.run import Run
from training.saving.checkpoint import prepare_output_dir
from training.saving.example import make_example
from training.saving.folder import FolderLock, check_is_shared, write_state
from training.tracking import MetricsLog, draw_curves, read_metrics, start_tracker

# The masks of `masks.png`. Of few patches CLIP-PGS 0.3 and 0.5 leave the same ones: one column stands for both.
SHOWN_MASKS = {"random": "random", "cluster": "cluster", "PGS": "pgs"}
BEFORE = "before_training"  # what records call the evaluation of the model that a run trains on


def start_reports(run: Run) -> MetricsLog:
    """The run's folder, its configuration and its log, from which the records of steps that come again are gone."""
    if run.accelerator.is_main_process:
        if not run.checkpoint and (moved := prepare_output_dir(run.output_dir)):
            print(f"{run.output_dir} held an earlier run: moved to {moved}")
        print(run_in_words(run), file=sys.stderr, flush=True)
        run.lock = FolderLock(run.output_dir)
        write_state(run.output_dir, is_resumed=run.checkpoint is not None)
        options = yaml.safe_dump(run.config.as_options(), sort_keys=False, allow_unicode=True)
        (run.output_dir / "config.yaml").write_text(options, encoding="utf-8")
        if run.data.word_counts:
            save_counts(run.output_dir, run.data.word_counts)
    run.accelerator.wait_for_everyone()
    check_is_shared(run.output_dir)
    start_tracker(run.accelerator, run.config, run.steps_done)
    log = MetricsLog(run.accelerator, run.output_dir)
    log.forget_after(run.steps_done)
    return log


def run_in_words(run: Run) -> str:
    """What starts, on one line: from where, which model, on which data, for how long, on what."""
    model, accelerator, config = run.learner.model, run.accelerator, run.config
    start = f"going on from {run.checkpoint}: " if run.checkpoint else ""
    mask = model.config.vision_config.patch_mask["name"]
    shards = run.data.mix.num_shards
    processes = f"{accelerator.num_processes} process" + ("es" if accelerator.num_processes > 1 else "")
    tuned = tuning_in_words(config, model, model.vision_model.patch_mask.keeps_all)
    patches = f"{model.vision_model.embeddings.num_patches} patches{phases_in_words(run.timeline)}"
    return (
        f"{start}{config.model}, {model.num_parameters() / 1e6:.1f} million parameters{tuned}, patch mask {mask} over "
        f"{patches}; {mix_in_words(config.train_data)}, {shards} shards; "
        f"steps {run.steps_done + 1} to {run.num_steps} of {run.samples_per_step} pairs; "
        f"{processes} with {config.num_workers} data workers each, on {accelerator.device.type}"
    )


def phases_in_words(timeline: Timeline) -> str:
    """Where a run has several phases, or smaller pictures, how many and how large."""
    number, sizes = len(timeline.phases), sorted({phase.image_size for phase in timeline.phases if phase.image_size})
    several = f", in {number} phases" if number > 1 else ""
    return several + (f", pictures of {' and '.join(map(str, sizes))} pixels" if sizes else "")


def evaluate_before(run: Run, log: MetricsLog) -> None:
    """Evaluate the model of others that a run trains on, so that its end shows what was forgotten.

    A run that goes on has done so, and finds the numbers in its log.
    """
    if run.checkpoint or run.config.model in PRESETS or not run.data.evaluations:
        return
    results = evaluate(run, run.learner.result())
    log.write(0, **numbers_of(results, BEFORE), **{f"{BEFORE}_on": run.eval_data})
    if run.accelerator.is_main_process:
        print(f"before training: {results_in_words(results)}", file=sys.stderr, flush=True)


def results_before(run: Run) -> dict[str, dict[str, float]]:
    """The metrics of `evaluate_before` by the names of evaluations; empty where there was none. For the main process.

    A run may go on with other evaluation data, whose numbers are not to be compared with these.
    """
    path = run.output_dir / "metrics.jsonl"
    first = [record for record in read_metrics(path) if record["step"] == 0] if path.exists() else []
    known = {key: value for record in first for key, value in record.items()}
    if (data := known.get(f"{BEFORE}_on", run.eval_data)) != run.eval_data:
        print(f"before training: was evaluated on eval_data={data!r}, and now on {run.eval_data!r}: not compared")
        return {}
    found: dict[str, dict[str, float]] = {}
    for key, value in known.items():
        if key.startswith(f"{BEFORE}/"):
            name, _, metric = key.removeprefix(f"{BEFORE}/").rpartition("/")
            found.setdefault(name, {})[metric] = value
    return found


def finish(run: Run, log: MetricsLog) -> dict[str, Any]:
    """Export and evaluate the model; write the results and pictures, and say how to load it."""
    model = without_added_bias(run.learner.result())
    if run.accelerator.is_main_process:
        export(model, run.output_dir / "export", run.learner.processor)  # before anything else can fail
        run.learner.tuning.save_adapters(run.learner.tuned, run.output_dir)
    results = evaluate(run, model)
    report_evaluation(log, run.num_steps, results)
    summary = {
        "model": run.config.model,
        "class": exported_class(model),
        "patch_mask": run.learner.model.config.vision_config.patch_mask,
        "eval_data": run.eval_data,
        "ema_momentum": run.config.ema_momentum,
        "freeze": run.config.freeze,
        "lora_rank": run.config.lora_rank,
        "interpolate_weights": run.config.interpolate_weights,
        "steps": run.num_steps,
        "samples_seen": run.samples_seen(run.num_steps),
        "train_seconds": round(run.data.state.train_seconds, 1),
        **origin_of(run),
        "skipped": sum_counts(run.data.state.skipped),
        BEFORE: results_before(run) if run.accelerator.is_main_process else {},
        "results": results,
    }
    if run.accelerator.is_main_process:
        (run.output_dir / "eval.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        draw_pictures(run)
        print_summary(run, summary)
    return summary


def origin_of(run: Run) -> dict[str, Any]:
    """What the run found on the Hub, which cannot be told from names later, and what it ran on."""
    model, device = run.config.model, run.accelerator.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "hub": {"model": model if is_hub_id(model) else None, "train_data": hub_ids_of(specs_of(run.config.train_data))},
        "hardware": f"{run.accelerator.num_processes} x {kind}",
        "versions": {name: version(name) for name in PACKAGES},
    }


def evaluate(run: Run, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """The records of the run's evaluations by their names, as `hf-maskclip evaluate` gives them for the export."""
    processor = copy.copy(run.learner.processor)
    processor.image_processor = with_pillow(processor.image_processor)
    encoder = Encoder(model, processor)
    return dict(run_evaluations(encoder, run.data.evaluations))


def report_evaluation(log: MetricsLog, step: int, results: dict[str, dict[str, Any]]) -> None:
    """Log the metrics, and nothing else that records say."""
    if numbers := numbers_of(results, "eval"):
        log.write(step, **numbers)


def numbers_of(results: dict[str, dict[str, Any]], prefix: str) -> dict[str, float]:
    """The metrics of records, by the names that the log has for them."""
    return {f"{prefix}/{name}/{key}": record[key] for name, record in results.items() for key in record["standard_errors"]}


def results_in_words(results: dict[str, dict[str, Any]], before: dict[str, dict[str, float]] | None = None) -> str:
    """The main numbers of evaluations, as one line; each behind the one of before training, where there is one."""
    parts = []
    for name, metrics in results.items():
        recall = "recall@10" if any(key.endswith("recall@10") for key in metrics) else "recall@1"  # of fewer than ten
        shown = {k: v for k, v in metrics.items() if k in ("top1", "mean_per_class") or k.endswith(recall)}
        old = (before or {}).get(name, {})
        numbers = [f"{key} {f'{old[key]:.1%} -> ' if key in old else ''}{value:.1%}" for key, value in shown.items()]
        parts.append(f"{name}: " + ", ".join(numbers))
    return "; ".join(parts) or "no data to evaluate on"


def adapter_in_words(run: Run) -> str:
    """The line of the adapters' folder; empty where a run has none."""
    if not run.config.lora_rank:
        return ""
    load = f'PeftModel.from_pretrained(AutoModel.from_pretrained("{run.config.model}"), "{run.output_dir}/adapter")'
    return f"    adapter/        what was learnt, without the model that it is for: {load}\n"


def draw_pictures(run: Run) -> None:
    """Write `masks.png` (eight training pictures) and `curves.png`."""
    vision = run.learner.model.config.vision_config
    patches = image_size_of(vision, run.learner.processor.image_processor) // vision.patch_size  # a side, where there is a rest
    sizes = {"image_size": patches * vision.patch_size, "patch_size": vision.patch_size}
    figure = draw_patch_masks(run.data.mix.pictures(count=8), SHOWN_MASKS, **sizes)
    figure.savefig(run.output_dir / "masks.png", dpi=150)
    if (run.output_dir / "metrics.jsonl").exists():
        draw_curves(run.output_dir / "metrics.jsonl").savefig(run.output_dir / "curves.png", dpi=150)


def print_summary(run: Run, summary: dict[str, Any]) -> None:
    """What was learnt from how much, what each file shows, and a picture to classify."""
    folder = run.output_dir
    print(f"\n{summary['samples_seen']} pairs in {summary['steps']} steps, {summary['train_seconds']:.0f} s")
    if summary["skipped"]:
        print("skipped samples: " + ", ".join(f"{cause} {count}" for cause, count in summary["skipped"].items()))
    if summary[BEFORE]:
        print("before training -> now")
    for name, metrics in summary["results"].items():
        print(results_in_words({name: metrics}, summary[BEFORE]))
    print(f"""
In {folder}:
    export/         the model, a plain {summary["class"]} with its processor: AutoModel.from_pretrained("{folder}/export")
    eval.json       these results, and what each depends on
    metrics.jsonl   loss, learning rate and speed of each step
    curves.png      the same, drawn
    masks.png       pictures of the training data, and what masks leave of them
{adapter_in_words(run)}""")
    model = run.learner.model.config
    example = make_example(
        folder,
        run.data.evaluations,
        run.data.mix.pairs(),
        run.learner.processor.tokenizer,
        context_length(model, run.learner.processor.tokenizer),
    )
    if example:
        print(example.in_words(folder / "export"))
