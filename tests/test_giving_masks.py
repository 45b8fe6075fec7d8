"""Proves that a patch mask can be given to a model wherever one would expect it, that it then masks, is recorded and survives
save and load, and that everything else is an error: no spelling trains on whole images in silence."""

import pytest
import torch
from model_classes import ALL_CLASSES, vision_of
from transformers import AutoModel, CLIPConfig, CLIPModel, CLIPVisionConfig
from transformers import logging as transformers_logging

from hf_maskclip import (
    MaskCLIPConfig,
    MaskCLIPForImageClassification,
    MaskCLIPModel,
    MaskCLIPVisionConfig,
    PatchMask,
    PatchSelection,
    build_patch_mask,
    register_patch_mask,
)

QUARTER = {"name": "random", "mask_ratio": 0.75}
KEPT = 4  # of 16 patches


def config_class_of(kind):
    return MaskCLIPConfig if kind in (MaskCLIPModel, MaskCLIPForImageClassification) else MaskCLIPVisionConfig


@pytest.fixture
def folder(make_clip, tmp_path):
    """A plain CLIP, which has no mask."""
    make_clip().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def forward(inputs):
    def forward(model, **options):
        given = inputs if isinstance(model, MaskCLIPModel) else {"pixel_values": inputs["pixel_values"]}
        return model(**given, **options).patch_selection

    return forward


# ---- Every spelling masks --------------------------------------------------------------------------------------------------


def loaded_with_a_dict(kind, folder):
    return kind.from_pretrained(folder, patch_mask=QUARTER)


def loaded_with_a_mask(kind, folder):
    return kind.from_pretrained(folder, patch_mask=build_patch_mask(QUARTER, patch_size=8))


def loaded_with_a_configuration(kind, folder):
    return kind.from_pretrained(folder, config=config_class_of(kind).from_pretrained(folder, patch_mask=QUARTER))


def loaded_with_a_configuration_of_clip(kind, folder):
    plain = CLIPConfig if config_class_of(kind) is MaskCLIPConfig else CLIPVisionConfig
    return kind.from_pretrained(folder, config=plain.from_pretrained(folder), patch_mask=QUARTER)


def loaded_with_a_configuration_assigned_later(kind, folder):
    config = config_class_of(kind).from_pretrained(folder)
    config.patch_mask = QUARTER
    return kind.from_pretrained(folder, config=config)


def loaded_with_a_part_of_the_configuration(kind, folder):
    if config_class_of(kind) is MaskCLIPConfig:
        return kind.from_pretrained(folder, vision_config={"patch_mask": QUARTER})
    return kind.from_pretrained(folder, patch_mask=QUARTER)


def built_with_a_mask(kind, folder):
    return kind(config_class_of(kind).from_pretrained(folder), patch_mask=QUARTER)


def built_from_a_configuration(kind, folder):
    options = config_class_of(kind).from_pretrained(folder).to_dict() | {"patch_mask": QUARTER}
    return kind(config_class_of(kind)(**options))


def set_on_the_model(kind, folder):
    model = kind.from_pretrained(folder)
    model.set_patch_mask(QUARTER)
    return model


def assigned_on_the_configuration_of_the_model(kind, folder):
    model = kind.from_pretrained(folder, patch_mask="grid")
    model.config.patch_mask = QUARTER
    return model


def changed_in_the_configuration_of_the_model(kind, folder):
    model = kind.from_pretrained(folder, patch_mask="random")
    model.config.patch_mask["mask_ratio"] = 0.75
    return model


def assigned_on_the_tower(kind, folder):
    model = kind.from_pretrained(folder)
    vision_of(model).patch_mask = build_patch_mask(QUARTER, patch_size=8)
    return model


SPELLINGS = (
    *(loaded_with_a_dict, loaded_with_a_mask, loaded_with_a_configuration, loaded_with_a_configuration_of_clip),
    *(loaded_with_a_configuration_assigned_later, loaded_with_a_part_of_the_configuration, built_with_a_mask),
    *(built_from_a_configuration, set_on_the_model, assigned_on_the_configuration_of_the_model),
    *(changed_in_the_configuration_of_the_model, assigned_on_the_tower),
)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
@pytest.mark.parametrize("kind", ALL_CLASSES, ids=lambda kind: kind.__name__)
def test_a_mask_that_is_given_masks_is_recorded_and_survives_save_and_load(kind, spelling, folder, forward, tmp_path):
    model = spelling(kind, folder)
    assert type(model) is kind
    assert forward(model.train()).indices.shape == (4, KEPT)
    assert vision_of(model).config.patch_mask == QUARTER
    assert vision_of(model).patch_mask.mask_ratio == 0.75
    assert forward(model.eval()) is None
    model.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved")
    assert again.patch_mask.mask_ratio == 0.75
    assert forward(again.train()).indices.shape == (4, KEPT)


def test_one_call_can_have_a_mask_of_its_own(make_model, forward):
    model = make_model("none").eval()
    assert forward(model, patch_mask=QUARTER).indices.shape == (4, KEPT)
    assert forward(model) is None
    assert model.config.patch_mask == {"name": "none"}


def test_a_registered_mask_is_known_by_its_bare_name(folder, forward):
    class Odd(PatchMask):
        def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
            return PatchSelection(torch.arange(1, 16, 2).expand(len(pixel_values), -1))

    register_patch_mask("odd", Odd)
    model = MaskCLIPModel.from_pretrained(folder, patch_mask="odd").train()
    assert forward(model).indices[0].tolist() == list(range(1, 16, 2))
    assert MaskCLIPVisionConfig(patch_mask="odd").patch_mask == {"name": "odd"}
    assert MaskCLIPVisionConfig(patch_mask=Odd()).patch_mask == {"name": "odd"}


@pytest.mark.parametrize(
    ("config_class", "name"), [(MaskCLIPConfig, "MaskCLIPModel"), (MaskCLIPVisionConfig, "MaskCLIPVisionModel")]
)
def test_automodel_builds_from_a_configuration_that_no_model_has_saved(config_class, name, config_parts):
    parts = config_parts()
    options = parts if config_class is MaskCLIPConfig else parts["vision_config"]
    assert type(AutoModel.from_config(config_class(**options))).__name__ == name
    assert AutoModel.from_config(config_class(**options), patch_mask=QUARTER).patch_mask.mask_ratio == 0.75


# ---- Nothing is swallowed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_CLASSES, ids=lambda kind: kind.__name__)
def test_a_model_that_is_loaded_without_a_mask_says_so_once(kind, folder, caplog):
    transformers_logging.get_logger("transformers").warning_once.cache_clear()
    kind.from_pretrained(folder, patch_mask="none")
    assert "patch mask" not in caplog.text
    kind.from_pretrained(folder)
    kind.from_pretrained(folder)
    assert caplog.text.count(f"{kind.__name__} without a patch mask: it trains on whole images") == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskCLIPConfig(mask_ratio=0.5), "unknown option 'mask_ratio': the options of a mask go into patch_mask="),
        (lambda: MaskCLIPVisionConfig(mask_ratio=0.5), "unknown option 'mask_ratio'"),
        (lambda: MaskCLIPVisionConfig(patch_mask="PGS"), "unknown patch mask 'PGS': .* did you mean 'pgs'"),
        (lambda: MaskCLIPVisionConfig(patch_mask=3), "patch_mask=3: must be a name, a mapping such as .*, or a PatchMask"),
        (lambda: MaskCLIPConfig(patch_mask={"name": "random", "ratio": 1}), "patch mask 'random' has no option 'ratio'"),
        (
            lambda: build_patch_mask({"name": "cluster", "mask_ratio": 0.1}),
            "min_mask_ratio=0.3: must be at most mask_ratio=0.1",
        ),
    ],
)
def test_what_is_no_mask_is_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config_class", [MaskCLIPConfig, MaskCLIPVisionConfig])
def test_an_option_of_a_mask_beside_the_mask_is_refused_where_a_folder_is_read(config_class, folder):
    with pytest.raises(ValueError, match="unknown option 'mask_ratio'"):
        config_class.from_pretrained(folder, mask_ratio=0.5)


def test_a_wrong_mask_on_a_loaded_model_raises_and_leaves_the_model_as_it_was(make_model, forward):
    model = make_model(QUARTER).train()
    for wrong in ("pqs", {"name": "random", "mask_ratio": 2}, 7):
        with pytest.raises(ValueError):
            model.set_patch_mask(wrong)
        with pytest.raises(ValueError):
            model.config.patch_mask = wrong
        assert model.config.patch_mask == QUARTER
        assert forward(model).indices.shape == (4, KEPT)
    with pytest.raises(ValueError, match="patch size"):
        model.set_patch_mask(build_patch_mask("random", patch_size=16))


@pytest.mark.parametrize("call", ["forward", "get_image_features", "tower"])
@pytest.mark.parametrize("key", ["apply_patch_masks", "mask_ratio", "patch_selections"])
def test_a_keyword_that_is_nearly_ours_is_refused(key, call, make_model, inputs):
    model, pixel_values = make_model("random"), inputs["pixel_values"]
    calls = {
        "forward": lambda: model(**inputs, **{key: None}),
        "get_image_features": lambda: model.get_image_features(pixel_values, **{key: None}),
        "tower": lambda: model.vision_model(pixel_values, **{key: None}),
    }
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{key}'"):
        calls[call]()


def test_generator_and_progress_reach_the_mask(make_model, inputs, monkeypatch):
    model = make_model("random").train()
    draws = [model(**inputs, generator=torch.Generator().manual_seed(seed)).patch_selection.indices for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    seen, choose = [], type(model.patch_mask).forward
    monkeypatch.setattr(type(model.patch_mask), "forward", lambda *a, **k: seen.append(k["progress"]) or choose(*a, **k))
    model(**inputs)
    model(**inputs, progress=0.25)
    model.get_image_features(inputs["pixel_values"], progress=0.5)
    assert seen == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("kind", ALL_CLASSES, ids=lambda kind: kind.__name__)
def test_masking_without_a_mask_is_refused(kind, folder, forward):
    with pytest.raises(ValueError, match="apply_patch_mask=True: the model has no patch mask"):
        forward(kind.from_pretrained(folder), apply_patch_mask=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_mask": "grid", "apply_patch_mask": False}, "patch_mask and apply_patch_mask=False: contradict"),
        ({"patch_selection": 0, "apply_patch_mask": False}, "patch_selection and apply_patch_mask=False: contradict"),
        (
            {"patch_selection": 0, "patch_mask": "grid"},
            "patch_selection and patch_mask: contradict each other",
        ),
        ({"patch_scores": 0}, "patch_scores: the patch mask RandomPatchMask takes none"),
    ],
)
@pytest.mark.parametrize("kind", ALL_CLASSES, ids=lambda kind: kind.__name__)
def test_what_would_be_passed_over_is_refused(kind, options, message, folder, forward):
    values = {"patch_selection": PatchSelection(torch.zeros(4, 1).long()), "patch_scores": torch.rand(4, 16)}
    options = {key: values.get(key, value) for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        forward(kind.from_pretrained(folder, patch_mask=QUARTER).train(), **options)


def selection(*shape: int, value: int = 0, dtype=torch.int64, lengths=None) -> PatchSelection:
    return PatchSelection(torch.full(shape, value, dtype=dtype), lengths)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.zeros(4, 2).long(), None), "of type tuple: must be a PatchSelection"),
        (torch.zeros(4, 2).long(), "of type Tensor: must be a PatchSelection"),
        (torch.ones(4, 16).bool(), "of type Tensor"),
        (selection(2, 3), "patch_selection of 2 images, lengths None: there are 4 images"),
        (selection(4, 17), r"indices \(4, 17\) of torch.int64: must be whole numbers \(B, K\), K from 1 to 16"),
        (selection(4), r"indices \(4,\)"),
        (selection(4, 3, dtype=torch.float32), "of torch.float32: must be whole numbers"),
        (selection(4, 3, value=16), "indices: must be from 0 to 15"),
        (selection(4, 3, value=-1), "indices: must be from 0 to 15"),
        (selection(4, 3, lengths=torch.tensor([1, 2])), r"lengths \(2,\): there are 4 images"),
        (selection(4, 3, lengths=torch.tensor([0, 1, 1, 1])), "lengths: must be from 1 to 3"),
        (selection(4, 3, lengths=torch.tensor([4, 1, 1, 1])), "lengths: must be from 1 to 3"),
    ],
)
@pytest.mark.parametrize("kind", ALL_CLASSES, ids=lambda kind: kind.__name__)
def test_a_selection_that_does_not_fit_is_one_line(kind, given, message, folder, forward):
    with pytest.raises(ValueError, match=message) as error:
        forward(kind.from_pretrained(folder, patch_mask="none"), patch_selection=given)
    assert "\n" not in str(error.value)


def test_a_model_without_texts_or_images_says_which(make_model, inputs):
    model = make_model("random").train()
    with pytest.raises(ValueError, match="input_ids is None"):
        model(pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="pixel_values is None"):
        model(input_ids=inputs["input_ids"])


def test_a_mask_shows_its_options():
    assert repr(build_patch_mask(QUARTER, patch_size=8)) == "RandomPatchMask(mask_ratio=0.75, patch_size=8)"
    assert "edges='sobel'" in repr(build_patch_mask("pgs"))


def test_a_plain_clip_is_left_alone(make_clip, inputs):
    assert type(make_clip().vision_model.embeddings).__name__ == "CLIPVisionEmbeddings"
    assert CLIPModel(CLIPConfig()).config.model_type == "clip"
