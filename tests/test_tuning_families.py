"""Proves that each family of dual encoders is tuned as CLIP is: a tower stays frozen to the last bit, adapters are what was
learnt, a resumed run is the same run, and the export lies between old and new weights."""

import shutil
from pathlib import Path

import pytest
import torch
from families import DUAL_ENCODERS, save_folder
from helpers import TOWERS, as_killed_at, same
from transformers import AutoModel

from hf_maskclip.errors import ConfigError


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.state_dict()


def go_on_from_the_second_step(run, written: Path, options: dict, steps: list[dict]) -> None:
    """The run that was killed there is the same run, with the same export, to the last bit."""
    expected = weights_of(written / "export")
    again = written.with_name("again")
    shutil.copytree(written, again)
    as_killed_at(again, 2)
    assert same(run(**options | {"output_dir": str(again), "resume": "auto"})[1]) == same(steps)
    after = weights_of(again / "export")
    assert [key for key, weight in expected.items() if not torch.equal(weight, after[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_a_frozen_tower_of_a_family(name, run, tmp_path):
    folder = save_folder(name, tmp_path / "model")
    options = {"model": str(folder), "freeze": "vision", "max_steps": 4, "checkpoint_every": 2, "chunk_size": 2}
    _, steps, written = run(**options, gradient_checkpointing=True)
    first, after = weights_of(folder), weights_of(written / "export")
    unchanged = {key for key, weight in first.items() if torch.equal(weight, after[key])}
    frozen = {key for key in first if key.startswith(TOWERS["vision"])}
    assert len(frozen) > 30
    assert frozen <= unchanged
    assert len(first.keys() - unchanged) > 30
    assert "logit_scale" not in unchanged
    go_on_from_the_second_step(run, written, options | {"gradient_checkpointing": True}, steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_adapters_of_a_family(name, run, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is of the test extra")
    folder = save_folder(name, tmp_path / "model")
    options = {"model": str(folder), "lora_rank": 2, "patch_mask": "pgs", "max_steps": 4, "checkpoint_every": 2}
    options |= {"interpolate_weights": 0.5, "ema_momentum": 0.5, "learning_rate": 0.01}
    _, steps, written = run(**options)
    first, after = weights_of(folder), weights_of(written / "export")
    changed = {key for key, weight in first.items() if not torch.equal(weight, after[key])}
    assert len(changed) == 24  # six layers of two in each tower
    adapted = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(folder), written / "adapter").merge_and_unload()
    for key, weight in adapted.state_dict().items():
        torch.testing.assert_close(weight, after[key], rtol=0, atol=1e-6)
    go_on_from_the_second_step(run, written, options, steps)


def test_the_bias_of_a_loss_is_kept_beside_interpolated_weights_and_refused_with_adapters(run, tmp_path):
    folder = save_folder("clip", tmp_path / "model")
    options = {"model": str(folder), "loss": "sigmoid", "max_steps": 4, "checkpoint_every": 2, "patch_mask": "pgs"}
    _, steps, written = run(**options, interpolate_weights=0.5)
    assert weights_of(written / "export").keys() == weights_of(folder).keys()
    go_on_from_the_second_step(run, written, options | {"interpolate_weights": 0.5}, steps)
    pytest.importorskip("peft", reason="peft is of the test extra")
    with pytest.raises(ConfigError, match="^lora_rank=2 and loss='sigmoid': adapters hold no bias, and this model has none"):
        run(**options, lora_rank=2)
