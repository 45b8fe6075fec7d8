"""Proves that each option of a training run reaches what it sets: a table with one row an option, each set to another value
than its default and looked for where it has its effect. So no option can be dropped on its way without a red row."""

import dataclasses
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import reset_accelerate
from option_effects import Effects, first_step
from text_effects import text_mask, text_tokens, word_frequencies, word_threshold
from tuning_effects import freeze, interpolate_weights, learning_rate_text, learning_rate_vision, lora_rank
from view_effects import image_size, phases, views

from hf_maskclip.errors import ConfigError
from training import run as run_module
from training.config import TrainingConfig, option_name
from training.run import Run, prepare
from training.train import program


@pytest.fixture
def prepared(options, monkeypatch) -> Callable[..., Run]:
    """What a run on the small data works with."""

    def prepared(**changed: Any) -> Run:
        reset_accelerate()
        return prepare(TrainingConfig(**(options | changed)))

    return prepared


# ---- One check an option ---------------------------------------------------------------------------------------------------


def output_dir(on: Effects):
    _, _, folder = on.run(output_dir=str(on.tmp_path / "elsewhere"), max_steps=1)
    assert folder == on.tmp_path / "elsewhere"
    assert (folder / "export" / "config.json").is_file()


def model(on: Effects):
    assert on.both(lambda run: run.learner.model.config.vision_config.hidden_size, model="small") == (128, 192)


def tokenizer(on: Effects):
    saved = on.tmp_path / "tokenizer"
    on.prepared(vocab_size=1001).learner.processor.tokenizer.save_pretrained(saved)
    on.monkeypatch.setattr(run_module, "train_tokenizer", lambda *a: pytest.fail("a tokenizer was trained"))
    assert len(on.prepared(tokenizer=str(saved)).learner.processor.tokenizer) > 500


def vocab_size(on: Effects):
    asked, train = [], run_module.train_tokenizer
    on.monkeypatch.setattr(
        run_module, "train_tokenizer", lambda texts, size, length: asked.append(size) or train(texts, size, length)
    )
    on.prepared(vocab_size=1234)
    assert asked == [1234]


def patch_mask(on: Effects):
    names = on.both(lambda run: run.learner.model.config.vision_config.patch_mask["name"], patch_mask="grid")
    assert names == ("pgs", "grid")


def mask_schedule(on: Effects):
    _, steps, _ = on.run(patch_mask="random", mask_schedule=1.0)
    assert [record["kept_patches"] for record in steps] == [64, 56, 48, 40]


def train_data(on: Effects):
    keys = on.batch(train_data=on.options["train_data"].replace("train-*", "train-3")).keys
    assert {key[0] for key in keys} == {"3"}
    assert len({key[0] for key in on.batch(shuffle_buffer=20).keys}) > 1


def eval_data(on: Effects):
    names = on.both(lambda run: [e.name for e in run.data.evaluations], eval_data=f"{on.tmp_path}/data/val-0.tar")
    assert names == ([], ["retrieval_data"])


def image_key(on: Effects):
    with pytest.raises(ConfigError, match="image_missing"):
        on.prepared(image_key="jpg")
    assert on.batch(image_key="jpg,png").pixel_values.shape == (4, 3, 64, 64)


def caption_key(on: Effects):
    texts = on.both(lambda run: list(run.data.mix.captions(1).values()), caption_key="json.captions")
    assert texts == ([["a red ball on grass number 0"]], [["first of 0", "second of 0"]])


def crop_scale(on: Effects):
    still = {"flip": 0.0, "shuffle_buffer": 0}
    whole, half, most = (on.batch(**still, crop_scale=scale).pixel_values.float() for scale in (1.0, 0.1, 0.9))
    assert (whole - half).abs().mean() > (whole - most).abs().mean() > 0


def flip(on: Effects):
    still = {"crop_scale": 1.0, "shuffle_buffer": 0}
    never, always = (on.batch(**still, flip=share).pixel_values for share in (0.0, 1.0))
    difference = (never.flip(-1).float() - always.float()).abs().mean()
    assert difference < 0.2 * (never.float() - always.float()).abs().mean()  # whole crops are drawn alike, but for a pixel
    on.prepared().learner.processor.tokenizer.save_pretrained(on.tmp_path / "tokenizer")
    drawn = {"train_data": "scenes", "crop_scale": 1.0, "tokenizer": str(on.tmp_path / "tokenizer")}
    assert torch.equal(on.batch(**drawn, flip=0.0).pixel_values, on.batch(**drawn, flip=1.0).pixel_values)


def shuffle_buffer(on: Effects):
    def keeps_the_order_of_shards(run: Run) -> bool:
        keys = [key for batch in islice(run.data.loader, 5) for key in batch.keys]
        return all(sorted(of_one) == of_one for of_one in ([key for key in keys if key[0] == shard] for shard in "0123"))

    assert on.both(keeps_the_order_of_shards, shuffle_buffer=0) == (False, True)


def stream(on: Effects):
    def way(run: Run) -> tuple[bool, bool]:
        return run.data.state.is_exact, run.data.loader.dataset.sources[0].open_epoch.keywords["resampled"]

    assert on.both(way, stream="resampled") == ((True, False), (False, True))


def max_skipped_share(on: Effects):
    assert on.both(lambda run: run.data.loader.dataset.max_skipped_share, max_skipped_share=0.25) == (0.5, 0.25)


def num_workers(on: Effects):
    assert on.both(lambda run: run.data.loader.num_workers, num_workers=2) == (0, 2)


def max_steps(on: Effects):
    assert on.both(lambda run: run.num_steps, max_steps=7) == (4, 7)


def samples_seen(on: Effects):
    assert on.prepared(max_steps=0, samples_seen=17).num_steps == 5


def batch_size(on: Effects):
    assert on.batch(batch_size=6).pixel_values.shape[0] == 6


def chunk_size(on: Effects):
    run, sizes = on.prepared(chunk_size=2), []
    run.learner.model.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first_step(run)
    assert sizes == [2, 2, 2, 2]  # two chunks, encoded twice


def loss(on: Effects):
    def name_and_bias(run: Run) -> tuple[str, bool]:
        first_step(run)
        return run.learner.loss.name, "logit_bias" in run.learner.model.state_dict()

    assert on.both(name_and_bias, loss="sigmoid") == (("contrastive", False), ("sigmoid", True))


def learning_rate(on: Effects):
    changed = {"warmup_steps": 0, "max_steps": 100}
    run = on.prepared(learning_rate=0.5, **changed)
    assert set(run.learner.schedule.get_last_lr()) == {0.5}
    before = run.learner.model.visual_projection.weight.detach().clone()
    first_step(run)
    assert (run.learner.model.visual_projection.weight - before).abs().max() > 0.3


def warmup_steps(on: Effects):
    rates = on.both(lambda run: first_step(run).learner.schedule.get_last_lr()[0], warmup_steps=4)
    assert rates == (pytest.approx(1e-3, rel=0.6), pytest.approx(1e-3 / 4))


def weight_decay(on: Effects):
    """And AdamW's other numbers, which are CLIP's and no options."""

    def groups(run: Run) -> list[tuple]:
        found = run.learner.parallel.optimizer.param_groups
        return sorted({(group["weight_decay"], group["betas"], group["eps"]) for group in found})

    adam = ((0.9, 0.98), 1e-6)
    assert on.both(groups, weight_decay=0.5) == ([(0.0, *adam), (0.2, *adam)], [(0.0, *adam), (0.5, *adam)])


def max_grad_norm(on: Effects):
    def norm_at_the_update(run: Run) -> float:
        norms, step = [], torch.optim.AdamW.step

        def recorded(optimizer, *args, **kwargs):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
            return step(optimizer, *args, **kwargs)

        with on.monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", recorded)
            first_step(run)
        return norms[0]

    by_default, clipped = on.both(norm_at_the_update, max_grad_norm=0.01)
    free = norm_at_the_update(on.prepared(max_grad_norm=0.0))
    assert free > 1.01
    assert by_default == pytest.approx(1.0, rel=1e-3)
    assert clipped == pytest.approx(0.01, rel=1e-3)


def ema_momentum(on: Effects):
    assert on.prepared().learner.average is None
    run = on.prepared(ema_momentum=0.75, warmup_steps=0)
    before = run.learner.model.visual_projection.weight.detach().clone()
    first_step(run)
    moved = run.learner.model.visual_projection.weight - before
    assert moved.abs().max() > 0
    torch.testing.assert_close(run.learner.result().visual_projection.weight - before, 0.25 * moved, rtol=1e-3, atol=1e-7)


def unmasked_tuning_steps(on: Effects):
    _, steps, _ = on.run(patch_mask="random", unmasked_tuning_steps=3)
    assert [record["kept_patches"] for record in steps] == [32, 64, 64, 64]


def mixed_precision(on: Effects):
    def dtype_inside(run: Run) -> torch.dtype:
        seen = []
        layer = run.learner.model.vision_model.encoder.layers[0].mlp.fc1
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        first_step(run)
        return seen[0]

    assert on.both(dtype_inside, mixed_precision="bf16") == (torch.float32, torch.bfloat16)


def compile(on: Effects):
    calls = []
    on.monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: calls.append(type(module).__name__))
    on.prepared()
    assert calls == []
    on.prepared(compile=True)
    assert calls == ["CLIPEncoder", "CLIPEncoder"]


def gradient_checkpointing(on: Effects):
    assert on.both(lambda run: run.learner.model.is_gradient_checkpointing, gradient_checkpointing=True) == (False, True)


def seed(on: Effects):
    weights, other = on.both(lambda run: run.learner.model.visual_projection.weight.detach().clone(), seed=1)
    assert not torch.equal(weights, other)
    assert on.batch(shuffle_buffer=20).keys != on.batch(shuffle_buffer=20, seed=1).keys


def log_every(on: Effects):
    _, steps, _ = on.run(log_every=2)
    assert [record["step"] for record in steps] == [2, 4]


def eval_every(on: Effects):
    _, _, folder = on.run(eval_every=3, eval_data=f"{on.tmp_path}/data/val-0.tar")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" not in record] == [3, 4]


def checkpoint_every(on: Effects):
    _, _, folder = on.run(checkpoint_every=2)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def keep_checkpoints(on: Effects):
    _, _, folder = on.run(checkpoint_every=1, keep_checkpoints=1)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004"]


def resume(on: Effects):
    on.run(checkpoint_every=2, max_steps=2)
    assert on.prepared(resume="auto").steps_done == 2
    assert on.prepared().steps_done == 0


def report_to(on: Effects):
    asked = []
    on.monkeypatch.setattr(run_module, "check_tracker", asked.append)
    on.monkeypatch.setattr(run_module, "Accelerator", lambda **options: asked.append(options["log_with"]) or Accelerator())
    on.prepared(report_to="trackio")
    assert asked == ["trackio", "trackio"]


def import_(on: Effects):
    on.monkeypatch.syspath_prepend(on.tmp_path)
    (on.tmp_path / "noted.py").write_text(f"open({str(on.tmp_path / 'note')!r}, 'w').close()\n")
    TrainingConfig(import_="noted")
    assert (on.tmp_path / "note").exists()


def dry_run(on: Effects):
    words = [f"--{key}={value}" for key, value in on.options.items()]
    assert program([*words, "--dry_run"]) == 0
    assert not Path(on.options["output_dir"]).exists()


def debug(on: Effects):
    words = ["--train_data", "absent/folder.tar", "--max_steps", "1"]
    assert program(words) == 2
    reset_accelerate()
    with pytest.raises(ConfigError):
        program([*words, "--debug"])


CHECKS = (
    *(output_dir, model, tokenizer, vocab_size, patch_mask, views, image_size, phases, mask_schedule),
    *(text_mask, text_tokens, word_frequencies, word_threshold),
    *(freeze, lora_rank, interpolate_weights, learning_rate_vision, learning_rate_text),
    *(train_data, eval_data, image_key, caption_key, crop_scale, flip, shuffle_buffer, stream, max_skipped_share, num_workers),
    *(max_steps, samples_seen, batch_size, chunk_size),
    *(loss, learning_rate, warmup_steps, weight_decay, max_grad_norm, ema_momentum, unmasked_tuning_steps, mixed_precision),
    *(compile, gradient_checkpointing, seed, log_every, eval_every, checkpoint_every, keep_checkpoints, resume, report_to),
    *(import_, dry_run, debug),
)


def test_every_option_has_a_row():
    assert {check.__name__ for check in CHECKS} == {field.name for field in dataclasses.fields(TrainingConfig)}
    assert {option_name(field) for field in dataclasses.fields(TrainingConfig)} >= {"import", "dry_run", "patch_mask"}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_an_option_reaches_what_it_sets(check, prepared, run, options, tmp_path, monkeypatch):
    np.random.seed(0)
    check(Effects(prepared, run, options, tmp_path, monkeypatch))
