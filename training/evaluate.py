"""Evaluate a CLIP: a folder or Hub id that Transformers loads, on one data set or a suite of them.

    python training/evaluate.py --model runs/quickstart/export --suite scenes --output runs/quickstart/eval_scenes.json
    python training/evaluate.py --model org/clip --data data/wds_cars --task zero_shot_classification --output eval_cars.json
    accelerate launch training/evaluate.py --model org/clip --suite paper --data_root data --output eval_paper.json

The output file has one record for each result, is written anew after each, and is what `hf-maskclip report` reads.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import AutoImageProcessor, AutoTokenizer, CLIPProcessor

if __name__ == "__main__":  # run as a script, it finds its package, and not itself or its siblings in the place of others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from hf_maskclip import MaskCLIPConfig, MaskCLIPModel
from hf_maskclip.evaluation import Encoder
from hf_maskclip.models.patch_mask_registry import resolve_patch_mask
from training.cpus import use_share_of_cpus
from training.data import PairDecoder
from training.errors import fail, naming
from training.evaluation_data import evaluations_of_data
from training.evaluation_sets import Evaluation, run_evaluations
from training.evaluation_suites import PaperSuite, scene_suite

TASKS = ("zero_shot_classification", "retrieval", "linear_probe", "compositionality")
SUITES = ("scenes", "paper")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Run the evaluations that the options name, and return what is in the output file.

    Raises:
        ConfigError: an option, or the data that it names, cannot be used.
    """
    state = start_processes()
    encoder = load_encoder(options, state.device)
    evaluations = find_evaluations(options, encoder)
    summary: dict[str, Any] = {"model": options.model, "suite": options.suite or None, "results": {}}
    for name, record in run_evaluations(encoder, evaluations):
        summary["results"][name] = record
        if state.is_main_process:
            write_summary(summary, Path(options.output))
            print(f"{name}: {numbers_of(record)}", flush=True)
    return summary


def start_processes() -> PartialState:
    """The processes of `accelerate launch`, on a CPU with its cores shared among them."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.device.type == "cpu":
        use_share_of_cpus()
    return state


def load_encoder(options: argparse.Namespace, device: torch.device) -> Encoder:
    """The model with its processor. Raises ConfigError for what cannot be loaded."""
    with naming("model", options.model):
        config = MaskCLIPConfig.from_pretrained(options.model)
        if options.patch_mask:
            config.vision_config.patch_mask = resolve_patch_mask(yaml.safe_load(options.patch_mask))
        model = MaskCLIPModel.from_pretrained(options.model, config=config, dtype=getattr(torch, options.precision))
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


def find_evaluations(options: argparse.Namespace, encoder: Encoder) -> Iterable[Evaluation]:
    image_size = encoder.model.config.vision_config.image_size
    if options.suite == "scenes":
        return scene_suite(image_size)
    if options.suite == "paper":
        suite = PaperSuite(Path(options.data_root))
        if (missing := suite.missing()) and PartialState().is_main_process:
            print("missing, and where to get it:\n  " + "\n  ".join(missing), file=sys.stderr)
        return suite.evaluations()
    return evaluations_of_data(
        options.data,
        options.task,
        options.split,
        PairDecoder(options.image_key, options.caption_key),
        class_names_file=options.class_names,
        templates_file=options.templates,
        solver=options.probe,
    )


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """Write results aside and rename them, so that the file is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    unfinished.replace(path)


def numbers_of(record: dict[str, Any]) -> str:
    """Its metrics as one line: shares in percent, counts as they are."""
    shares = ", ".join(f"{key} {value:.1%}" for key, value in record.items() if isinstance(value, float) and value <= 1)
    return f"{shares} (n = {record['n']})"


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Raises ConfigError for options that do not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a CLIP")
    parser.add_argument("--output", required=True, help="JSON file for the results")
    parser.add_argument("--suite", choices=SUITES, help="all five families: on embedded scenes, or on the papers' data sets")
    parser.add_argument("--data_root", default="", help="folder of the papers' data sets; what is missing is said first")
    parser.add_argument("--data", default="", help="one data set: a clip-benchmark folder, tars, an image folder, or a Hub id")
    parser.add_argument("--task", choices=TASKS, help="what to evaluate on --data")
    parser.add_argument("--split", default="test", help="of --data (default: %(default)s)")
    parser.add_argument("--templates", default="", help="file of prompts with {c}, one a line; default: the data set's own")
    parser.add_argument("--class_names", default="", help="file of class names, one a line; default: the data set's own")
    parser.add_argument("--image_key", default="", help="field of the picture, for retrieval on pairs as for training")
    parser.add_argument("--caption_key", default="", help="field of the caption, for retrieval on pairs as for training")
    parser.add_argument(
        "--probe",
        default="gradient_descent",
        choices=("gradient_descent", "logistic_regression"),
        help="what fits the linear probe: the papers' protocol, or scikit-learn with the best of nine C",
    )
    parser.add_argument("--batch_size", type=int, help="pictures a forward pass (default: 16 on a CPU, else 128)")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s")
    parser.add_argument(
        "--image_backend",
        default="pil",
        choices=("pil", "torchvision"),
        help="pil gives open_clip's pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--patch_mask", default="", help="evaluate under this mask, a name or {name: ...}; default: whole images"
    )
    parser.add_argument("--feature_cache", help="folder to keep image features in; default: they are not kept")
    options = parser.parse_args(arguments)
    if bool(options.suite) == bool(options.data):
        fail("give either --suite, or --data with its --task")
    if options.data and not options.task:
        fail(f"--data {options.data}: give its --task, one of {', '.join(TASKS)}")
    if options.suite == "paper" and not Path(options.data_root).is_dir():
        fail(f"--data_root {options.data_root!r}: is no folder; --suite paper reads its data sets there")
    if options.batch_size is not None and options.batch_size < 1:
        fail(f"--batch_size {options.batch_size}: must be at least 1")
    return options


def program(arguments: list[str]) -> int:
    """The command line; returns the exit code: 0, or 2 after one line that says what cannot be used."""
    try:
        summary = main(parse_options(arguments))
    except (ValueError, ModuleNotFoundError) as error:  # a ConfigError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not summary["results"]:
        print("error: --data_root: none of the data sets is there", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
