"""Proves that the models load and save completely through every class, key layout and auto class, with their mask."""

import json

import pytest
import torch
from model_classes import ALL_CLASSES, VISION_CLASSES, as_class
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
)

from hf_maskclip import (
    MaskCLIPConfig,
    MaskCLIPForImageClassification,
    MaskCLIPModel,
    MaskCLIPVisionConfig,
    MaskCLIPVisionModel,
    MaskCLIPVisionModelWithProjection,
    PatchMask,
    PatchSelection,
    register_patch_mask,
)
from hf_maskclip.models.patch_mask_registry import patch_masks, resolve_patch_mask


def vision_weights(model) -> dict[str, torch.Tensor]:
    weights = {key.removeprefix("vision_model."): value for key, value in model.state_dict().items()}
    return {key: value for key, value in weights.items() if key.startswith(("embeddings", "encoder", "p"))}


def assert_same_vision_weights(first, second):
    first, second = vision_weights(first), vision_weights(second)
    assert len(first) > 30
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("cls", ALL_CLASSES)
def test_every_class_loads_a_clip_folder_completely(cls, make_clip, tmp_path):
    clip = make_clip(seed=5)
    clip.save_pretrained(tmp_path)
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert {key for key in info["missing_keys"] if not key.startswith("classifier.")} == set()
    assert_same_vision_weights(model, clip)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize("cls", VISION_CLASSES)
def test_both_key_layouts_of_a_vision_tower_load_completely(cls, prefix, make_clip, tmp_path):
    clip = make_clip(seed=5)
    tower = clip.vision_model
    tower.config.save_pretrained(tmp_path)
    weights = {prefix + key: value.clone() for key, value in tower.state_dict().items()}
    if cls is MaskCLIPVisionModelWithProjection:
        weights["visual_projection.weight"] = clip.visual_projection.weight.detach().clone()
    if cls is MaskCLIPForImageClassification:
        MaskCLIPConfig(vision_config=tower.config.to_dict(), text_config=clip.config.text_config).save_pretrained(tmp_path)
    if not prefix and cls is not MaskCLIPVisionModel:
        weights = {key if key.startswith("visual") else f"vision_model.{key}": value for key, value in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert {key for key in info["missing_keys"] if not key.startswith("classifier.")} == set()
    assert_same_vision_weights(model, clip)


def test_a_checkpoint_without_all_weights_is_refused_by_name(make_clip, tmp_path):
    make_clip().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no weights for 1 tensors of MaskCLIPModel, such as 'text_projection.weight'"):
        MaskCLIPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", ALL_CLASSES)
def test_save_and_load_keep_class_tensors_and_patch_mask(cls, make_model, tmp_path):
    patch_mask = {"name": "pgs", "min_mask_ratio": 0.2, "max_mask_ratio": 0.4, "edges": "none"}
    model = as_class(make_model(patch_mask, seed=7), cls)
    model.save_pretrained(tmp_path)
    for loaded in (cls.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is cls
        weights, expected = loaded.state_dict(), model.state_dict()
        assert list(weights) == list(expected)
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
        config = loaded.config if cls.config_class is MaskCLIPVisionConfig else loaded.config.vision_config
        assert config.patch_mask.items() >= patch_mask.items()


def test_the_other_auto_classes_find_their_models(make_model, tmp_path):
    model = make_model("cluster")
    for cls, auto in (
        (MaskCLIPModel, AutoModelForZeroShotImageClassification),
        (MaskCLIPForImageClassification, AutoModelForImageClassification),
    ):
        as_class(model, cls).save_pretrained(tmp_path / cls.__name__)
        assert type(auto.from_pretrained(tmp_path / cls.__name__)) is cls
        assert type(AutoConfig.from_pretrained(tmp_path / cls.__name__)) is MaskCLIPConfig


@pytest.mark.parametrize("cls", VISION_CLASSES)
def test_what_the_vision_classes_save_is_read_by_their_clip_twins(cls, make_model, tmp_path):
    model = as_class(make_model(seed=2), cls)
    model.save_pretrained(tmp_path)
    twin, info = VISION_CLASSES[cls].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_vision_weights(twin, model)


def test_a_mask_of_ones_own_survives_save_and_load(make_model, tmp_path):
    class FirstPatches(PatchMask):
        def __init__(self, count: int = 3, *, patch_size: int = 16):
            super().__init__(patch_size=patch_size)
            self.count = count

        def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
            return PatchSelection(torch.arange(self.count).expand(len(pixel_values), -1))

    register_patch_mask("first", FirstPatches)
    make_model({"name": "first", "count": 2}).save_pretrained(tmp_path)
    model = MaskCLIPModel.from_pretrained(tmp_path).train()
    assert model.config.vision_config.patch_mask == {"name": "first", "count": 2}
    assert model.vision_model(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 3, 32)


def test_configurations_refuse_typos_and_impossible_sizes(config_parts):
    vision = config_parts()["vision_config"]
    for extra, message in (
        ({"patch_mask": {"name": "pgs", "min_ratio": 0.3}}, "has no option 'min_ratio'"),
        ({"patch_mask": {"name": "unheard"}}, "unknown patch mask 'unheard'"),
        ({"mask_ratio": 0.5}, "unknown option 'mask_ratio': the options of a mask go into patch_mask"),
        ({"image_size": 30}, "image_size=30: must be a multiple of patch_size=8"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskCLIPVisionConfig(**(vision | extra))


@pytest.mark.parametrize("name", patch_masks())
def test_every_mask_goes_by_name_through_config_save_and_load(name, make_model, inputs, tmp_path):
    make_model(name).save_pretrained(tmp_path)
    vision = AutoModel.from_pretrained(tmp_path).vision_model.train()
    assert vision.config.patch_mask == resolve_patch_mask(name)
    kept = []
    for _ in range(2):
        scores = {"patch_scores": torch.linspace(0, 1, 16).expand(4, -1)} if vision.patch_mask.needs_patch_scores else {}
        generator = torch.Generator().manual_seed(0)
        selection = vision.select_patches(inputs["pixel_values"], generator=generator, **scores)
        kept.append(vision(inputs["pixel_values"], patch_selection=selection).pooler_output)
    assert torch.equal(*kept)
    assert (selection.kept_share(16) == 1) == (name == "none")


def test_config_json_holds_every_option_of_the_mask(make_model, tmp_path):
    make_model("random").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["vision_config"]["patch_mask"] == {"name": "random", "mask_ratio": 0.5}
    assert saved["model_type"] == "maskclip"
    assert saved["architectures"] == ["MaskCLIPModel"]
