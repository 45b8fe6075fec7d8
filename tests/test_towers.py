"""Proves of every family and mask: evaluation is the plain model's, to the last bit; a batch of masked images gives what each
image gives alone, forward and backward; what is saved is plain. And that other models are refused by name."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from families import (
    BY_TYPE,
    CONTEXT,
    DUAL_ENCODERS,
    GRIDS,
    PATCH,
    make_images,
    make_inputs,
    make_plain,
    make_tokenizer,
    save_folder,
)
from transformers import AutoModel, MetaClip2Model
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from hf_maskclip import MaskCLIPModel, MaskCLIPVisionModel, PatchSelection, add_patch_mask, build_patch_mask, class_attention
from hf_maskclip.models.patch_mask_registry import BUILT_IN, resolve_patch_mask, scale_mask_ratios

MASKS = [name for name in BUILT_IN if name != "none"]
SEED = 3


def masked(name: str, patch_mask="pgs", **options):
    return add_patch_mask(make_plain(name, **options), patch_mask)


def scores_for(mask: str, images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a mask with a teacher is given besides."""
    if not BUILT_IN[mask].needs_patch_scores:
        return {}
    scores = torch.rand(3, 16, generator=torch.Generator().manual_seed(SEED))
    return {"patch_scores": scores.to(images["pixel_values"].device)}


def select(model, mask: str, images: dict[str, torch.Tensor]) -> PatchSelection:
    arguments = {key: value for key, value in images.items() if key != "pixel_attention_mask"}
    generator = torch.Generator(images["pixel_values"].device).manual_seed(SEED)
    return model.vision_model.select_patches(**arguments, **scores_for(mask, images), generator=generator)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", BY_TYPE)
def test_in_evaluation_mode_it_is_the_plain_model_to_the_last_bit(name):
    plain, inputs = make_plain(name), make_inputs(name)
    model = add_patch_mask(copy.deepcopy(plain), "pgs")
    assert not model.patch_mask.keeps_all
    for expected, found in zip(
        plain(**inputs, return_loss=True).to_tuple()[:5], model(**inputs, return_loss=True).to_tuple()[:5], strict=True
    ):
        assert torch.equal(expected, found)
    assert type(model).__name__ == type(plain).__name__
    assert isinstance(model, type(plain))
    assert list(model.state_dict()) == list(plain.state_dict())


# Anchors of the cluster mask are removed at any ratio.
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "cluster"])
@pytest.mark.parametrize("name", BY_TYPE)
def test_with_no_patch_to_remove_training_is_the_plain_model_s(name, mask):
    plain, inputs = make_plain(name).train(), make_inputs(name)
    model = add_patch_mask(copy.deepcopy(plain), scale_mask_ratios(resolve_patch_mask(mask), 0.0)).train()
    torch.manual_seed(SEED)  # of the text tower's dropout
    expected = plain(**inputs)
    selection = select(model, mask, make_images(name))
    assert selection.valid().sum(dim=1).tolist() == ([16, 10, 10] if name == "siglip2" else [16, 16, 16])
    torch.manual_seed(SEED)
    found = model(**inputs, patch_selection=selection)
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", BY_TYPE)
def test_a_batch_of_masked_images_gives_what_each_gives_alone(name, mask, device):
    model, images = masked(name, mask).double().train().to(device), make_images(name)
    images = {key: (value.double() if value.is_floating_point() else value).to(device) for key, value in images.items()}
    selection = select(model, mask, images)
    counts = selection.valid().sum(dim=1)
    assert int(counts.max()) < 16
    assert int(counts.min()) >= 1
    direction = torch.randn(3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED)).to(device)

    features = model.get_image_features(**images, patch_selection=selection).pooler_output
    (features.sin() * direction).sum().backward()
    together = gradients(model)
    alone = []
    for row in range(3):
        image = {key: value[row : row + 1] for key, value in images.items()}
        one = PatchSelection(selection.indices[row : row + 1, : counts[row]])
        alone.append(model.get_image_features(**image, patch_selection=one).pooler_output)
        (alone[-1].sin() * direction[row]).sum().backward()
    torch.testing.assert_close(features, torch.cat(alone), rtol=1e-5, atol=1e-9)
    separate = gradients(model)
    assert separate.keys() == together.keys()
    assert len(together) > 20
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, separate[key], rtol=1e-5, atol=1e-8 * float(gradient.abs().max() + 1))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", BY_TYPE)
def test_masks_are_drawn_in_training_and_where_asked_for(name, mask):
    model, inputs = masked(name, mask), make_inputs(name)
    given = scores_for(mask, inputs)
    assert model(**inputs).patch_selection is None
    asked = model(**inputs, apply_patch_mask=True, generator=torch.Generator().manual_seed(SEED), **given)
    again = model(**inputs, patch_selection=asked.patch_selection)
    assert torch.equal(asked.image_embeds, again.image_embeds)
    assert torch.equal(asked.patch_selection.indices, select(model, mask, make_images(name)).indices)
    trained = model.train()(**inputs, return_loss=True, **given)
    assert trained.patch_selection.valid().sum() < 36
    trained.loss.backward()
    assert all(weight.grad is not None for key, weight in model.named_parameters() if key.startswith("vision_model.encoder"))


KINDS = {
    "VisionModel": list(BY_TYPE),
    "VisionModelWithProjection": ["clip", "metaclip_2"],
    "ForImageClassification": ["clip", "metaclip_2", "siglip", "siglip2"],
}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in KINDS.items() for name in names])
def test_towers_alone_with_projections_and_with_classifiers(kind, name):
    plain, images = make_plain(name, kind=kind), make_images(name)
    model = add_patch_mask(copy.deepcopy(plain), "cluster")
    field = {"VisionModel": "pooler_output", "VisionModelWithProjection": "image_embeds"}.get(kind, "logits")
    assert torch.equal(plain(**images)[field], model(**images)[field])
    outputs = model.train()(**images)
    assert outputs.patch_selection.lengths is not None
    alone = []
    for row, length in enumerate(outputs.patch_selection.lengths):
        one = PatchSelection(outputs.patch_selection.indices[row : row + 1, :length])
        alone.append(model(**{key: value[row : row + 1] for key, value in images.items()}, patch_selection=one)[field])
    torch.testing.assert_close(outputs[field], torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BY_TYPE)
def test_the_mask_is_recorded_and_found_again_and_copies_keep_it(name, tmp_path):
    model = masked(name, {"name": "random", "mask_ratio": 0.75})
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded).__name__ == type(model).__name__
    assert "patch_mask" not in loaded.vision_model._modules
    again = add_patch_mask(loaded)
    assert again.patch_mask.mask_ratio == 0.75
    assert again.config.vision_config.patch_mask["name"] == "random"
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.config.vision_config.patch_mask = "grid"
        selection = copied.train()(**make_inputs(name)).patch_selection
        assert type(copied) is type(model)
        assert selection is not None
        assert copied.patch_mask.__class__.__name__ == "GridPatchMask"
    model.set_patch_mask("none")
    assert model.train()(**make_inputs(name)).patch_selection is None


PLAIN = """
import logging, sys
from PIL import Image
from transformers import AutoModel, pipeline
for name, folder in [argument.split("=", 1) for argument in sys.argv[1:]]:
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    print(name, type(model).__name__, *(len(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")))
    if name != "clipseg":
        classify = pipeline("zero-shot-image-classification", model=folder)
        print(len(classify(Image.new("RGB", (50, 40)), candidate_labels=["a red ball", "two fish"])))
assert "hf_maskclip" not in sys.modules
"""


def test_without_this_package_what_is_saved_loads_whole_and_works_in_the_pipeline(tmp_path):
    arguments, expected = [], []
    for name in BY_TYPE:
        folder = save_folder(name, tmp_path / name)
        add_patch_mask(AutoModel.from_pretrained(folder), "pgs").save_pretrained(folder)
        arguments.append(f"{name}={folder}")
        expected += [f"{name} {BY_TYPE[name].prefix}Model 0 0 0", *(["2"] if name != "clipseg" else [])]
    done = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:-1] == expected
    assert "ERROR" not in done.stderr
    assert "patch_mask" not in done.stderr


@pytest.mark.parametrize("name", DUAL_ENCODERS)
@pytest.mark.parametrize("end_token", [2, 7])
def test_a_maskclip_class_has_the_text_features_of_a_family_or_refuses_it(name, end_token, tmp_path):
    plain = make_plain(name)
    plain.config.text_config.eos_token_id = end_token
    plain.save_pretrained(tmp_path)
    input_ids = torch.randint(8, 60, (4, 12), generator=torch.Generator().manual_seed(SEED))
    input_ids[:, 9] = end_token  # not the highest id, and not the last position
    expected = AutoModel.from_pretrained(tmp_path).get_text_features(input_ids=input_ids).pooler_output
    if name == "clip" or (name, end_token) == ("metaclip_2", 7):
        found = MaskCLIPModel.from_pretrained(tmp_path, patch_mask="pgs").eval().get_text_features(input_ids=input_ids)
        assert torch.equal(found.pooler_output, expected)
        return
    with pytest.raises(ValueError, match=r"use .*add_patch_mask\(AutoModel.from_pretrained\("):
        MaskCLIPModel.from_pretrained(tmp_path, patch_mask="pgs")
    found = add_patch_mask(AutoModel.from_pretrained(tmp_path), "pgs").get_text_features(input_ids=input_ids)
    assert torch.equal(found.pooler_output, expected)


def test_metaclip_2_pools_at_another_token_than_clip_where_its_end_token_is_2(tmp_path):
    plain = make_plain("metaclip_2")
    assert isinstance(plain, MetaClip2Model)
    assert plain.config.text_config.eos_token_id == 2
    input_ids = torch.tensor([[0, 90, 50, 2, 1, 1]])
    states = plain.text_model(input_ids=input_ids).last_hidden_state
    found = add_patch_mask(plain, "pgs").get_text_features(input_ids=input_ids).pooler_output
    assert torch.equal(found, plain.text_projection(states[:, 3]))
    assert (found - plain.text_projection(states[:, 1])).abs().max() > 0.01  # CLIP's choice, the highest id


REFUSED = {
    "ViTModel": lambda: transformers.ViTModel(
        transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ),
    "SiglipTextModel": lambda: make_plain("siglip").text_model,
    "CLIPTextModel": lambda: make_plain("clip").text_model,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_no_family_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^{name}: no patch mask for a model of this class; there are masks for CLIP"):
        add_patch_mask(REFUSED[name](), "pgs")


def test_what_is_around_a_model_gets_no_mask_and_a_model_without_one_says_so():
    with pytest.raises(ValueError, match="^DataParallel: a patch mask goes into the SiglipModel in it, before it is wrapped"):
        add_patch_mask(torch.nn.DataParallel(make_plain("siglip")), "pgs")
    with pytest.raises(ValueError, match="records none, name one"):
        add_patch_mask(make_plain("siglip"))
    with pytest.raises(ValueError, match="unknown patch mask 'pgss'"):
        add_patch_mask(make_plain("siglip"), "pgss")


@pytest.mark.parametrize("mask", MASKS)
def test_naflex_masks_choose_from_the_picture_of_each_grid(mask):
    model = masked("siglip2", mask)
    for rows, columns in [*GRIDS, [1, 16], [3, 3]]:
        picture = torch.randn(1, 3, rows * PATCH, columns * PATCH, generator=torch.Generator().manual_seed(rows))
        patches = convert_image_to_patches(picture[0], PATCH)[None]  # (1, L, P * P * C)
        embeds = model.vision_model.embeddings.patch_embedding(patches)
        given = {"patch_scores": torch.rand(1, rows * columns)} if BUILT_IN[mask].needs_patch_scores else {}
        expected = build_patch_mask(mask, patch_size=PATCH)(
            picture, embeds, generator=torch.Generator().manual_seed(5), **given
        )
        found = model.select_patches(
            patches, spatial_shapes=torch.tensor([[rows, columns]]), generator=torch.Generator().manual_seed(5), **given
        )
        assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_a_pooling_head_tells_what_it_attends_to(name):
    tower, images = masked(name).vision_model, make_images(name)
    states = tower(**images).last_hidden_state  # (3, L, D)
    query, key, _ = tower.head.attention.in_proj_weight.chunk(3)
    query_bias, key_bias, _ = tower.head.attention.in_proj_bias.chunk(3)
    queries = (tower.head.probe[0] @ query.T + query_bias).view(1, 2, 16).transpose(0, 1)  # (H, 1, E)
    keys = (states @ key.T + key_bias).unflatten(2, (2, 16)).transpose(1, 2)  # (3, H, L, E)
    scores = (queries @ keys.transpose(2, 3)) / 4  # (3, H, 1, L)
    if name == "siglip2":
        scores = scores.masked_fill(images["pixel_attention_mask"][:, None, None] == 0, -torch.inf)
    expected = scores.softmax(dim=-1).mean(dim=1)[:, 0]
    torch.testing.assert_close(class_attention(tower, **images), expected, rtol=1e-4, atol=1e-5)


def test_a_maskclip_class_is_the_clip_row_of_the_table(make_model):
    model = make_model("pgs")
    assert add_patch_mask(model, "grid") is model
    assert model.config.patch_mask["name"] == "grid"
    assert isinstance(model.vision_model, MaskCLIPVisionModel)
    assert len(make_tokenizer("clip")) > CONTEXT
