"""The command line of the package: `hf-maskclip COMMAND --help` says what each command takes."""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor

from .conversion import export_to_clip, load_maskclip
from .models.modeling_maskclip import MaskCLIPModel, MaskCLIPVisionModel
from .models.patch_mask_registry import patch_masks

# What takes long to import and is no part of `import hf_maskclip` (evaluate, datasets, matplotlib) is imported by the commands
# that need it, so that --help and the others do not wait for it.

CLIP_TOKENIZER = "openai/clip-vit-base-patch32"
QUICKSTART_MODEL = "runs/quickstart/export"
EXAMPLES = """Patch masks for CLIP: see them, convert models, report results. Training and evaluation are programs of their own:
training/train.py and training/evaluate.py.

What each mask leaves of your pictures, and how CLIP-PGS comes to it:
    hf-maskclip masks photo.jpg another.jpg -o masks.png
    hf-maskclip masks photo.jpg --mask pgs --steps -o steps.png
The same and zero-shot scores in the browser, with sliders, of the quickstart's model or of another:
    hf-maskclip demo
    hf-maskclip demo --model org/clip-pgs-tiny --port 8080
A checkpoint of open_clip, CLIP-PGS or cluster masking as a model of Transformers, and a model of Transformers for open_clip:
    hf-maskclip convert epoch_32.pt clip-pgs-b16 --open_clip_model ViT-B-16
    hf-maskclip convert clip-pgs-b16 for-open-clip --to open_clip
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
Results of evaluations beside the papers' numbers, as tables and as bars:
    hf-maskclip report runs/*/eval*.json -o report.md --figure report.png
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 with one line that says what was wrong."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-maskclip", description=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_masks_command(commands)
    _add_demo_command(commands)
    _add_convert_command(commands)
    _add_export_command(commands)
    _add_report_command(commands)
    _add_card_command(commands)
    _add_push_command(commands)
    return parser


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
    from .visualization import draw_patch_masks, draw_pgs_steps

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


def _add_demo_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="a page in the browser: masks with sliders, zero-shot scores as patches go")
    parser.add_argument("--model", default=QUICKSTART_MODEL, help="folder or Hub id of a CLIP (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 is for all who reach it (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    try:
        from .demo import build_demo  # here, for Gradio is an extra
    except ImportError as error:
        raise ValueError(str(error)) from None
    if options.model == QUICKSTART_MODEL and not Path(QUICKSTART_MODEL).is_dir():
        make = "`accelerate launch training/train.py` makes it"
        raise ValueError(f"{QUICKSTART_MODEL}: no such folder; {make}, or give --model")
    page = build_demo(options.model)
    where = {"server_name": options.host, "server_port": options.port, "share": False}
    try:
        page.launch(**where, quiet=True, prevent_thread_lock=True)
    except OSError:
        raise ValueError(f"--host {options.host} --port {options.port}: cannot be used; is it in use already?") from None
    print(f"{page.local_url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def _add_convert_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("convert", help="open_clip's checkpoints to a CLIP folder of Transformers, and back")
    parser.add_argument("source", help="checkpoint (.pt, .safetensors); with --to open_clip the folder or Hub id of a CLIP")
    parser.add_argument("output", type=Path, help="folder, made if it does not exist")
    parser.add_argument("--to", default="transformers", choices=("transformers", "open_clip"), help="default: %(default)s")
    parser.add_argument("--open_clip_model", help="what the checkpoint is of, such as ViT-B-16 or ViT-B-32-quickgelu")
    parser.add_argument("--tokenizer", default=CLIP_TOKENIZER, help="folder or Hub id (default: %(default)s, CLIP's own)")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    from .conversion_open_clip import MODELS, convert_open_clip_checkpoint, export_to_open_clip

    if options.to == "open_clip":
        model = CLIPModel.from_pretrained(options.source, dtype=torch.float32)
        export_to_open_clip(model, options.output, CLIPProcessor.from_pretrained(options.source))
        print(f'written to {options.output}: open_clip.create_model_and_transforms("local-dir:{options.output}")')
        return
    if not options.open_clip_model:
        raise ValueError(f"--open_clip_model: say what {options.source} is of, one of {', '.join(MODELS)}")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    token_ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    converted = convert_open_clip_checkpoint(options.source, options.open_clip_model, token_ids)
    size = converted.model.config.vision_config.image_size
    image_processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    converted.model.save_pretrained(options.output)
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(options.output)
    if converted.extra:
        print(f"left out, for a CLIP has no such weights: {', '.join(converted.extra)}")
    print(f'written to {options.output}: AutoModel.from_pretrained("{options.output}")')


def _add_export_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", help="a run or a checkpoint as a model that loads without this package")
    parser.add_argument("source", help="folder of a run, of a checkpoint or of a model, or a Hub id")
    parser.add_argument("output", type=Path, help="folder, made if it does not exist")
    parser.add_argument("--remote_code", action="store_true", help="the masked model with its code (default: a plain CLIP)")
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    source = _model_of(options.source)
    model = load_maskclip(source)
    processor_class = CLIPProcessor if isinstance(model, MaskCLIPModel) else CLIPImageProcessor
    export_to_clip(model, options.output, processor_class.from_pretrained(source), options.remote_code)
    trust = ", trust_remote_code=True" if options.remote_code else ""
    print(f'{source} written to {options.output}: AutoModel.from_pretrained("{options.output}"{trust})')


def _model_of(source: str) -> str:
    """The folder of the model that a run's folder holds: its export, or its last checkpoint where it has not ended."""
    folder = Path(source)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return source
    models = [*sorted(folder.glob("checkpoints/step-*[0-9]/config.json")), *folder.glob("export/config.json")]
    if not models:
        raise ValueError(f"{source}: holds no model, it has neither config.json nor export/ nor checkpoints/")
    return str(models[-1].parent)


def _add_report_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="tables of evaluation results beside the papers' numbers")
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="of training/evaluate.py, or eval.json of a run")
    parser.add_argument("-o", "--output", type=Path, help="Markdown file (default: printed)")
    parser.add_argument("--figure", type=Path, help="bars of the families' means: png, pdf or svg")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from .evaluation.report import draw_report, read_results

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


def _add_card_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("card", help="the model card of a run, or of a recipe that was not run yet")
    parser.add_argument("source", type=Path, metavar="RUN_DIR|RECIPE", help="folder of a run, or a YAML file of options")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown file")
    parser.add_argument("--repo_id", default="", metavar="ORG/NAME", help="of a run (default: org/ and its folder's name)")
    parser.set_defaults(run=_card)


def _card(options: argparse.Namespace) -> None:
    from .hub import ModelRepository, card_of_recipe, check_card

    if options.source.is_dir():
        card = ModelRepository(options.source, options.repo_id or f"org/{options.source.resolve().name}").card()
    else:
        card = card_of_recipe(options.source)
    options.output.write_text(f"{check_card(card)}\n")
    print(f"written to {options.output}")


def _add_push_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("push", help="a run to the Hub, as a model with its card")
    parser.add_argument("run_dir", type=Path, help="folder of a run of training/train.py")
    parser.add_argument("repo_id", metavar="ORG/NAME")
    parser.add_argument("--public", action="store_true", help="for all to see (default: a private repository)")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default: %(default)s)")
    parser.add_argument("--space", action="store_true", help="also its demo, as a Space of the same name")
    parser.add_argument("--dry_run", action="store_true", help="make and check the card and list the files, send nothing")
    parser.set_defaults(run=_push)


def _push(options: argparse.Namespace) -> None:
    from .hub import ModelRepository
    from .space import SpaceRepository

    repositories = [ModelRepository(options.run_dir, options.repo_id, options.license)]
    if options.space:
        repositories.append(SpaceRepository(options.repo_id))
    contents = [repository.content() for repository in repositories]  # what is wrong, before anything is sent
    if not options.dry_run:
        for repository in repositories:
            print(f"pushed to {repository.push(private=not options.public)}")
        return
    for repository, content in zip(repositories, contents, strict=True):
        print(content["README.md"].decode())
        place = f"{'the Space ' if repository.repo_type == 'space' else ''}{options.repo_id}"
        print(f"\nwould go to {place} ({'public' if options.public else 'private'}), with the card above:")
        for name, source in content.items():
            print(f"  {name}  {len(source) if isinstance(source, bytes) else source.stat().st_size:,} bytes")


def _open_picture(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for damaged and huge files
        raise ValueError(f"{path}: is no picture that can be read ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
