"""Proves that what the Trainer and Accelerate do around a model leaves it right: accumulated losses, selections from a
collator, tuples that are rebuilt and gathered, the policy of FSDP, and whole graphs for torch.compile."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import recursively_apply, send_to_device
from helpers import photo_like
from model_classes import ALL_CLASSES, as_class, vision_of
from processes import Processes
from torch.utils import _pytree
from transformers import Trainer, TrainingArguments

from hf_maskclip import MaskCLIPForImageClassification, MaskCLIPModel, PatchSelection

SELECTIONS = {
    "one count": PatchSelection(torch.tensor([[0, 3], [1, 2]])),
    "counts": PatchSelection(torch.tensor([[0, 3], [1, 1]]), torch.tensor([2, 1])),
}


def arguments(folder, **options) -> TrainingArguments:
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(output_dir=str(folder), **(fixed | options))


def labelled(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": number % 2} for number in range(count)]


# ---- A selection is a tuple ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize(
    "rebuild",
    [
        lambda s: type(s)(tensor for tensor in s),
        lambda s: type(s)(list(s)),
        lambda s: send_to_device(s, "cpu"),
        lambda s: recursively_apply(torch.clone, s, error_on_other_type=True),
        lambda s: _pytree.tree_map(torch.clone, s),
        copy.deepcopy,
        lambda s: pickle.loads(pickle.dumps(s)),
    ],
)
def test_a_selection_survives_what_is_done_to_tuples(rebuild, given):
    again = rebuild(given)
    assert type(again) is PatchSelection
    assert torch.equal(again.indices, given.indices)
    assert (again.lengths is None) == (given.lengths is None)
    assert torch.equal(again.valid(), given.valid())


def test_a_selection_from_the_collator_is_used_in_training_and_comes_out_of_predict(make_model, tmp_path):
    model = make_model("random")
    model.save_pretrained(tmp_path / "clip")
    classifier = MaskCLIPForImageClassification.from_pretrained(tmp_path / "clip", num_labels=2)
    seen = []
    classifier.vision_model.register_forward_hook(lambda m, args, output: seen.append(output.patch_selection.indices))

    def collate(rows):
        indices = torch.tensor([[1, 2, 5]] * len(rows))
        pixels = torch.stack([row["pixel_values"] for row in rows])
        labels = torch.tensor([row["labels"] for row in rows])
        return {"pixel_values": pixels, "labels": labels, "patch_selection": PatchSelection(indices)}

    options = arguments(tmp_path / "run", max_steps=2, per_device_train_batch_size=4, remove_unused_columns=False)
    trainer = Trainer(classifier, options, train_dataset=labelled(8), eval_dataset=labelled(8), data_collator=collate)
    trainer.train()
    trainer.evaluate()
    predictions = trainer.predict(labelled(8)).predictions
    assert len(seen) >= 4
    assert all(indices.unique().tolist() == [1, 2, 5] for indices in seen)
    assert predictions[0].shape == (8, 2)


def test_accumulated_steps_have_the_loss_of_the_whole_batch(make_model, tmp_path):
    make_model("none").save_pretrained(tmp_path / "clip")
    losses = []
    for batch, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = MaskCLIPForImageClassification.from_pretrained(tmp_path / "clip", num_labels=2, patch_mask="none")
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = Trainer(model, arguments(tmp_path / f"run{steps}", **sizes), train_dataset=labelled(8))
        trainer.train()
        losses.append([record for record in trainer.state.log_history if "loss" in record][0])
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-3)
    assert losses[1]["grad_norm"] == pytest.approx(losses[0]["grad_norm"], rel=1e-3)


def test_fsdp_finds_the_layers_that_it_wraps(make_model):
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(make_model("random"))
    wrapped = {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert wrapped == {"CLIPTextEmbeddings", "CLIPEncoderLayer", "CLIPVisionEmbeddings"}


def train_a_classifier(folder: str) -> int:
    model = MaskCLIPForImageClassification.from_pretrained(folder, num_labels=2)
    sizes = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_checkpointing": True}
    trainer = Trainer(model, arguments(Path(folder) / "run", **sizes), train_dataset=labelled(16))
    print(f"loss {trainer.train().training_loss}, find_unused_parameters {find_unused(trainer)}")
    return 0


def find_unused(trainer: Trainer) -> bool:
    return trainer.model_wrapped.find_unused_parameters


@pytest.mark.slow
def test_a_classifier_trains_on_two_processes_with_gradient_checkpointing(make_model, tmp_path):
    """The Trainer then expects every trainable weight to have a gradient."""
    make_model("pgs").save_pretrained(tmp_path / "clip")
    two = Processes(2, tmp_path / "printed", train_a_classifier, str(tmp_path / "clip"))
    assert two.wait() == [0, 0], two.printed()[-2000:]
    assert two.printed().count("find_unused_parameters False") == 2


# ---- Graphs and sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("patch_mask", ["none", "random", "grid", "gaussian"])
def test_training_with_a_fixed_count_is_one_graph(patch_mask, make_model, inputs):
    """With a backend that captures graphs and compiles none of them, to spare the test a compiler."""
    torch._dynamo.reset()
    model = make_model(patch_mask).train()
    torch.manual_seed(0)
    expected = model(**inputs, return_loss=True).loss
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    assert compiled(**inputs, return_loss=True).loss.item() == pytest.approx(expected.item(), abs=1e-5)


class Graphs:
    """A backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return graph.forward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen_by", "patch_mask", "kind"),
    [
        *[("model", "cluster", kind) for kind in ALL_CLASSES],
        ("model", "pgs", MaskCLIPModel),
        ("caller", "pgs", MaskCLIPModel),
    ],
)
def test_masks_of_varying_counts_are_two_graphs_at_most(chosen_by, patch_mask, kind, make_model, inputs):
    torch._dynamo.reset()
    model, graphs, sizes = as_class(make_model(patch_mask), kind).train(), Graphs(), set()
    compiled = torch.compile(model, backend=graphs)
    for number in range(50):
        pixel_values = photo_like(4, 64, 64, seed=number)
        given = {"pixel_values": pixel_values, "interpolate_pos_encoding": True}
        given |= {"input_ids": inputs["input_ids"]} if kind is MaskCLIPModel else {}
        if chosen_by == "caller":
            given["patch_selection"] = vision_of(model).select_patches(pixel_values)
        output = compiled(**given)
        sizes.add(int(output.patch_selection.lengths.sum()))
    assert len(sizes) > 2
    assert graphs.count <= 2
    expected = model(**(given | {"patch_selection": output.patch_selection}))
    for key in ("pooler_output", "logits", "image_embeds", "text_embeds"):
        if key in expected:
            torch.testing.assert_close(output[key], expected[key])


def test_images_of_odd_sizes_are_cut_as_the_convolution_cuts_them(make_model):
    model = make_model("random").train()
    images = torch.randn(2, 3, 50, 53, generator=torch.Generator().manual_seed(0))
    output = model.vision_model(images, interpolate_pos_encoding=True)
    assert output.patch_selection.indices.shape == (2, 18)
    whole = PatchSelection(torch.arange(36).expand(2, -1)[:, :35])
    assert int(output.patch_selection.indices.max()) < 36
    one_less = model.vision_model(images, interpolate_pos_encoding=True, patch_selection=whole)
    assert one_less.last_hidden_state.shape == (2, 36, 32)
