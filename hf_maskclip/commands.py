"""What the commands of `hf-maskclip` do, each with the options that `cli.py` has parsed.

Each imports what it needs by itself, so that none waits for the packages of another.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError, as_config_error, fail
from .model_folder import find_model
from .options import QUICKSTART_MODEL

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

KEPT_CARD = "{} has a card that was edited on the Hub: it is kept, delete its README.md there to get the new one"


def draw_masks(options: argparse.Namespace) -> None:
    """Draw what each mask leaves of pictures, or the stages of PGS."""
    from .dual_encoders import load_teacher
    from .models.patch_mask_registry import patch_masks
    from .visualization import draw_patch_masks, draw_pgs_steps

    masks = _masks_to_draw(options)
    images = [_open_picture(path) for path in options.images]
    teacher, image_size, patch_size = {}, 224, 16
    if options.model:
        with as_config_error("--model", options.model):
            tower, statistics = load_teacher(find_model(options.model))
        teacher = {"teacher": tower, "statistics": statistics}
        image_size, patch_size = tower.config.image_size, tower.config.patch_size
        if options.patch_size not in (None, patch_size):
            fail(f"--patch_size {options.patch_size}: the patches of {options.model} have {patch_size} pixels")
    sizes = {"image_size": image_size if options.image_size is None else options.image_size}
    sizes["patch_size"] = patch_size if options.patch_size is None else options.patch_size
    with as_config_error("--image_size", sizes["image_size"]):
        if options.steps:
            figure = draw_pgs_steps(images, **sizes, seed=options.seed)
        else:
            figure = draw_patch_masks(images, {name: name for name in masks}, **teacher, **sizes, seed=options.seed)
    _save_figure(figure, options.output)
    if not options.mask and not options.model:
        left_out = [name for name, mask in patch_masks().items() if mask.needs_patch_scores]
        print(f"{', '.join(left_out)} is left out: it goes by a model's attention, see --model")


def _masks_to_draw(options: argparse.Namespace) -> list[str]:
    """The names of the masks that the options ask for, without those that need a model where there is none."""
    from .models.patch_mask_registry import find_patch_mask, patch_masks

    for name in options.mask or ():
        with as_config_error("--mask", name):
            find_patch_mask(name)
    if options.steps and options.mask != ["pgs"]:
        fail("--steps draws the stages of pgs: give --mask pgs")
    known = patch_masks()
    masks = options.mask or [name for name, mask in known.items() if not mask.keeps_all]
    need_teacher = [name for name in masks if known[name].needs_patch_scores]
    if options.model and not need_teacher:
        fail(f"--model {options.model}: none of the masks goes by a model's attention")
    if options.model or not need_teacher:
        return masks
    if options.mask:
        fail(f"--mask {need_teacher[0]} goes by a model's attention: give --model")
    return [name for name in masks if name not in need_teacher]


def run_demo(options: argparse.Namespace) -> None:
    """Show the demo in the browser, until Ctrl-C."""
    try:
        from .demo import build_demo
    except ImportError as error:  # Gradio is an extra
        fail(str(error))
    if not 0 < options.port < 65_536:
        fail(f"--port {options.port}: must be from 1 to 65535")
    if options.model == QUICKSTART_MODEL and not Path(QUICKSTART_MODEL).is_dir():
        make = "`python training/train.py` makes it"
        fail(f"{QUICKSTART_MODEL}: no such folder; {make}, or give --model")
    model = find_model(options.model)
    with as_config_error("--model", options.model):
        page = build_demo(model)
    where = {"server_name": options.host, "server_port": options.port, "share": False}
    try:
        page.launch(**where, quiet=True, prevent_thread_lock=True)
    except OSError:
        fail(f"--host {options.host} --port {options.port}: cannot be used; is it in use already?")
    print(f"{page.local_url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def convert(options: argparse.Namespace) -> None:
    """Convert a checkpoint of open_clip to a folder of Transformers, or back."""
    from .conversion.command import from_open_clip, to_open_clip

    (to_open_clip if options.to == "open_clip" else from_open_clip)(options)


def export(options: argparse.Namespace) -> None:
    """Write a run, a checkpoint or a model as its plain class of Transformers, or a CLIP with its code."""
    from .conversion.clip import export as export_model
    from .conversion.source import load_for_export

    source = find_model(options.source)
    with as_config_error("source", source):
        model, processor = load_for_export(source)
    with as_config_error("output", options.output):
        export_model(model, options.output, processor, options.remote_code)
    trust = ", trust_remote_code=True" if options.remote_code else ""
    print(f'{source} written to {options.output}: AutoModel.from_pretrained("{options.output}"{trust})')


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate a model on a data set or a suite."""
    from .evaluation.command import evaluate, list_tasks

    if options.list_tasks:
        print(list_tasks())
    else:
        evaluate(options)


def download(options: argparse.Namespace) -> None:
    """Get the papers' evaluation data, one part after the other, or say how large each is."""
    from .evaluation.download import fetch, merged, size_of
    from .evaluation.suites import choose_tasks, tasks_of_suite

    tasks = choose_tasks(tasks_of_suite("paper", data_root=str(options.data_root)), options.tasks)
    parts = merged(part for task in tasks for part in task.missing)
    sizes = [size_of(part) for part in parts]
    for part, size in zip(parts, sizes, strict=True):
        print(f"{part.place}  {size / 1e6:,.0f} MB  {part.source} {' '.join(part.files)}".rstrip(), flush=True)
        if not options.dry_run:
            fetch(part)
    print(f"{sum(sizes) / 1e9:,.1f} GB in {len(parts)} parts" if parts else "everything is there")


def report(options: argparse.Namespace) -> None:
    """Print or write the tables of evaluation results, and draw their figure."""
    from .evaluation.report import draw_report, make_tables
    from .evaluation.report_files import read_result_file

    files = [read_result_file(path) for path in options.results]
    for file in files:
        if file.left_out:
            print(f"{file.path}: left out, {file.left_out}", file=sys.stderr)
    tables = make_tables(files)
    if not tables:
        fail(f"{', '.join(map(str, options.results))}: no results in it")
    text = "\n".join(table.markdown() + table.other_settings() for table in tables)
    if options.output:
        _write(text, options.output)
    else:
        print(text)
    if options.figure:
        _save_figure(draw_report(tables), options.figure)


def write_card(options: argparse.Namespace) -> None:
    """Write the model card of a run or of a recipe."""
    from .hub.card import card_of_recipe, check_card
    from .hub.repository import ModelRepository

    if options.source.is_dir():
        card = ModelRepository(options.source, options.repo_id or f"org/{options.source.resolve().name}").card()
    else:
        card = card_of_recipe(options.source)
    _write(f"{check_card(card)}\n", options.output)


def push(options: argparse.Namespace) -> None:
    """Push a run to the Hub, or show what would go there."""
    from .dual_encoders import check_can_be_shown
    from .hub.repository import ModelRepository
    from .hub.space import SpaceRepository

    repositories = [ModelRepository(options.run_dir, options.repo_id, options.license)]
    if options.space:
        check_can_be_shown(str(options.run_dir / "export"))
        repositories.append(SpaceRepository(options.repo_id))
    contents = [repository.content() for repository in repositories]  # what is wrong, before anything is sent
    if not options.dry_run:
        for repository in repositories:
            with as_config_error("repository", options.repo_id):
                pushed = repository.push(private=not options.public)
            if pushed.keeps_card:
                print(KEPT_CARD.format(options.repo_id))
            print(f"pushed to {pushed.address}")
        return
    try:
        if repositories[0].has_edited_card():
            print(KEPT_CARD.format(options.repo_id))
    except ConfigError as error:
        print(f"{error}; a push keeps one that was")
    for repository, content in zip(repositories, contents, strict=True):
        print(content["README.md"].decode())
        target = f"{'the Space ' if repository.repo_type == 'space' else ''}{options.repo_id}"
        print(f"\nwould go to {target} ({'public' if options.public else 'private'}), with the card above:")
        for name, source in content.items():
            print(f"  {name}  {len(source) if isinstance(source, bytes) else source.stat().st_size:,} bytes")


def _open_picture(path: Path) -> "Image.Image":
    from .data.pictures import SkippedSample, decode_image

    if not path.is_file():
        fail(f"{path}: no such file")
    try:
        return decode_image(str(path))
    except SkippedSample as cause:
        fail(f"{path}: is no picture that can be read ({cause})")


def _write(text: str, output: Path) -> None:
    with as_config_error("--output", output):
        output.write_text(text, encoding="utf-8")
    print(f"written to {output}")


def _save_figure(figure: "Figure", output: Path) -> None:
    with as_config_error("--output", output):
        figure.savefig(output, dpi=150)
    print(f"written to {output}")
