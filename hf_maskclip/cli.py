"""The command line of the package: `hf-maskclip COMMAND --help` says what each command takes."""

import argparse
import sys
from pathlib import Path

from PIL import Image

from .evaluation.report import draw_report, read_results
from .modeling_maskclip import MaskCLIPVisionModel
from .patch_masking import patch_masks
from .visualization import draw_patch_masks, draw_pgs_steps


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 with one line that says what was wrong."""
    parser = argparse.ArgumentParser(prog="hf-maskclip", description="Patch masks for CLIP.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_masks_command(commands)
    _add_report_command(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _add_masks_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("masks", help="draw what each mask leaves of pictures")
    parser.add_argument("images", nargs="+", type=Path, metavar="PICTURE")
    parser.add_argument("-o", "--output", type=Path, default=Path("masks.png"), help="png, pdf or svg (default: %(default)s)")
    parser.add_argument("--mask", action="append", choices=list(patch_masks()), help="one mask, or several; default: all")
    parser.add_argument("--steps", action="store_true", help="the stages of pgs instead (with --mask pgs)")
    parser.add_argument("--model", help="folder or Hub id of a CLIP whose attention the attentive mask goes by")
    parser.add_argument("--image_size", type=int, help="in pixels (default: the model's, or 224)")
    parser.add_argument("--patch_size", type=int, help="in pixels (default: the model's, or 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks' randomness (default: %(default)s)")
    parser.set_defaults(run=_draw_masks)


def _draw_masks(options: argparse.Namespace) -> None:
    masks = options.mask or [name for name in patch_masks() if name != "none"]
    if options.steps and options.mask != ["pgs"]:
        raise ValueError("--steps draws the stages of pgs: give --mask pgs")
    if options.model and "attentive" not in masks:
        raise ValueError(f"--model {options.model}: only the attentive mask goes by a model's attention")
    if not options.model and "attentive" in masks:
        if options.mask:
            raise ValueError("--mask attentive goes by a model's attention: give --model")
        print("attentive is left out: it goes by a model's attention, see --model")
        masks.remove("attentive")

    images = [_open_picture(path) for path in options.images]
    teacher, image_size, patch_size = None, 224, 16
    if options.model:
        teacher = MaskCLIPVisionModel.from_pretrained(options.model, attn_implementation="eager").eval()
        image_size, patch_size = teacher.config.image_size, teacher.config.patch_size
        if options.patch_size not in (None, patch_size):
            raise ValueError(f"--patch_size {options.patch_size}: the patches of {options.model} have {patch_size} pixels")
    sizes = {"image_size": image_size if options.image_size is None else options.image_size}
    sizes["patch_size"] = patch_size if options.patch_size is None else options.patch_size
    if options.steps:
        figure = draw_pgs_steps(images, **sizes, seed=options.seed)
    else:
        figure = draw_patch_masks(images, {name: name for name in masks}, teacher=teacher, **sizes, seed=options.seed)
    figure.savefig(options.output, dpi=150)
    print(f"written to {options.output}")


def _add_report_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="tables of evaluation results beside the papers' numbers")
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="of training/evaluate.py, or eval.json of a run")
    parser.add_argument("-o", "--output", type=Path, help="Markdown file (default: printed)")
    parser.add_argument("--figure", type=Path, help="bars of the families' means: png, pdf or svg")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    tables = read_results(options.results)
    text = "\n".join(table.markdown() for table in tables)
    if options.output:
        options.output.write_text(text)
        print(f"written to {options.output}")
    else:
        print(text)
    if options.figure:
        draw_report(tables).savefig(options.figure, dpi=150)
        print(f"written to {options.figure}")


def _open_picture(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for damaged and huge files
        raise ValueError(f"{path}: is no picture that can be read ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
