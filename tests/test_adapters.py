"""Proves that the masked path calls the modules of CLIP, so that adapters, hooks and checkpointing do there what they do in a
`CLIPModel`: the same weights get a gradient, whatever mask is on."""

import accelerate
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from hf_maskclip import MaskCLIPConfig, MaskCLIPModel, export_to_clip
from hf_maskclip.errors import ConfigError

MASKS = ("none", "random", "pgs")
REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
# What gets adapters, and how many matrices these have in the vision tower.
TARGETS = (
    (["q_proj", "v_proj"], 8),
    (["vision_model.embeddings.patch_embedding"], 2),
    (["vision_model.embeddings.position_embedding"], 2),
    ("all-linear", 24),
)


@pytest.fixture
def models(config_parts):
    """A `CLIPModel`, and a `MaskCLIPModel` with a mask, of equal weights, in training mode."""

    def models(mask):
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(**config_parts()))
        masked = MaskCLIPModel(MaskCLIPConfig(**config_parts()), patch_mask=mask)
        masked.load_state_dict(clip.state_dict())
        return clip.train(), masked.train()

    return models


def with_gradient(model, inputs) -> set[str]:
    """The weights that a step would change, by their names without what PEFT puts around them."""
    model(**inputs, return_loss=True).loss.backward()
    named = model.named_parameters()
    return {name for name, weight in named if weight.grad is not None and weight.grad.abs().sum() > 0}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("targets", "number"), TARGETS, ids=str)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "plain", "reentrant"])
def test_adapters_get_the_gradients_that_they_get_in_clip(targets, number, checkpointing, mask, models, inputs):
    peft = pytest.importorskip("peft", reason="peft is of the test extra")

    def tuned(model):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False))
        if checkpointing is not None:  # as prepare_model_for_kbit_training does
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        return with_gradient(adapted, inputs)

    expected, found = (tuned(model) for model in models(mask))
    assert sum("vision_model" in name and "lora" in name for name in found) == number
    assert found == expected


@pytest.mark.parametrize("mask", MASKS)
def test_frozen_embeddings_and_reentrant_checkpointing_train_the_layers_behind_them(mask, models, inputs):
    def trained(model):
        model.requires_grad_(False)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(**REENTRANT)
        for layer in (model.vision_model.encoder.layers[1], model.text_model.encoder.layers[1]):
            layer.requires_grad_(True)
        return with_gradient(model, inputs)

    expected, found = (trained(model) for model in models(mask))
    assert sum(name.startswith("vision_model.encoder.layers.1.") for name in expected) > 10
    assert found == expected


@pytest.mark.parametrize("mask", ["random", "pgs", "cluster"])
def test_hooks_on_the_embeddings_see_the_masked_path(mask, models, inputs):
    _, model = models(mask)
    seen = []
    embeddings = model.vision_model.embeddings
    for name in ("patch_embedding", "position_embedding"):
        module = getattr(embeddings, name)
        module.register_forward_hook(lambda module, args, output, name=name: seen.append((name, args[0].shape[0])))
    selection = model(**inputs).patch_selection
    assert seen == [("patch_embedding", selection.indices.numel()), ("position_embedding", 4)]


@pytest.mark.parametrize("mask", ["random", "pgs", {"name": "cluster", "embedding_weight": 0.5}], ids=str)
def test_weights_that_lie_elsewhere_come_where_the_masked_path_needs_them(mask, models, inputs):
    _, model = models(mask)
    torch.manual_seed(1)
    expected = model(**inputs, return_loss=True).loss
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    accelerate.cpu_offload(model, execution_device="cpu", state_dict=weights)
    assert model.vision_model.embeddings.patch_embedding.weight.is_meta
    torch.manual_seed(1)
    assert torch.equal(model(**inputs, return_loss=True).loss, expected)


def test_an_export_of_what_was_not_merged_is_refused(models, processor, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is of the test extra")
    _, model = models("pgs")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ConfigError, match=r"export of a PeftModel: merge its adapters first: .*merge_and_unload\(\)"):
        export_to_clip(adapted, tmp_path / "export", processor)
    with pytest.raises(ConfigError, match=r"export of a MaskCLIPModel with adapters, such as 'text_model.*: merge them first"):
        export_to_clip(adapted.get_base_model(), tmp_path / "export", processor)
    assert not (tmp_path / "export").exists()
    export_to_clip(adapted.merge_and_unload(), tmp_path / "export", processor)
    assert CLIPModel.from_pretrained(tmp_path / "export", output_loading_info=True)[1]["missing_keys"] == set()


def test_an_export_of_a_quantised_model_is_refused(models, processor, tmp_path):
    _, model = models("random")
    quantised = torch.ao.quantization.quantize_dynamic(model.eval(), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ConfigError, match="a quantised model cannot be exported"):
        export_to_clip(quantised, tmp_path / "export", processor)
    assert not (tmp_path / "export").exists()
