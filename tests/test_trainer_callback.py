"""Proves that `PatchMaskCallback` lets a mask go by the Trainer's steps: progress, ramp, whole images at the end, the teacher
of the attentive mask, a draw for each process, the bound on the logit scale; and that a resumed training goes on exactly."""

import json
from pathlib import Path

import pytest
import torch
from helpers import IMAGE_SIZE
from processes import Processes
from transformers import CLIPModel, Trainer, TrainerCallback, TrainingArguments

from hf_maskclip import MaskCLIPForImageClassification, MaskCLIPModel, PatchMaskCallback, PatchSelection
from hf_maskclip.losses import MAX_LOGIT_SCALE

MASKS = ("random", "cluster", "pgs", "attentive")


def pairs(count: int = 16) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return [{"pixel_values": image, "input_ids": torch.tensor([1, 5 + number, 2])} for number, image in enumerate(pixels)]


def collate(rows: list[dict]) -> dict:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]} | {"return_loss": True}


def trainer_of(model, folder, callback, data_collator=collate, **options) -> Trainer:
    fixed = {"max_steps": 5, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    fixed |= {"use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    arguments = TrainingArguments(str(folder), **(fixed | options))
    data = {"train_dataset": pairs(), "eval_dataset": pairs(4)}
    return Trainer(model, arguments, data_collator=data_collator, callbacks=[callback], **data)


def recorded(model) -> list[PatchSelection | None]:
    """The patches of each forward pass of the model's own vision tower; a teacher is a copy of it, with its hooks."""
    seen: list[PatchSelection | None] = []

    def record(module, args, output):
        if module is model.vision_model:
            seen.append(output.patch_selection)

    model.vision_model.register_forward_hook(record)
    return seen


def test_the_ratio_grows_and_the_last_steps_see_whole_images(make_model, tmp_path):
    model = make_model("random")
    seen = recorded(model)
    trainer_of(model, tmp_path, PatchMaskCallback(mask_schedule=0.4, unmasked_tuning_steps=2), max_steps=10).train()
    assert [selection and selection.indices.shape[1] for selection in seen] == [16, 14, 12, 10, 8, 8, 8, 8, None, None]
    assert model.config.patch_mask == {"name": "random", "mask_ratio": 0.5}
    model.train()(**collate(pairs(4)))
    assert seen[-1].indices.shape[1] == 8  # after the training, the mask is the model's alone


def test_a_training_that_fails_between_two_steps_leaves_the_mask_to_the_model(make_model, tmp_path):
    model = make_model("random")
    seen = recorded(model)

    class Failing(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            raise OSError("the disk is full")

    trainer = trainer_of(model, tmp_path, PatchMaskCallback(unmasked_tuning_steps=5))
    trainer.add_callback(Failing())
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train()
    assert seen == [None]  # all five steps are to see whole images
    model.train()(**collate(pairs(4)))
    assert seen[-1].indices.shape[1] == 8


def test_progress_is_the_share_of_steps_done_whatever_is_accumulated(make_model, tmp_path, monkeypatch):
    model, seen = make_model("random"), []
    choose = type(model.patch_mask).forward
    monkeypatch.setattr(type(model.patch_mask), "forward", lambda *a, **k: seen.append(k["progress"]) or choose(*a, **k))
    trainer_of(model, tmp_path, PatchMaskCallback(), gradient_accumulation_steps=2, max_steps=4).train()
    assert seen == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


@pytest.mark.parametrize("mask", MASKS)
def test_a_resumed_training_goes_on_exactly(mask, make_model, tmp_path):
    mask = {"name": mask, "momentum": 0.5} if mask == "attentive" else mask

    def train(folder, **how):
        torch.manual_seed(7)
        model = make_model(mask)
        seen = recorded(model)
        trainer = trainer_of(model, folder, PatchMaskCallback(), max_steps=6, save_strategy="steps", save_steps=3)
        trainer.train(**how)
        return model.state_dict(), seen

    whole, seen = train(tmp_path)
    resumed, seen_again = train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(seen) == 6
    assert len(seen_again) == 3
    for before, after in zip(seen[3:], seen_again, strict=True):
        assert torch.equal(before.indices, after.indices)
    assert not torch.equal(seen[0].indices, seen[1].indices)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_a_resumed_training_without_its_teachers_file_says_so(make_model, tmp_path, caplog):
    trainer_of(make_model("attentive"), tmp_path, PatchMaskCallback(), save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-2" / "patch_mask_teacher.safetensors").unlink()
    trainer = trainer_of(make_model("attentive"), tmp_path, PatchMaskCallback())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "the teacher of the patch mask starts anew" in caplog.text


def test_the_teacher_follows_the_student(make_model, tmp_path):
    model = make_model({"name": "attentive", "momentum": 0.0})  # the average takes the student's weights, at first
    callback = PatchMaskCallback()
    trainer_of(model, tmp_path, callback, max_steps=2).train()
    teacher = dict(callback.schedule.teacher.average.module.named_parameters())
    before, after = dict(make_model("attentive").vision_model.named_parameters()), dict(model.vision_model.named_parameters())
    name = "encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(teacher[name], before[name])
    assert not torch.equal(teacher[name], after[name])  # it is not asked again after the last step


def test_the_logit_scale_stays_below_its_bound(make_model, tmp_path):
    model = make_model("random")
    model.logit_scale.data.fill_(10.0)
    trainer_of(model, tmp_path, PatchMaskCallback(), max_steps=1).train()
    assert model.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)


def test_what_the_model_is_called_with_comes_first(make_model, tmp_path):
    model, given = make_model("random"), PatchSelection(torch.tensor([[1, 2, 5]] * 4))
    seen = recorded(model)
    with_selection = trainer_of(
        model, tmp_path, PatchMaskCallback(), lambda rows: collate(rows) | {"patch_selection": given}, max_steps=2
    )
    with_selection.train()
    assert [selection.indices.tolist() for selection in seen] == [given.indices.tolist()] * 2


def test_evaluation_sees_whole_images(make_model, tmp_path):
    model = make_model("random")
    seen = recorded(model)
    trainer = trainer_of(model, tmp_path, PatchMaskCallback(), max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert [selection is None for selection in seen] == [False, True, False, True]


def test_a_classifier_has_the_callback_too(make_model, tmp_path):
    make_model("random").save_pretrained(tmp_path / "clip")
    model = MaskCLIPForImageClassification.from_pretrained(tmp_path / "clip", num_labels=2)
    seen = recorded(model)

    def labelled(rows):
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": torch.tensor([0, 1, 0, 1])}

    trainer_of(model, tmp_path, PatchMaskCallback(mask_schedule=1.0), labelled, max_steps=4).train()
    assert [selection.indices.shape[1] for selection in seen] == [16, 14, 12, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_schedule": 1.5}, "mask_schedule=1.5: must be a number from 0 to 1"),
        ({"unmasked_tuning_steps": -1}, "unmasked_tuning_steps=-1: must be a whole number"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PatchMaskCallback(**options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda make_model, make_clip: make_model("none"), {}, "the model has no patch mask, give it one by set_patch_mask"),
        (lambda make_model, make_clip: make_clip(), {}, "CLIPModel has 0 vision towers with a patch mask, must have one"),
        (lambda make_model, make_clip: make_model("grid"), {"unmasked_tuning_steps": 9}, "unmasked_tuning_steps=9: must be"),
    ],
)
def test_a_model_that_cannot_be_scheduled_is_refused_at_the_start(make, options, message, make_model, make_clip, tmp_path):
    model = make(make_model, make_clip)
    assert isinstance(model, CLIPModel)
    with pytest.raises(ValueError, match=message):
        trainer_of(model, tmp_path, PatchMaskCallback(**options)).train()


def train_on_two(folder: str) -> int:
    torch.manual_seed(0)
    model = MaskCLIPModel.from_pretrained(folder)
    seen = recorded(model)
    trainer_of(model, Path(folder) / "run", PatchMaskCallback(), max_steps=2).train()
    print(json.dumps([selection.indices.tolist() for selection in seen]))
    return 0


@pytest.mark.slow
def test_each_process_draws_its_own(make_model, tmp_path):
    make_model("random").save_pretrained(tmp_path / "clip")
    processes = Processes(2, tmp_path / "out", train_on_two, str(tmp_path / "clip"))
    assert processes.wait() == [0, 0], processes.printed()
    lines = [next(line for line in output.read_text().splitlines() if line.startswith("[[[")) for output in processes.outputs]
    assert lines[0] != lines[1]
