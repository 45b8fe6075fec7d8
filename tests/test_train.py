"""Proves that the training program does its job: the real `main` on small data and on dirty data, with what it writes, and what
it refuses."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import encode_image, pair, random_picture, reset_accelerate, shared_data, without_speed, write_shard
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from hf_maskclip import MaskCLIPModel, PatchMask, PatchSelection, register_patch_mask
from hf_maskclip.errors import ConfigError
from hf_maskclip.models.patch_mask_registry import patch_masks
from hf_maskclip.models.patch_masking import keep_count
from training import loop
from training.config import TrainingConfig, load_config
from training.model import precision as fastest
from training.saving.checkpoint import prepare_output_dir
from training.tracking import read_metrics
from training.train import main

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4  # of `run`


def test_a_run_trains_evaluates_and_exports(run, data, capsys):
    summary, steps, folder = run(pictures=True, eval_data=f"{data}/val-0.tar", eval_every=2, checkpoint_every=3)
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    expected = {"loss", "learning_rate", "logit_scale", "kept_patches", "samples_seen", "samples_per_second"}
    assert expected | {"data_seconds", "step_seconds"} < steps[0].keys()
    assert all(math.isfinite(record["loss"]) for record in steps)
    assert steps[0]["loss"] == pytest.approx(math.log(4), abs=0.5)
    assert all(32 <= record["kept_patches"] <= 45.5 for record in steps)  # the bounds of PGS 0.3
    assert [record["samples_seen"] for record in steps] == [4, 8, 12, 16]

    evaluated = [r for r in read_metrics(folder / "metrics.jsonl") if "eval/retrieval_data/image_to_text_recall@5" in r]
    assert [record["step"] for record in evaluated] == [2, 4]
    results = json.loads((folder / "eval.json").read_text())
    assert load_config(["--config", str(folder / "config.yaml")]).max_steps == STEPS
    assert results == summary
    assert results["results"]["retrieval_data"]["n"] == 6
    assert results["patch_mask"]["name"] == "pgs"
    assert results["samples_seen"] == 16

    for name in ("masks.png", "curves.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
    exported, info = AutoModel.from_pretrained(folder / "export", output_loading_info=True)
    assert type(exported).__name__ == "CLIPModel"
    assert not info["missing_keys"]
    assert AutoTokenizer.from_pretrained(folder / "export")("a ball")["input_ids"]
    printed = capsys.readouterr().out
    assert f'AutoModel.from_pretrained("{folder}/export")' in printed
    assert "retrieval_data" in printed
    assert f'classify("{folder}/example.png"' in printed
    assert (folder / "example.json").is_file()

    checkpoint = MaskCLIPModel.from_pretrained(folder / "checkpoints" / "step-00000003")
    assert checkpoint.config.vision_config.patch_mask["name"] == "pgs"
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004"]  # the last state, too


@pytest.fixture
def before_each_step(monkeypatch):
    """Lets a function look at a run before each of its steps."""

    def look_with(look) -> None:
        step = loop.training_step
        monkeypatch.setattr(loop, "training_step", lambda run, *args: look(run) or step(run, *args))

    return look_with


@pytest.mark.parametrize("patch_mask", patch_masks())
def test_training_changes_every_weight_with_every_mask_and_learns(patch_mask, run, before_each_step):
    """To learn takes longer, so three stand for all: whole images, and two that leave images unequal numbers of patches."""
    learns, weights = patch_mask in ("none", "cluster", "pgs"), []
    before_each_step(lambda run: weights.append({key: value.clone() for key, value in run.learner.model.state_dict().items()}))
    options = {"batch_size": 10, "learning_rate": 3e-3, "crop_scale": 1.0, "flip": 0.0}
    _, steps, folder = run(patch_mask=patch_mask, max_steps=15 if learns else 2, **options)
    if learns:
        first, last = (sum(r["loss"] for r in part) / 5 for part in (steps[:5], steps[-5:]))
        assert last < first - 0.3
    assert all((record["kept_patches"] == 64) == (patch_mask == "none") for record in steps)
    after = AutoModel.from_pretrained(folder / "export").state_dict()
    assert after.keys() == weights[0].keys()
    assert [key for key, value in after.items() if not value.isfinite().all()] == []
    assert [key for key, value in after.items() if torch.equal(value, weights[0][key])] == []


def test_training_with_a_users_own_mask_by_name(run):
    class FirstPatches(PatchMask):
        def __init__(self, mask_ratio: float = 0.75, *, patch_size: int = 16):
            super().__init__(patch_size=patch_size)
            self.mask_ratio = mask_ratio

        def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
            return PatchSelection(torch.arange(keep_count(64, self.mask_ratio)).expand(len(pixel_values), -1))

    register_patch_mask("first", FirstPatches)
    _, steps, folder = run(patch_mask="first", max_steps=2, mask_schedule=1.0)
    assert [record["kept_patches"] for record in steps] == [64, 40]
    assert MaskCLIPModel.from_pretrained(folder / "export").config.vision_config.patch_mask["name"] == "first"


def test_one_seed_gives_one_run_and_another_seed_another(run, tmp_path):
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        _, steps, _ = run(seed=seed, output_dir=str(tmp_path / f"run{number}"))
        losses.append([record["loss"] for record in steps])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_the_last_steps_see_whole_images(run):
    _, steps, _ = run(patch_mask="random", unmasked_tuning_steps=2)
    assert [record["kept_patches"] for record in steps] == [32, 32, 64, 64]


def test_the_mask_ratio_grows_over_the_schedule(run):
    _, steps, _ = run(patch_mask="random", mask_schedule=0.5, unmasked_tuning_steps=1, max_steps=8)
    assert [record["kept_patches"] for record in steps] == [64, 56, 48, 40, 32, 32, 32, 64]


@pytest.mark.parametrize("patch_mask", ["random", "pgs"])
def test_gradient_checkpointing_changes_no_loss(patch_mask, run, tmp_path, monkeypatch):
    calls, losses = [], []
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    name = next(name for name in names if hasattr(MaskCLIPModel, name))
    original = getattr(MaskCLIPModel, name)
    monkeypatch.setattr(MaskCLIPModel, name, lambda model, options: calls.append(model) or original(model, options))
    for checkpointing in (False, True):
        output_dir = str(tmp_path / f"checkpointing-{checkpointing}")
        _, steps, _ = run(patch_mask=patch_mask, gradient_checkpointing=checkpointing, output_dir=output_dir)
        losses.append([record["loss"] for record in steps])
    assert len(calls) == 1
    assert calls[0].is_gradient_checkpointing
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 1


@pytest.mark.slow
@pytest.mark.parametrize("patch_mask", ["random", "pgs"])
def test_compiled_encoders_train_alike_and_export_under_clips_keys(patch_mask, run, tmp_path, monkeypatch):
    """With a backend that captures graphs but compiles none of them, to spare the test a compiler."""
    compiled = []
    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m, **k: compiled.append(m) or original(m, **k | {"backend": "aot_eager"})
    )
    losses = []
    for compiling in (False, True):
        output_dir = str(tmp_path / f"compile-{compiling}")
        _, steps, folder = run(patch_mask=patch_mask, compile=compiling, output_dir=output_dir, max_steps=2)
        losses.append([record["loss"] for record in steps])
    assert len(compiled) == 2
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert not AutoModel.from_pretrained(folder / "export", output_loading_info=True)[1]["missing_keys"]


def test_averaged_weights_are_evaluated_exported_and_go_on_after_a_resumption(run, data, tmp_path, monkeypatch):
    """Against a transcription of the average: it starts at the first weights and moves a tenth of the way after each step."""
    weights, initial = [], []
    original = loop.training_step

    def recorded_step(run, batch, step):
        initial.append({key: value.clone() for key, value in run.learner.model.state_dict().items()})
        result = original(run, batch, step)
        weights.append({key: value.clone() for key, value in run.learner.model.state_dict().items()})
        return result

    monkeypatch.setattr(loop, "training_step", recorded_step)
    options = {"ema_momentum": 0.9, "eval_data": f"{data}/val-0.tar", "checkpoint_every": 2}
    summary, _, folder = run(**options)
    expected = initial[0]
    for step in weights:
        expected = {key: 0.9 * value + 0.1 * step[key] for key, value in expected.items()}
    exported = AutoModel.from_pretrained(folder / "export").state_dict()
    for key, value in exported.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)
    assert not torch.equal(exported["visual_projection.weight"], weights[-1]["visual_projection.weight"])
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    again, _, _ = run(**options, resume="auto")
    resumed = AutoModel.from_pretrained(folder / "export").state_dict()
    assert all(torch.equal(value, exported[key]) for key, value in resumed.items())
    assert without_speed(again["results"]) == without_speed(summary["results"])
    assert again["ema_momentum"] == 0.9


@pytest.mark.parametrize("patch_mask", ["none", "pgs"])
def test_a_batch_in_chunks_trains_as_in_one_piece(patch_mask, run, tmp_path):
    """PGS chooses other patches for other chunks, so there only its run is looked at; without a mask the losses are equal."""
    losses = {}
    for chunk_size in (0, 2, 3):
        _, steps, _ = run(patch_mask=patch_mask, chunk_size=chunk_size, output_dir=str(tmp_path / f"chunks-{chunk_size}"))
        losses[chunk_size] = [record["loss"] for record in steps]
        assert all((record["kept_patches"] == 64) == (patch_mask == "none") for record in steps)
    if patch_mask == "none":
        assert losses[2] == pytest.approx(losses[0], rel=1e-4)
        assert losses[3] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2][-1] != losses[2][0]


def test_a_text_mask_shortens_the_captions_that_the_model_reads_and_trains(run, before_each_step):
    models, lengths = [], []

    def watch(run) -> None:
        if run.learner.model not in models:
            models.append(run.learner.model)
            models[-1].text_model.register_forward_pre_hook(
                lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
            )

    before_each_step(watch)
    run(max_steps=2)
    _, steps, _ = run(max_steps=2, text_mask="random", text_tokens=4)
    assert lengths == [16, 16, 4, 4]
    assert all(math.isfinite(record["loss"]) for record in steps)


def test_samples_seen_is_a_budget_too_and_logging_can_be_sparse_or_off(run, tmp_path):
    summary, steps, _ = run(max_steps=0, samples_seen=10, log_every=2)
    assert summary["steps"] == 3
    assert [record["step"] for record in steps] == [2]
    reset_accelerate()
    main(
        TrainingConfig(
            output_dir=str(tmp_path / "quiet"),
            train_data=str(tmp_path / "data" / "train-*.tar"),
            batch_size=4,
            max_steps=1,
            num_workers=0,
            log_every=0,
        )
    )
    assert not (tmp_path / "quiet" / "metrics.jsonl").exists()
    assert (tmp_path / "quiet" / "export").is_dir()


def test_training_goes_on_from_an_export_with_its_mask_and_tokenizer(run, tmp_path):
    _, _, folder = run(patch_mask={"name": "random", "mask_ratio": 0.25})
    AutoModel.from_pretrained(folder / "export").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    for name in (folder / "export").iterdir():
        if name.name not in ("config.json", "model.safetensors"):
            (tmp_path / "half" / name.name).write_bytes(name.read_bytes())
    summary, steps, again = run(model=str(tmp_path / "half"), output_dir=str(tmp_path / "again"))
    assert summary["patch_mask"] == {"name": "random", "mask_ratio": 0.25}
    assert steps[0]["kept_patches"] == 48
    weights = AutoModel.from_pretrained(again / "export").state_dict().values()
    assert {value.dtype for value in weights} == {torch.float32}
    first, second = (AutoTokenizer.from_pretrained(f / "export").get_vocab() for f in (folder, again))
    assert first == second


def test_bf16_training_is_close_to_float32_and_says_where_it_is_slow(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fastest, "CPU_INFO", tmp_path / "absent")
    losses = []
    for precision in ("no", "bf16"):
        _, steps, _ = run(mixed_precision=precision, output_dir=str(tmp_path / precision))
        losses.append(steps[0]["loss"])
        is_said = "this CPU is not known to multiply it in hardware" in capsys.readouterr().out
        assert is_said == (precision == "bf16")
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-2)


def test_dirty_data_trains_through_and_is_reported_by_cause(run, data, capsys):
    bad = {"x0": {"png": b"", "txt": b"a ball"}, "x1": {"png": encode_image(random_picture(0)), "txt": b" "}}
    write_shard(data / "train-2.tar", bad | {f"2-{n}": pair(n) for n in range(8)})
    whole = (data / "train-1.tar").read_bytes()
    cut = whole.index(b"1-3.png") + 1000  # inside that picture
    (data / "train-1.tar").write_bytes(whole[:cut])
    summary, steps, _ = run(max_steps=12, shuffle_buffer=0)
    # 48 pairs are two passes over 5 + 3 + 8 + 5, and the start of a third.
    assert summary["skipped"].keys() == {"image_undecodable", "caption_empty", "shard_unreadable"}
    assert all(2 <= count <= 3 for count in summary["skipped"].values())
    assert steps[-1]["skipped"] == summary["skipped"]
    assert "skipped samples: " in capsys.readouterr().out


def test_the_broken_sample_data_trains_through(run):
    folder = shared_data("broken")
    summary, steps, _ = run(train_data=str(folder), max_steps=16, shuffle_buffer=10)
    assert len(steps) == 16
    causes = {"image_undecodable", "image_too_large", "image_missing", "caption_missing", "caption_empty", "caption_not_utf8"}
    assert causes | {"shard_unreadable"} == summary["skipped"].keys()


def test_an_earlier_run_is_moved_aside(tmp_path):
    folder = tmp_path / "run"
    assert prepare_output_dir(folder) is None
    for number in (1, 2):
        (folder / "metrics.jsonl").write_text(f"run {number}")
        assert prepare_output_dir(folder) == tmp_path / f"run.{number}"
        assert (tmp_path / f"run.{number}" / "metrics.jsonl").read_text() == f"run {number}"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_data": "absent/train-{0..3}.tar"}, "there is no 'absent/train-0.tar'"),
        ({"image_key": "jpg"}, "no usable image-text pair in the first 20 samples"),
        ({"model": "hugee"}, "model='hugee': must be one of tiny, tiny-96, small"),
        ({"text_mask": "random", "text_tokens": 78}, "text_tokens=78: the context of model='tiny' has 77"),
        ({"patch_mask": "none", "mask_schedule": 0.5}, "mask_schedule=0.5: the patch mask 'none' has no mask_ratio"),
        ({"patch_mask": {"name": "attentive", "teacher_image_size": 36}}, "teacher_image_size=36: must be a multiple of .* 8"),
        ({"tokenizer": "./absent"}, "tokenizer='./absent': must be an existing folder"),
        ({"report_to": "wandb"}, r"report_to='wandb': this tracker's package is not installed \(pip install wandb\)"),
        ({"eval_data": "absent/val.tar"}, "there is no 'absent/val.tar'"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_an_earlier_run_alone(changed, message, run, tmp_path):
    earlier = tmp_path / "run" / "metrics.jsonl"
    earlier.parent.mkdir()
    earlier.write_text("precious")
    with pytest.raises(ConfigError, match=message) as error:
        run(**changed)
    assert "\n" not in str(error.value)
    assert earlier.read_text() == "precious"
    assert [p.name for p in tmp_path.glob("run*")] == ["run"]


def test_a_single_shard_trains_with_one_worker_which_is_said(run, data, capsys):
    code, steps, _ = run(train_data=f"{data}/train-0.tar", num_workers=2)
    assert "num_workers=2: uses 1, for train_data=" in capsys.readouterr().out
    assert len(steps) == 4


def test_captions_that_come_more_than_once_are_said(run, tmp_path, capsys):
    write_shard(tmp_path / "equal.tar", {str(number): pair(number, f"a ball {number % 4}") for number in range(24)})
    run(train_data=str(tmp_path / "equal.tar"))
    assert "100% of the first 24 captions are there more than once" in capsys.readouterr().out
    run(output_dir=str(tmp_path / "different"))
    assert "more than once" not in capsys.readouterr().out
