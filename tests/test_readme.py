"""Proves that README and docs are true: the tree is the tree, files and links exist, commands parse, code runs as written,
and so do those commands that convert and export (test_hub.py runs those that push)."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from families import save_folder
from helpers import CAPTIONS, random_picture, reset_accelerate
from processes import without_pictures
from tiny_siglip import know_tiny_siglip, letters_tokenizer, write_folder
from transformers import AutoModel, CLIPModel, SiglipModel, pipeline

from hf_maskclip import cli, export_to_clip
from hf_maskclip.cli import EXAMPLES, build_parser
from hf_maskclip.conversion.open_clip import export_to_open_clip
from hf_maskclip.conversion.open_clip_architecture import MODELS
from hf_maskclip.conversion.open_clip_siglip import MODELS as SIGLIP_MODELS
from hf_maskclip.conversion.open_clip_siglip import TANH
from hf_maskclip.conversion.open_clip_weights import to_open_clip_weights
from hf_maskclip.evaluation.command import check_options
from hf_maskclip.evaluation.datasets import scenes
from training.config import load_config
from training.train import program

ROOT = Path(__file__).resolve().parents[1]
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
ALL = "\n".join(PAGES.values())


def blocks(language: str, text: str = ALL) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


# The code of each page, by the page's name and its number there. test_brought_data.py runs that of docs/data.md.
CODE = {
    f"{page} {number}": code
    for page, text in PAGES.items()
    if page != "data"
    for number, code in enumerate(blocks("python", text))
}
assert len(CODE) > 12


def paths_of_the_tree() -> tuple[set[str], set[str]]:
    """The folders that the tree shows by its indents of two spaces, and the files that its words name in them."""
    (tree,) = [block for block in blocks("text", PAGES["architecture"]) if "hf_maskclip/" in block]
    folders, files, parents = set(), set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], line.split()[0].rstrip("/")]
        folder = "/".join(parents)
        folders.add(folder)
        files |= {f"{folder}/{name}" for name in re.findall(r"\b\w+\.(?:py|md)\b", line)}
    return folders, files


def test_the_tree_names_every_folder_and_nothing_that_is_not_there():
    folders, files = paths_of_the_tree()
    everything = [path for room in ("hf_maskclip", "training") for path in (ROOT / room).rglob("*") if path.is_file()]
    actual = {str(path.parent.relative_to(ROOT)) for path in everything if "__pycache__" not in path.parts}
    assert {"hf_maskclip", "training", "hf_maskclip/models"} <= actual
    assert actual - folders == set()
    assert files
    assert [name for name in sorted(folders) if not (ROOT / name).is_dir()] == []
    assert [name for name in sorted(files) if not (ROOT / name).is_file()] == []


def test_every_file_it_names_exists():
    named = set(re.findall(r"`((?:hf_maskclip|training|tests|model_cards)/[\w./-]+)`", ALL))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    folder = ROOT if page == "README" else ROOT / "docs"
    for name, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", PAGES[page]):
        target = folder / name if name else folder / f"{page}.md"
        assert target.exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor


def training_commands() -> list[list[str]]:
    commands = []
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").replace("$mask", "pgs").splitlines():
            _, found, arguments = line.partition("training/train.py")
            if found:
                commands.append(shlex.split(arguments, comments=True))
    return commands


def test_every_training_command_parses():
    commands = training_commands()
    assert len(commands) >= 3
    assert [] in commands  # the quickstart
    exec(CODE["architecture 0"], {})  # my_masks, which a command imports
    for arguments in commands:
        load_config([word for word in arguments if word not in ("--help", "--dry_run", "--import", "my_masks")])


def arguments_of(program: str, text: str) -> list[list[str]]:
    lines = re.findall(rf"{re.escape(program)} ([^`\n]+)", text)
    return [shlex.split(line, comments=True) for line in lines]


def test_every_evaluation_command_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    commands = [arguments for name in ("hf-maskclip", "-m hf_maskclip") for arguments in arguments_of(f"{name} evaluate", ALL)]
    assert len(commands) >= 3
    for arguments in commands:
        options = build_parser().parse_args(["evaluate", *arguments])
        if not options.list_tasks:
            check_options(options)


@pytest.mark.parametrize("text", [ALL, EXAMPLES], ids=["pages", "help"])
def test_every_command_of_the_package_parses(text):
    commands = arguments_of("hf-maskclip", text)
    assert commands
    for arguments in commands:
        build_parser().parse_args(arguments)


@pytest.fixture
def folder(make_model, processor, tmp_path, monkeypatch) -> Path:
    """Where the README's code and commands run: the models there are tiny, everything else is the README's text."""
    monkeypatch.chdir(tmp_path)
    export_to_clip(make_model(), tmp_path / "runs" / "quickstart" / "export", processor)
    random_picture(0).save(tmp_path / "photo.jpg")
    random_picture(0).save(tmp_path / "runs" / "quickstart" / "example.png")
    for number, name in enumerate(("cat", "cat", "dog", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        random_picture(number).save(tmp_path / "photos" / name / f"{number}.jpg")
    captions = ["file_name,text", *(f"{number}.jpg,{caption}" for number, caption in enumerate(CAPTIONS))]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "metadata.csv").write_text("\n".join(captions), encoding="utf-8")
    for number in range(len(CAPTIONS)):
        random_picture(number).save(tmp_path / "pairs" / f"{number}.jpg")
    torch.manual_seed(0)
    return tmp_path


def run_the_training_that_code_reads(code: str, monkeypatch) -> None:
    """Carry out the commands of the page whose folders the code names, with a budget for tests."""
    small = ["--max_steps", "2", "--batch_size", "2", "--num_workers", "0"]
    for arguments in training_commands():
        if "--output_dir" in arguments and f'"{arguments[arguments.index("--output_dir") + 1]}/' in code:
            without_pictures(monkeypatch)
            reset_accelerate()
            assert program([*arguments, *small]) == 0


@pytest.mark.parametrize("code", CODE.values(), ids=CODE)
def test_the_code_runs_as_written(code, folder, monkeypatch):
    for package in ("peft", "sentence_transformers", "timm"):
        if re.search(rf"^(?:from|import) {package}\b", code, flags=re.MULTILINE):
            pytest.importorskip(package, reason=f"{package} is of the test extra")
    run_the_training_that_code_reads(code, monkeypatch)
    code = code.replace('"per_device_train_batch_size": 64', '"per_device_train_batch_size": 2')  # of four pairs
    code = code.replace('"per_device_train_batch_size": 1024', '"per_device_train_batch_size": 4')
    code = code.replace("chunk_size = 64", "chunk_size = 2").replace("unmasked_tuning_steps=100", "unmasked_tuning_steps=1")
    for name, model in {"google/siglip2-base-patch16-224": "siglip", "facebook/metaclip-2-worldwide-b32": "metaclip_2"}.items():
        if name in code:
            code = code.replace(name, str(save_folder(model, folder / model)))
    exec(compile(code, "page.md", "exec"), {})
    if "runs/photos/export" in code:
        classes = pipeline("image-classification", model="runs/photos/export")("photo.jpg")
        assert sorted(score["label"] for score in classes) == ["cat", "dog"]
    if "runs/pairs/export" in code:
        assert type(AutoModel.from_pretrained("runs/pairs/export")) is CLIPModel


def test_the_commands_that_draw_evaluate_and_report_run_as_written(folder, monkeypatch, capsys):
    random_picture(1).save("another.jpg")
    for name in ("SCENES_PER_SET", "PROBE_SCENES", "COMPOSITIONALITY_SCENES"):
        monkeypatch.setattr(scenes, name, 20)
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    wanted = ("hf-maskclip masks ", "hf-maskclip evaluate --model runs/quickstart", "hf-maskclip report runs/quickstart")
    commands = dict.fromkeys(line for line in lines if line.startswith(wanted))
    assert len(commands) == 5
    made = ("masks.png", "steps.png", "runs/quickstart/eval_scenes.json", "runs/quickstart/speed.png")
    for line in commands:
        assert cli.main(shlex.split(line, comments=True)[1:]) == 0, capsys.readouterr().err
    assert all(Path(name).stat().st_size for name in made)
    assert "zero_shot" not in capsys.readouterr().err


def test_the_commands_that_convert_and_export_run_as_written(folder, make_clip, make_model, processor, monkeypatch, capsys):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is of the test extra")
    export_to_open_clip(make_clip(), "tiny", processor)
    monkeypatch.setitem(MODELS, "ViT-B-16", json.loads(Path("tiny/open_clip_config.json").read_text())["model_cfg"])
    tokenizer = processor.tokenizer
    monkeypatch.setattr("hf_maskclip.conversion.command.clip_tokenizer", lambda: tokenizer)
    weights = {f"module.{name}": weight for name, weight in to_open_clip_weights(make_clip().state_dict()).items()}
    torch.save({"epoch": 32, "state_dict": weights}, "epoch_32.pt")
    siglip = know_tiny_siglip(monkeypatch, TANH)
    monkeypatch.setitem(SIGLIP_MODELS, "ViT-B-16-SigLIP2", siglip)
    write_folder(Path("there"), siglip, letters_tokenizer())
    Path("there/open_clip_model.safetensors").rename("open_clip_model.safetensors")
    letters_tokenizer().save_pretrained("timm/ViT-B-16-SigLIP2")
    checkpoint = "runs/clip-pgs-b16/checkpoints/step-00010000"
    make_model(seed=1).save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)

    made = {}
    for command in ("convert", "export"):
        for arguments in arguments_of(f"hf-maskclip {command}", PAGES["hub"]):
            assert cli.main([command, *arguments]) == 0, capsys.readouterr().err
            made[command, arguments[0]] = Path(arguments[1])
    assert len(made) == 5
    assert type(AutoModel.from_pretrained(made["convert", "open_clip_model.safetensors"])) is SiglipModel
    there = open_clip.create_model_and_transforms(f"local-dir:{made['convert', 'clip-pgs-b16']}")[0].state_dict()
    assert torch.equal(there["visual.proj"], weights["module.visual.proj"])
    exported = AutoModel.from_pretrained(made["export", checkpoint])  # in the place of what was converted
    assert torch.equal(exported.visual_projection.weight, make_model(seed=1).visual_projection.weight)
    assert (made["export", "runs/quickstart"] / "modeling_maskclip.py").is_file()
