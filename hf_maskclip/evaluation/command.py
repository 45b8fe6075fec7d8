"""`hf-maskclip evaluate`: evaluate a CLIP, a folder or Hub id that Transformers loads, on one data set or a suite of them."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import AutoImageProcessor, AutoTokenizer, CLIPProcessor

from ..distributed import use_share_of_cpus
from ..errors import as_config_error, fail
from ..models.modeling_maskclip import MaskCLIPModel
from ..models.patch_mask_registry import resolve_patch_mask
from ..options import TASKS
from .datasets.find import Request, find_evaluations
from .datasets.pairs import PairKeys
from .encoder import Encoder
from .results_file import ResultsFile
from .suites import open_suite
from .tasks import Evaluation, run_evaluations


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Run the evaluations that the options name, and return what is in the output file.

    The file has one record for each result, is written anew after each, and is what `hf-maskclip report` reads. Where it is
    there already, results of the same weights, data and options are not computed again, and all others in it stay.

    Raises:
        ConfigError: an option, or the data that it names, cannot be used.
    """
    check_options(options)
    file = ResultsFile(options.output, {"model": options.model, "suite": options.suite or None})
    state = start_processes()
    encoder = load_encoder(options, state.device)
    file.check_model(encoder.model_hash)
    is_any = False
    try:
        for name, record in run_evaluations(encoder, evaluations_of(options, encoder), file.finished):
            is_any, is_new = True, record is not file.results.get(name)
            if is_new and state.is_main_process:
                file.add(name, record)
            if state.is_main_process:
                print(f"{name}: {numbers_of(record)}{'' if is_new else ', as it stands in the output file'}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the results in {file.path}", file=sys.stderr)
        raise SystemExit(130) from None
    if not is_any:
        fail(f"--data_root {options.data_root!r}: none of the data sets is there")
    return file.summary


def check_options(options: argparse.Namespace) -> None:
    """Raise a ConfigError for options that do not go together."""
    if bool(options.suite) == bool(options.data):
        fail("give either --suite, or --data with its --task")
    if options.data and not options.task:
        fail(f"--data {options.data}: give its --task, one of {', '.join(TASKS)}")
    if options.suite == "paper" and not Path(options.data_root).is_dir():
        fail(f"--data_root {options.data_root!r}: is no folder; --suite paper reads its data sets there")
    if options.batch_size is not None and options.batch_size < 1:
        fail(f"--batch_size {options.batch_size}: must be at least 1")


def start_processes() -> PartialState:
    """The processes of `accelerate launch`, on a CPU with its cores shared among them."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.device.type == "cpu":
        use_share_of_cpus()
    return state


def load_encoder(options: argparse.Namespace, device: torch.device) -> Encoder:
    """The model with its processor. Raises ConfigError for what cannot be loaded."""
    with as_config_error("patch_mask", options.patch_mask):
        patch_mask = resolve_patch_mask(yaml.safe_load(options.patch_mask or "none"))
    with as_config_error("model", options.model):
        model = MaskCLIPModel.from_pretrained(options.model, patch_mask=patch_mask, dtype=getattr(torch, options.precision))
        image_processor = AutoImageProcessor.from_pretrained(options.model, backend=options.image_backend)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    return Encoder(
        model.to(device),
        CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer),
        batch_size=options.batch_size,
        apply_patch_mask=bool(options.patch_mask),
        cache_dir=options.feature_cache,
        show_progress=sys.stderr.isatty(),
    )


def evaluations_of(options: argparse.Namespace, encoder: Encoder) -> Iterable[Evaluation]:
    vision_config: Any = encoder.model.config.vision_config
    image_size = vision_config.image_size
    if options.suite:
        return open_suite(options.suite, image_size, options.data_root)
    request = Request(
        options.task,
        options.split,
        image_size,
        PairKeys(options.image_key, options.caption_key),
        options.class_names,
        options.templates,
        options.probe,
    )
    return find_evaluations(options.data, request)


def numbers_of(record: dict[str, Any]) -> str:
    """Its metrics as one line: shares in percent, counts as they are, with what was left out."""
    shares = ", ".join(f"{key} {value:.1%}" for key, value in record.items() if isinstance(value, float) and value <= 1)
    unreadable = {"": record.get("num_undecodable"), "training ": record.get("num_train_undecodable")}
    left_out = "".join(f", {count} unreadable {kind}pictures left out" for kind, count in unreadable.items() if count)
    return f"{shares or 'too few pictures for a metric'} (n = {record['n']}{left_out})"
