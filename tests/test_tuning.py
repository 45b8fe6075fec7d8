"""Proves that a run which tunes a model of others changes what it was asked to change and nothing else: a tower stays frozen to
the last bit, adapters are what was learnt, each tower has its learning rate, and what cannot be meant is refused."""

import json
import re

import pytest
import torch
from helpers import TOWERS, reset_accelerate, unchanged, weights_of
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModel, ChineseCLIPConfig, CLIPConfig, CLIPModel, SiglipConfig

from hf_maskclip import MaskCLIPModel
from hf_maskclip.errors import ConfigError
from training import loop
from training.config import TrainingConfig
from training.dry_run import dry_run
from training.model.adapters import layers_of
from training.model.freezing import tower_of
from training.run import prepare
from training.summary import run_in_words

MANY = {"learning_rate": 0.01, "warmup_steps": 0}  # so that few steps change much


@pytest.fixture
def models(monkeypatch) -> list[MaskCLIPModel]:
    """The models of the steps that runs take."""
    seen: list[MaskCLIPModel] = []
    step = loop.training_step

    def recorded(run, *args):
        result = step(run, *args)
        seen.append(run.learner.model)
        return result

    monkeypatch.setattr(loop, "training_step", recorded)
    return seen


# ---- A frozen tower --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    "changed",
    [{}, {"chunk_size": 2}, {"gradient_checkpointing": True}, {"ema_momentum": 0.5}, {"interpolate_weights": 0.3}],
    ids=str,
)
def test_a_frozen_tower_is_the_same_to_the_last_bit_and_the_other_learns(tower, changed, run, base, models):
    _, steps, folder = run(**(MANY | changed), model=base, freeze=tower, max_steps=2)
    same_weights, keys = unchanged(folder / "export", base), weights_of(base).keys()
    assert same_weights == {key for key in keys if key.startswith(TOWERS[tower])}
    assert 10 < len(same_weights) < len(keys) - 10
    assert all(record["kept_patches"] == (16 if tower == "vision" else 8) for record in steps)
    modes = {name: module.training for name, module in models[0].named_modules() if name}
    assert modes == {name: not f"{name}.".startswith(TOWERS[tower]) for name in modes}


@pytest.mark.parametrize(("patch_mask", "kept"), [("", 16), ("random", 8), ("cluster", None)])
def test_a_frozen_vision_tower_sees_whole_pictures_unless_a_mask_is_given(patch_mask, kept, run, base, capsys):
    _, steps, folder = run(model=base, freeze="vision", patch_mask=patch_mask, max_steps=2)
    if kept:
        assert [record["kept_patches"] for record in steps] == [kept, kept]
    else:
        assert all(record["kept_patches"] < 16 for record in steps)
    sees = "sees what the patch mask leaves" if patch_mask else "sees whole pictures"
    assert f"million parameters (frozen vision tower, which {sees}: 0.0 million are trained), patch" in capsys.readouterr().err
    assert f"name: {patch_mask or 'none'}" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize("patch_mask", ["", "random", "cluster"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_a_frozen_tower_is_kept_for_a_backward_pass(patch_mask, checkpointing, base, options):
    def kept(tower: str) -> list[torch.Tensor]:
        reset_accelerate()
        changed = {"model": base, "freeze": tower, "patch_mask": patch_mask, "gradient_checkpointing": checkpointing}
        run = prepare(TrainingConfig(**(options | changed)))
        run.learner.train_mode()
        pixels = torch.randn(2, 3, 32, 32)
        selection = run.learner.patches.select(pixels, step=1)
        saved: list[torch.Tensor] = []
        with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
            model = run.learner.model
            features = model.get_image_features(pixels, patch_selection=selection, apply_patch_mask=selection is not None)
        assert features.pooler_output.requires_grad == (tower != "vision")
        return saved

    assert kept("vision") == []
    assert kept("text") != []


def test_a_dry_run_counts_what_is_trained(base, options):
    numbers = {}
    for tower in ("none", "vision"):
        reset_accelerate()
        numbers[tower] = dry_run(TrainingConfig(**(options | {"model": base, "freeze": tower, "patch_mask": "none"})))
    assert numbers["none"]["trained_parameters"] == numbers["none"]["parameters"] == numbers["vision"]["parameters"]
    sizes = {key: value.numel() for key, value in weights_of(base).items()}
    frozen = sum(size for key, size in sizes.items() if key.startswith(TOWERS["vision"]))
    assert numbers["none"]["trained_parameters"] - numbers["vision"]["trained_parameters"] == frozen
    assert numbers["none"]["state_bytes"] - numbers["vision"]["state_bytes"] == 12 * frozen
    assert numbers["vision"]["activation_bytes"] < 0.7 * numbers["none"]["activation_bytes"]


# ---- Adapters --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "patch_mask"),
    [
        ({}, "none"),
        ({}, "random"),
        ({"chunk_size": 2}, "cluster"),
        ({"gradient_checkpointing": True}, "none"),
        ({"gradient_checkpointing": True}, "random"),
        ({"gradient_checkpointing": True}, "cluster"),
        ({"ema_momentum": 0.5}, "random"),
        ({"freeze": "text"}, "random"),
    ],
    ids=str,
)
def test_adapters_are_all_that_is_learnt_and_give_the_export_on_the_base(changed, patch_mask, run, base, models):
    peft = pytest.importorskip("peft", reason="peft is of the test extra")
    options = MANY | changed | {"patch_mask": patch_mask, "mixed_precision": "no"}
    _, steps, folder = run(**options, model=base, lora_rank=2, max_steps=2)
    weights = {name: weight for name, weight in models[0].named_parameters() if weight.requires_grad}
    towers = ["vision"] if changed == {"freeze": "text"} else ["text", "vision"]
    assert {name.rpartition(".lora_")[0] for name in weights} == {
        f"{tower}_model.encoder.layers.{layer}.{part}"
        for tower in towers
        for layer in range(2)
        for part in (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
    }
    assert all(weight.abs().sum() > 0 for weight in weights.values())  # B begins at 0: each has got a gradient
    assert all((record["kept_patches"] == 16) == (patch_mask == "none") for record in steps)

    changed_keys = weights_of(base).keys() - unchanged(folder / "export", base)
    assert changed_keys == {f"{name.rpartition('.lora_')[0]}.weight" for name in weights}
    adapted = peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(base), folder / "adapter")
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (2, 2, base)
    exported = weights_of(folder / "export")
    for key, value in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(value, exported[key], rtol=0, atol=1e-7)


TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "towers", "count"),
    [
        (CLIPConfig(text_config=TINY, vision_config=TINY), ["vision", "text"], 24),
        (CLIPConfig(text_config=TINY, vision_config=TINY), ["vision"], 12),
        (SiglipConfig(text_config=TINY, vision_config=TINY), ["vision", "text"], 24),  # not those of its heads
        (ChineseCLIPConfig(text_config=TINY, vision_config=TINY), ["text"], 12),
    ],
    ids=["clip", "clip-vision", "siglip", "chinese-clip-text"],
)
def test_the_layers_with_adapters_are_attention_and_mlp_whatever_their_names(config, towers, count):
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    pattern = layers_of(model, towers)
    found = {name: module for name, module in model.named_modules() if re.fullmatch(pattern, name)}
    assert len(found) == count
    assert all(isinstance(module, torch.nn.Linear) and tower_of(name) in towers for name, module in found.items())


def test_a_model_between_the_weights_has_adapters_between_them(run, base):
    peft = pytest.importorskip("peft", reason="peft is of the test extra")
    _, _, folder = run(**MANY, model=base, lora_rank=2, interpolate_weights=0.25)
    adapted = peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(base), folder / "adapter")
    exported = weights_of(folder / "export")
    assert unchanged(folder / "export", base) != exported.keys()
    for key, value in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(value, exported[key], rtol=0, atol=1e-7)


# ---- Learning rates --------------------------------------------------------------------------------------------------------


def test_each_tower_has_the_learning_rate_that_it_was_given(run, base, models, tmp_path):
    """Adam's first step moves a weight by its learning rate, whatever the gradient; weight decay is off."""
    options = {"model": base, "max_steps": 1, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 0.0}
    rates = {"learning_rate": 1e-3, "learning_rate_vision": 1e-2, "learning_rate_text": 1e-4}
    _, steps, folder = run(**options, **rates)
    after, before = weights_of(folder / "export"), weights_of(base)
    moved = {key: (after[key] - before[key]).abs().max().item() for key in before}
    for key, distance in moved.items():
        if "k_proj.bias" in key:
            continue  # attention does not depend on it: its gradient is rounding
        tower = next((name for name, parts in TOWERS.items() if key.startswith(parts)), "")
        expected = rates[f"learning_rate_{tower}" if tower else "learning_rate"]
        assert distance == pytest.approx(expected, rel=0.1), key
    assert {key: steps[0][key] for key in rates} == rates
    _, steps, _ = run(**(options | {"max_steps": 4}), **rates, output_dir=str(tmp_path / "longer"))
    scaled = [[record[key] / rates[key] for key in rates] for record in steps]
    assert all(shares == pytest.approx([shares[0]] * 3) for shares in scaled)
    assert scaled[3][0] < scaled[1][0] < 1


# ---- What is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"freeze": "text", "model": "tiny"},
            "^freeze='text': model='tiny' begins with random weights; give a folder or",
        ),
        ({"lora_rank": 4, "model": "tiny"}, "^lora_rank=4: model='tiny' begins with random weights"),
        ({"interpolate_weights": 0.5, "model": "tiny"}, "^interpolate_weights=0.5: model='tiny' begins with random"),
        ({"interpolate_weights": 0.0}, "^interpolate_weights=0.0: must be above 0 and at most 1"),
        (
            {"freeze": "vision", "learning_rate_vision": 0.1},
            "^learning_rate_vision=0.1: nothing of that tower learns, for",
        ),
        ({"freeze": "vision", "mask_schedule": 0.5}, "^mask_schedule=0.5: the patch mask 'none' has no mask_ratio"),
        ({"lora_rank": 4, "absent": True}, r"^lora_rank=4: needs PEFT \(pip install 'peft>=0.18'\)"),
        (
            {"lora_rank": 4, "launcher": "DEEPSPEED"},
            "^lora_rank=4: adapters have few moments, which DeepSpeed would share;",
        ),
        ({"lora_rank": 4, "launcher": "FSDP"}, "^lora_rank: needs whole weights on every process, which FSDP splits; use DDP"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(changed, message, run, base, monkeypatch):
    if changed.pop("absent", False):
        monkeypatch.setattr("training.model.adapters.find_spec", lambda name: None)
    elif "lora_rank" in changed:
        pytest.importorskip("peft", reason="peft is of the test extra")
    if launcher := changed.pop("launcher", ""):
        if launcher == "DEEPSPEED":
            pytest.importorskip("deepspeed", reason="deepspeed is of the test extra")
        monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    with pytest.raises(ConfigError, match=message) as error:
        run(**({"model": base} | changed))
    assert "\n" not in str(error.value)


def test_the_start_says_what_is_trained(base, options):
    pytest.importorskip("peft", reason="peft is of the test extra")
    reset_accelerate()
    config = TrainingConfig(**(options | {"model": base, "freeze": "text", "lora_rank": 4}))
    assert " million parameters (frozen text tower, adapters of rank 4: 0.0 million are trained), patch mask random" in (
        run_in_words(prepare(config))
    )
