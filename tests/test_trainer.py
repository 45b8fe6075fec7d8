"""Proves that the Trainer of 🤗 Transformers fine-tunes the classes: with labels for classification, and with `return_loss` for
pairs of images and captions, masked in training and whole in evaluation."""

import numpy as np
import pytest
import torch
from helpers import CAPTIONS, IMAGE_SIZE
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_maskclip import MaskCLIPForImageClassification, MaskCLIPModel


def arguments(output_dir) -> TrainingArguments:
    """Of a short training on one process."""
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )


def losses_of(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def recorded_selections(model) -> list[tuple[bool, bool]]:
    """Of each forward pass of the vision tower: whether in training mode, and whether patches were selected."""
    seen: list[tuple[bool, bool]] = []
    model.vision_model.register_forward_hook(lambda m, args, out: seen.append((m.training, out.patch_selection is not None)))
    return seen


def accuracy(output) -> dict[str, float]:
    return {"accuracy": float((np.argmax(output.predictions, -1) == output.label_ids).mean())}


@pytest.mark.parametrize("patch_mask", ["random", "pgs"])
def test_the_trainer_fine_tunes_a_classifier_and_it_comes_back(patch_mask, make_model, tmp_path):
    clip = make_model(patch_mask)
    clip.save_pretrained(tmp_path / "clip")
    model = MaskCLIPForImageClassification.from_pretrained(tmp_path / "clip", num_labels=2)
    seen = recorded_selections(model)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for label in [0, 1] * 16:  # bright or dark
        pixels = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) + 2 * label - 1
        samples.append({"pixel_values": pixels, "labels": label})
    data = {"train_dataset": samples, "eval_dataset": samples}
    trainer = Trainer(model=model, args=arguments(tmp_path / "trainer"), compute_metrics=accuracy, **data)
    trainer.train()
    losses = losses_of(trainer)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert trainer.evaluate()["eval_accuracy"] > 0.9
    assert set(seen) == {(True, True), (False, False)}
    trainer.save_model(tmp_path / "classifier")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier").eval()
    pixel_values = torch.stack([sample["pixel_values"] for sample in samples[:4]])
    with torch.no_grad():
        torch.testing.assert_close(again(pixel_values).logits, model.eval()(pixel_values).logits, rtol=0, atol=0)
    assert type(again) is MaskCLIPForImageClassification
    assert again.config.vision_config.patch_mask["name"] == patch_mask


@pytest.mark.parametrize("patch_mask", ["random", "pgs"])
def test_the_trainer_fine_tunes_pairs_with_return_loss(patch_mask, make_model, tokenizer, tmp_path):
    """The batches hold tensors only: `return_loss` is set where they are put together."""
    model = make_model(patch_mask)
    seen = recorded_selections(model)
    generator = torch.Generator().manual_seed(0)
    input_ids = tokenizer(CAPTIONS, padding=True, return_tensors="pt")["input_ids"]
    samples = []
    for number in range(32):
        kind = number % 4  # a caption for each brightness
        pixels = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) + kind - 1.5
        samples.append({"pixel_values": pixels, "input_ids": input_ids[kind]})

    class PairTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs, return_loss=True)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    trainer = PairTrainer(model=model, args=arguments(tmp_path / "trainer"), train_dataset=samples)
    trainer.train()
    losses = losses_of(trainer)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    assert seen
    assert set(seen) == {(True, True)}
    trainer.save_model(tmp_path / "pairs")
    again = MaskCLIPModel.from_pretrained(tmp_path / "pairs")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
