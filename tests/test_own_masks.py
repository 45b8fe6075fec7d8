"""Proves that a mask of one's own is one file and one line, wherever it is from: a module that `--import` names, or an
installed package with an entry point. Training, evaluation, pictures and cards take it by name, and it keeps the contract of
all masks."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import test_patch_masking as contract
import torch
import yaml
from helpers import losses_of, photo_like, random_picture

from hf_maskclip import build_patch_mask, export_to_clip
from hf_maskclip.cli import main as cli
from hf_maskclip.models import patch_mask_registry
from hf_maskclip.models.patch_mask_registry import BUILT_IN, patch_masks
from hf_maskclip.models.patch_masking import keep_count
from training.train import program

ROOT = Path(__file__).resolve().parents[1]
# Keeps the patches with the brightest mean; ten lines.
MASK = """
from hf_maskclip import PatchMask, PatchSelection
from hf_maskclip.models.patch_masking import keep_count, keep_first, patchify

class BrightestPatchMask(PatchMask):
    def __init__(self, mask_ratio: float = 0.5, *, patch_size: int = 16):
        super().__init__(patch_size=patch_size)
        self.mask_ratio = mask_ratio

    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
        brightness = patchify(pixel_values, self.patch_size).mean(dim=(2, 3))  # (B, L)
        order = brightness.argsort(dim=1, descending=True)
        return keep_first(order, keep_count(brightness.shape[1], self.mask_ratio))
"""
REGISTRATION = """
from hf_maskclip import register_patch_mask
register_patch_mask("brightest", BrightestPatchMask)
"""


@pytest.fixture(params=["--import", "entry point"])
def known(request, tmp_path, monkeypatch):
    """The arguments under which a program knows the mask `brightest`."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "bright_masks", raising=False)
    if request.param == "--import":
        (folder / "bright_masks.py").write_text(MASK + REGISTRATION)
        yield ["--import", "bright_masks"]
    else:  # as pip lays out an installed package
        (folder / "bright_masks.py").write_text(MASK)
        about = folder / "bright_masks-0.1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bright-masks\nVersion: 0.1\n")
        (about / "entry_points.txt").write_text("[hf_maskclip.patch_masks]\nbrightest = bright_masks:BrightestPatchMask\n")
        patch_mask_registry.forget_installed_packages()
        yield []
    monkeypatch.undo()
    patch_mask_registry.forget_installed_packages()
    sys.modules.pop("bright_masks", None)


def words(options: dict) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def test_training_evaluation_pictures_and_cards_take_it_by_name(known, options, processor, make_model, tmp_path, capsys):
    command = words(options | {"max_steps": 2, "patch_mask": "{name: brightest, mask_ratio: 0.75}"})
    assert program([*known, *command]) == 0, capsys.readouterr().err
    folder = Path(options["output_dir"])
    assert [record["kept_patches"] for record in losses_of(folder)] == [16, 16]
    assert yaml.safe_load((folder / "config.yaml").read_text())["patch_mask"]["name"] == "brightest"

    test = ["--data", f"{tmp_path}/data/val-0.tar", "--task", "retrieval", "--patch_mask", "brightest"]
    output = str(tmp_path / "eval.json")
    assert cli(["evaluate", *known, "--model", str(folder / "export"), *test, "--output", output]) == 0
    (record,) = json.loads(Path(output).read_text())["results"].values()
    assert record["patch_mask"] == {"name": "brightest", "mask_ratio": 0.5}

    random_picture(0).save(tmp_path / "photo.png")
    pictures = ["--mask", "brightest", "--image_size", "32", "--patch_size", "8", "-o", str(tmp_path / "masks.png")]
    assert cli(["masks", *known, str(tmp_path / "photo.png"), *pictures]) == 0
    assert (tmp_path / "masks.png").stat().st_size > 5_000

    assert cli(["card", *known, str(folder), "-o", str(tmp_path / "card.md")]) == 0
    card = (tmp_path / "card.md").read_text()
    assert "patch-mask-brightest" in card
    assert "bibtex" not in card  # it has no paper


def test_it_keeps_the_contract_of_the_built_in_masks(known):
    if known:
        from hf_maskclip.options import import_module_of_user

        import_module_of_user(known[1])
    assert set(patch_masks()) == {*BUILT_IN, "brightest"}
    images = photo_like(3, 32, 48)
    for ratio in (0.0, 0.3, 0.9):
        selection = build_patch_mask("brightest", patch_size=8, mask_ratio=ratio)(images)
        assert selection.indices.shape == (3, keep_count(24, ratio))
        assert (selection.indices.diff(dim=1) > 0).all()
    images[:, :, 8:16, 8:16] = 9.0
    brightest = build_patch_mask("brightest", patch_size=8, mask_ratio=0.9)(images)
    assert (brightest.indices == 7).any(dim=1).all()


def test_a_mask_whose_module_is_not_named_is_one_line_that_says_what_to_do(options, capsys):
    assert program(words(options | {"patch_mask": "brightest"})) == 2
    error = capsys.readouterr().err
    assert "unknown patch mask 'brightest': must be one of none, random," in error
    assert "(--import MODULE)" in error
    assert error.count("\n") == 1


def test_a_module_that_cannot_be_imported_is_one_line(options, capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_masks.py").write_text("1 / 0\n")
    for name, reason in (("absent_masks", "No module named 'absent_masks'"), ("broken_masks", "ZeroDivisionError")):
        assert program([*words(options), "--import", name]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --import {name}: cannot be imported (")
        assert reason in error
        assert error.count("\n") == 1


def test_a_package_that_offers_no_mask_is_named_and_harms_no_other(tmp_path, monkeypatch, make_model):
    about = tmp_path / "bad_masks-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-masks\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[hf_maskclip.patch_masks]\nbad = bad_masks:Mask\n")
    (tmp_path / "bad_masks.py").write_text("Mask = int\n")
    monkeypatch.syspath_prepend(tmp_path)
    patch_mask_registry.forget_installed_packages()
    try:
        with pytest.raises(ValueError, match="patch mask 'bad' of bad-masks: cannot be used .*must be a subclass"):
            build_patch_mask("bad")
        assert make_model("pgs").train()(pixel_values=torch.randn(1, 3, 32, 32), input_ids=torch.ones(1, 8).long())
    finally:
        patch_mask_registry.forget_installed_packages()


def test_a_new_built_in_mask_is_one_file_and_one_row(monkeypatch, tmp_path, make_model, processor, inputs):
    """What CONTRIBUTING says is enough, the class and its row in the registry, under the contract tests of all masks."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "patch_masking_brightest.py").write_text(MASK)
    module = importlib.import_module("patch_masking_brightest")
    monkeypatch.setitem(patch_mask_registry.BUILT_IN, "brightest", module.BrightestPatchMask)
    monkeypatch.setitem(contract.MASKS, "brightest", ("brightest", 0.5, 0.5))
    for grid in contract.GRIDS:
        contract.test_kept_counts_are_within_bounds_and_indices_in_order("brightest", grid, "cpu")
    contract.test_half_precision_input_gives_a_valid_selection("brightest", torch.bfloat16, "cpu")
    contract.test_flat_and_noisy_images_give_a_valid_selection("brightest", "cpu")
    contract.test_masks_never_wait_for_the_device("brightest")
    contract.test_masks_have_no_state_and_rebuild_from_their_dict("brightest")
    contract.test_ratios_scaled_by_a_ramp_go_from_nothing_to_the_full_mask("brightest")

    model = make_model("brightest").train()
    output = model(**inputs, return_loss=True)
    assert output.patch_selection.indices.shape == (4, 8)
    output.loss.backward()
    export_to_clip(model, tmp_path / "export", processor)
    recorded = json.loads((tmp_path / "export" / "config.json").read_text())["vision_config"]["patch_mask"]
    assert recorded == {"name": "brightest", "mask_ratio": 0.5}


@pytest.mark.parametrize("name", ["gaussian", "grid", "attentive"])
def test_a_mask_is_named_in_its_row_of_the_registry_and_nowhere_else(name):
    """Masks that no default and no picture names; so a new one needs no other line of code."""
    sources = [*ROOT.glob("hf_maskclip/**/*.py"), *ROOT.glob("training/*.py"), *ROOT.glob("training/[dmp]*/**/*.py")]
    named = [file for file in sources if f'"{name}"' in file.read_text(encoding="utf-8")]
    assert [file.name for file in named] == ["patch_mask_registry.py"]
    own = [file.name for file in sources if f"patch_masking_{name}" in file.read_text(encoding="utf-8")]
    assert "patch_mask_registry.py" in own
