"""Proves that what leaves this package works with its neighbours: the pipelines of Transformers, sentence-transformers, ONNX
Runtime, device maps and bfloat16. Each reads the folder of an export, and gives what the model itself gives."""

import logging
import warnings

import numpy as np
import pytest
import torch
from helpers import CAPTIONS, random_picture
from transformers import (
    AutoModel,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    pipeline,
)

from hf_maskclip import (
    MaskCLIPConfig,
    MaskCLIPForImageClassification,
    MaskCLIPModel,
    MaskCLIPVisionModel,
    MaskCLIPVisionModelWithProjection,
    export_to_clip,
)

LABELS = ["red ball", "blue fish", "house"]
MASK = {"name": "pgs", "min_mask_ratio": 0.4, "max_mask_ratio": 0.4}


@pytest.fixture
def export(make_model, processor, tmp_path):
    """A model, in evaluation mode, and the folder of its plain export."""
    model = make_model(MASK, seed=4).eval()
    export_to_clip(model, tmp_path / "export", processor)
    return model, tmp_path / "export"


@pytest.fixture
def errors(caplog):
    """What Transformers has logged as an error; it passes nothing on to the root logger."""
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    log.removeHandler(caplog.handler)


@pytest.fixture
def batch(processor):
    """Three pictures and four captions."""
    pictures = [random_picture(seed) for seed in range(3)]
    return processor(images=pictures, text=CAPTIONS, padding=True, return_tensors="pt")


def make_classifier(make_model) -> MaskCLIPForImageClassification:
    parts = make_model(MASK).config.to_dict()
    names = dict(enumerate(LABELS))
    torch.manual_seed(5)
    return MaskCLIPForImageClassification(MaskCLIPConfig(**parts | {"id2label": names})).eval()


def test_zero_shot_image_classification(export, processor, errors):
    model, folder = export
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    assert type(classify.model) is CLIPModel
    scores = {row["label"]: row["score"] for row in classify(random_picture(0), candidate_labels=LABELS)}
    texts = [f"This is a photo of {label}." for label in LABELS]
    with torch.no_grad():
        logits = model(**processor(images=random_picture(0), text=texts, padding=True, return_tensors="pt")).logits_per_image
    expected = dict(zip(LABELS, logits[0].softmax(dim=0).tolist(), strict=True))
    assert np.ptp(list(expected.values())) > 1e-3
    assert scores == pytest.approx(expected, abs=1e-6)
    assert errors() == []


@pytest.mark.parametrize("whole", [False, True], ids=["export of the tower", "export of the whole"])
def test_image_feature_extraction(whole, export, processor, errors, tmp_path):
    model, folder = export
    if whole:  # CLIPModel asks for texts, so that its tower is what the pipeline takes
        extract = pipeline(
            "image-feature-extraction", model=CLIPVisionModel.from_pretrained(folder), image_processor=str(folder)
        )
    else:
        export_to_clip(MaskCLIPVisionModel.from_pretrained(folder), tmp_path / "tower", processor.image_processor)
        extract = pipeline("image-feature-extraction", model=str(tmp_path / "tower"))
    assert type(extract.model) is CLIPVisionModel
    features = torch.tensor(extract(random_picture(0), pool=True))
    with torch.no_grad():
        expected = model.vision_model(**processor(images=random_picture(0), return_tensors="pt")).pooler_output
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert errors() == []


def test_image_classification_by_a_classifier_that_was_tuned_with_a_mask(make_model, processor, errors, tmp_path):
    model = make_classifier(make_model)
    export_to_clip(model, tmp_path, processor.image_processor)
    classify = pipeline("image-classification", model=str(tmp_path))
    assert type(classify.model) is CLIPForImageClassification
    scores = {row["label"]: row["score"] for row in classify(random_picture(0))}
    with torch.no_grad():
        logits = model(**processor(images=random_picture(0), return_tensors="pt")).logits
    expected = dict(zip(LABELS, logits[0].softmax(dim=0).tolist(), strict=True))
    assert np.ptp(list(expected.values())) > 1e-3
    assert scores == pytest.approx(expected, abs=1e-6)
    assert errors() == []
    again = MaskCLIPForImageClassification.from_pretrained(tmp_path)
    assert again.config.vision_config.patch_mask == model.config.vision_config.patch_mask


def test_the_projected_tower_is_exported_as_it_is(export, processor, batch, tmp_path):
    model, folder = export
    export_to_clip(MaskCLIPVisionModelWithProjection.from_pretrained(folder), tmp_path / "tower", processor.image_processor)
    tower, info = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = model.get_image_features(batch["pixel_values"]).pooler_output
        assert torch.equal(tower(batch["pixel_values"]).image_embeds, expected)


@pytest.mark.slow
def test_sentence_transformers_encodes_pictures_and_texts(export, processor):
    reason = "sentence-transformers is of the test extra"
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=reason)
    model, folder = export
    encoder = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    images = encoder.encode([random_picture(0), random_picture(1)], normalize_embeddings=True)
    texts = encoder.encode(CAPTIONS, normalize_embeddings=True)
    pixels = processor(images=[random_picture(0), random_picture(1)], return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels, **processor(text=CAPTIONS, padding=True, return_tensors="pt"))
    torch.testing.assert_close(torch.tensor(images), expected.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(texts), expected.text_embeds, rtol=0, atol=1e-5)
    scores = encoder.similarity(images, texts) * model.logit_scale.exp()
    torch.testing.assert_close(scores, expected.logits_per_image, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_gradient_cache_of_sentence_transformers_trains_on_masked_pictures(make_model, processor, tmp_path):
    """Its first pass is without gradients, which is meant; both passes see the same patches."""
    reason = "sentence-transformers is of the test extra"
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=reason)
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason=reason)
    make_model("pgs").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").train()
    loss = losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=2)
    (tower,) = [module for module in encoder.modules() if isinstance(module, MaskCLIPVisionModel)]
    seen = []
    tower.register_forward_hook(lambda module, args, output: seen.append(output.patch_selection.indices))
    parts = [encoder.preprocess([random_picture(number) for number in range(4)]), encoder.preprocess(CAPTIONS)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a model in training mode masks patches")
        loss(parts, None).backward()
    assert len(seen) == 4  # two parts, twice
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert tower.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:# The axis name")  # two inputs share the axes of texts, which is meant
def test_onnx_runtime_gives_equal_scores_for_any_number_of_pictures_and_texts(export, inputs, batch, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is of the test extra")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is of the test extra")
    _, folder = export
    model = AutoModel.from_pretrained(folder)
    names = ("input_ids", "attention_mask", "pixel_values")
    example = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    texts, images = {0: "texts", 1: "tokens"}, {0: "images"}
    axes = {"input_ids": texts, "attention_mask": texts, "pixel_values": images}
    program = torch.onnx.export(model, kwargs={name: example[name] for name in names}, dynamic_shapes=axes, dynamo=True)
    program.save(tmp_path / "clip.onnx")

    session = onnxruntime.InferenceSession(tmp_path / "clip.onnx", providers=["CPUExecutionProvider"])
    fewer = {name: batch[name][:2] if name == "pixel_values" else batch[name][1:] for name in names}
    longer = fewer | {name: torch.nn.functional.pad(fewer[name], (0, 3)) for name in names[:2]}  # ends stay where they were
    for tensors in (fewer, longer):
        scores = session.run(None, {name: value.numpy() for name, value in tensors.items()})[0]
        with torch.no_grad():
            expected = model(**tensors).logits_per_image
        assert expected.shape == (2, 3)
        assert expected.std() > 1e-2
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # logit_scale is a parameter and no module
@pytest.mark.parametrize("kind", [AutoModel, MaskCLIPModel])
def test_a_device_map_places_the_parts_and_the_scores_stay(kind, export, batch, tmp_path):
    model, folder = export
    # A machine may have one device only, so that the disk is the second place.
    limits = {"max_memory": {"cpu": "120KB"}, "offload_folder": tmp_path / "offload"}
    split = kind.from_pretrained(folder, device_map="auto", **limits)
    assert set(map(str, split.hf_device_map.values())) == {"cpu", "disk"}
    placed = kind.from_pretrained(folder, device_map="auto")
    with torch.no_grad():
        expected = model(**batch).logits_per_image
        assert torch.equal(split(**batch).logits_per_image, expected)
        scores = placed(**batch.to(placed.device)).logits_per_image.cpu()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [AutoModel, MaskCLIPModel])
def test_loading_in_bfloat16(kind, export, batch):
    model, folder = export
    loaded = kind.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected = model(**batch).logits_per_image
        scores = loaded(**batch | {"pixel_values": batch["pixel_values"].bfloat16()}).logits_per_image
    assert scores.dtype == torch.bfloat16
    assert not torch.equal(scores.float(), expected)
    torch.testing.assert_close(scores.float(), expected, rtol=0, atol=0.1)


def test_a_model_in_bfloat16_is_exported_in_it_and_trains_with_its_mask(export, processor, inputs, tmp_path):
    _, folder = export
    model = MaskCLIPModel.from_pretrained(folder, dtype=torch.bfloat16)
    export_to_clip(model, tmp_path / "half", processor)
    assert AutoModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    output = model.train()(inputs["input_ids"], inputs["pixel_values"].bfloat16(), return_loss=True)
    output.loss.backward()
    assert output.patch_selection.indices.shape == (4, 10)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert model.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
