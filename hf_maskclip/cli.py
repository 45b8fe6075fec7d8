"""The command line of the package: `hf-maskclip COMMAND --help` says what each command takes.

Nothing heavy is imported here, so that help and mistakes are answered at once. What the commands do is in `commands.py`.
"""

import argparse
import sys
from pathlib import Path

from . import __version__
from .errors import ConfigError
from .options import (
    CLIP_TOKENIZER,
    QUICKSTART_MODEL,
    SOLVERS,
    SUITES,
    TASKS,
    built_in_masks,
    import_module_of_user,
    quiet_deepspeed,
)

EXAMPLES = """Patch masks for CLIP: see them, evaluate and convert models, report results. Training is a program in a clone of
the repository, training/train.py.

What each mask leaves of your pictures, and how CLIP-PGS comes to it:
    hf-maskclip masks photo.jpg another.jpg -o masks.png
    hf-maskclip masks photo.jpg --mask pgs --steps -o steps.png
The same and zero-shot scores in the browser, with sliders, of the quickstart's model or of another:
    hf-maskclip demo
    hf-maskclip demo --model org/clip-pgs-tiny --port 8080
A checkpoint of open_clip, CLIP-PGS or cluster masking as a model of Transformers, and a model of Transformers for open_clip:
    hf-maskclip convert epoch_32.pt clip-pgs-b16 --open_clip_model ViT-B-16
    hf-maskclip convert clip-pgs-b16 for-open-clip --to open_clip
A CLIP on drawn scenes, on one data set, or on the papers' data sets by several processes:
    hf-maskclip evaluate --model runs/quickstart/export --suite scenes --output runs/quickstart/eval_scenes.json
    hf-maskclip evaluate --model org/clip --data data/wds_cars --task zero_shot_classification --output eval_cars.json
    hf-maskclip download data --dry_run
    accelerate launch -m hf_maskclip evaluate --model org/clip --suite paper --data_root data --output eval_paper.json
    hf-maskclip evaluate --model org/clip --tasks zero_shot_cars,retrieval --data_root data --output eval_some.json
A run, or one of its checkpoints, as a plain CLIP; or as the masked model with its code, to train on without this package:
    hf-maskclip export runs/clip-pgs-b16/checkpoints/step-00010000 clip-pgs-b16
    hf-maskclip export runs/quickstart clip-pgs-tiny --remote_code
A run to the Hub, with a card of what was measured; first what would go there:
    hf-maskclip push runs/quickstart org/clip-pgs-tiny --dry_run
    hf-maskclip push runs/quickstart org/clip-pgs-tiny
The same, and the demo of it as a Space:
    hf-maskclip push runs/quickstart org/clip-pgs-tiny --space
The card alone, of a run, or of a recipe that was not run yet:
    hf-maskclip card runs/quickstart -o card.md
What leaving out patches costs and saves: whole pictures and each ratio, as a table and as speed.png:
    hf-maskclip evaluate --model org/clip --suite scenes --patch_mask pgs --mask_ratio 0.25 0.5 0.75 --output speed.json
Results of evaluations beside the papers' numbers, as tables and as bars:
    hf-maskclip report runs/*/eval*.json -o report.md --figure report.png
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 after one line that says what cannot be used, or 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    quiet_deepspeed()
    try:
        for module in options.imports:
            import_module_of_user(module)
        from . import commands

        getattr(commands, options.command)(options)
    except ConfigError as error:
        if options.debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-maskclip", description=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_masks_command,
        _add_demo_command,
        _add_convert_command,
        _add_export_command,
        _add_evaluate_command,
        _add_download_command,
        _add_report_command,
        _add_card_command,
        _add_push_command,
    ):
        add(commands)
    for command in commands.choices.values():
        command.add_argument(
            "--import", dest="imports", action="append", default=[], metavar="MODULE", help="of a mask of your own"
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_masks_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("masks", help="draw what each mask leaves of pictures")
    parser.add_argument("images", nargs="+", type=Path, metavar="PICTURE")
    parser.add_argument("-o", "--output", type=Path, default=Path("masks.png"), help="png, pdf or svg (default: %(default)s)")
    masks = ", ".join(built_in_masks())
    parser.add_argument("--mask", action="append", metavar="NAME", help=f"one mask, or several, of {masks}; default: all")
    parser.add_argument("--steps", action="store_true", help="the stages of pgs instead (with --mask pgs)")
    parser.add_argument("--model", help="folder or Hub id of a model whose attention the attentive mask goes by")
    parser.add_argument("--image_size", type=int, help="in pixels (default: the model's, or 224)")
    parser.add_argument("--patch_size", type=int, help="in pixels (default: the model's, or 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks' randomness (default: %(default)s)")
    parser.set_defaults(command="draw_masks")


def _add_demo_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="a page in the browser: masks with sliders, zero-shot scores as patches go")
    parser.add_argument(
        "--model", default=QUICKSTART_MODEL, help="folder or Hub id of a CLIP, or of its kin (default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 is for all who reach it (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.set_defaults(command="run_demo")


def _add_convert_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("convert", help="open_clip's checkpoints to a CLIP or SigLIP folder of Transformers, and back")
    parser.add_argument(
        "source",
        help="checkpoint (.pt, .safetensors), or a folder with open_clip_config.json; with --to open_clip the folder or Hub id "
        "of a CLIP or SigLIP",
    )
    parser.add_argument("output", type=Path, help="folder, made if it does not exist")
    parser.add_argument("--to", default="transformers", choices=("transformers", "open_clip"), help="default: %(default)s")
    parser.add_argument(
        "--open_clip_model",
        help="what the checkpoint is of, such as ViT-B-16, ViT-B-32-quickgelu or ViT-B-16-SigLIP2, where no "
        "open_clip_config.json is beside it",
    )
    parser.add_argument("--weights", default="", metavar="KEY", help="which of a checkpoint's, such as state_dict_ema")
    parser.add_argument(
        "--tokenizer",
        help=f"folder or Hub id (default: the folder's, or CLIP's own, from open_clip if installed or {CLIP_TOKENIZER}; of a "
        "SigLIP that which open_clip names, from the Hub)",
    )
    parser.set_defaults(command="convert")


def _add_export_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", help="a run or a checkpoint as a model that loads without this package")
    parser.add_argument("source", help="folder of a run, of a checkpoint or of a model, or a Hub id")
    parser.add_argument("output", type=Path, help="folder, made if it does not exist")
    parser.add_argument("--remote_code", action="store_true", help="a masked CLIP with its code (default: its plain class)")
    parser.set_defaults(command="export")


def _add_evaluate_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("evaluate", help="a model on one data set, or on all five families of the papers' tables")
    parser.add_argument("--model", default="", help="folder or Hub id of a CLIP, a SigLIP or a model of their kin")
    parser.add_argument("--output", default="", help="JSON file for the results; goes on from those in it")
    parser.add_argument("--suite", choices=SUITES, help="all five families: on embedded scenes, or on the papers' data sets")
    parser.add_argument("--tasks", type=_names, default=[], metavar="A,B", help="tasks or families of a suite; default: all")
    parser.add_argument("--list_tasks", action="store_true", help="print the names that --tasks takes, and end")
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
        choices=SOLVERS,
        help="what fits the linear probe: the papers' protocol, or scikit-learn with the best of nine C",
    )
    _add_options_of_encoding(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N pictures of each set only, as a trial")
    parser.add_argument("--details", default="", metavar="FOLDER", help="for each picture's prediction, each class's result")
    parser.add_argument("--feature_cache", help="folder to keep image features in; default: they are not kept")
    parser.add_argument(
        "--skip_existing",
        action="store_true",
        help="keep results in the output file also where nobody can see whether their data has changed, as on the Hub",
    )
    parser.set_defaults(command="evaluate")


def _add_options_of_encoding(parser: argparse.ArgumentParser) -> None:
    """How an evaluation encodes pictures."""
    parser.add_argument("--batch_size", type=int, help="pictures a forward pass (default: 16 on a CPU, else 128)")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s")
    parser.add_argument(
        "--image_backend",
        default="pil",
        choices=("pil", "torchvision"),
        help="pil gives open_clip's pixels, where an odd margin is cropped too; an exported processor crops as Transformers "
        "does, which floors it, one pixel off (default: %(default)s)",
    )
    parser.add_argument(
        "--patch_mask", default="", help="evaluate under this mask, a name or {name: ...}; default: whole images"
    )
    parser.add_argument(
        "--mask_ratio",
        type=float,
        nargs="+",
        default=[],
        metavar="RATIO",
        help="a curve: whole images, and then with --patch_mask at each of these ratios, the share of patches that it removes; "
        "a table and a plot beside --output have quality and images/s",
    )


def _add_download_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("download", help="the papers' evaluation data: what evaluations read of it, and no more")
    parser.add_argument("data_root", type=Path, metavar="FOLDER", help="what --data_root of evaluate takes afterwards")
    parser.add_argument("--tasks", type=_names, default=[], metavar="A,B", help="the data of these tasks or families only")
    parser.add_argument("--dry_run", action="store_true", help="print what would come, and how large it is")
    parser.set_defaults(command="download")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _add_report_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="tables of evaluation results beside the papers' numbers")
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="of hf-maskclip evaluate, a run, or clip_benchmark",
    )
    parser.add_argument("-o", "--output", type=Path, help="Markdown file (default: printed)")
    parser.add_argument("--figure", type=Path, help="bars of the families' means: png, pdf or svg")
    parser.set_defaults(command="report")


def _add_card_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("card", help="the model card of a run, or of a recipe that was not run yet")
    parser.add_argument("source", type=Path, metavar="RUN_DIR|RECIPE", help="folder of a run, or a YAML file of options")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown file")
    parser.add_argument("--repo_id", default="", metavar="ORG/NAME", help="of a run (default: org/ and its folder's name)")
    parser.set_defaults(command="write_card")


def _add_push_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("push", help="a run to the Hub, as a model with its card")
    parser.add_argument("run_dir", type=Path, help="folder of a run of training/train.py")
    parser.add_argument("repo_id", metavar="ORG/NAME")
    parser.add_argument("--public", action="store_true", help="for all to see (default: a private repository)")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default: %(default)s)")
    parser.add_argument("--space", action="store_true", help="also its demo, as a Space of the same name")
    parser.add_argument("--dry_run", action="store_true", help="make and check the card and list the files, send nothing")
    parser.set_defaults(command="push")
