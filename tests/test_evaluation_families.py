"""Proves that evaluation is right for each family of dual encoders: zero-shot scores are those of Transformers' pipeline, texts
and pictures are prepared as the family's own are, masks are applied and recorded, and what is of no family is refused in one
line before anything is encoded."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from families import BY_TYPE, SIDE, make_config, make_gemma_tokenizer, make_plain, make_tokenizer, save_folder
from helpers import CAPTIONS, random_picture
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, CLIPModel, pipeline

from hf_maskclip import add_patch_mask
from hf_maskclip.cli import main
from hf_maskclip.errors import ConfigError
from hf_maskclip.evaluation import Encoder, ImageSet, evaluate_zero_shot
from hf_maskclip.evaluation.runner import load_encoder

LABELS = ["red ball", "blue fish", "house", "green tree", "car"]
TEMPLATE = "a photo of a {c}"
# Resized to a shorter side of 32, an even number of pixels is cut, for Transformers' own crop floors its half.
PICTURES = [random_picture(n, size) for n, size in enumerate([(64, 48), (48, 64), (32, 32), (96, 40), (36, 60)])]
RANDOM = "{name: random, mask_ratio: 0.5}"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a tiny model of a family, by its model type. Scale and bias are those of a trained model."""
    made = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_folder(name, tmp_path_factory.mktemp(name))
            model = make_plain(name)
            with torch.no_grad():
                model.logit_scale.fill_(3.0)
                if BY_TYPE[name].loss == "sigmoid":
                    model.logit_bias.fill_(-4.0)
            model.save_pretrained(made[name])
        return made[name]

    return folder


def images() -> ImageSet:
    return ImageSet([(picture, number) for number, picture in enumerate(PICTURES)])


def scores_of(encoder: Encoder) -> torch.Tensor:
    """The scores (N, M) of the pictures and labels, of the encoder's features and the model's scale and bias."""
    texts = encoder.encode_texts([TEMPLATE.replace("{c}", label) for label in LABELS])
    logits = encoder.encode_images(images()).features @ texts.T * encoder.model.logit_scale.exp().item()
    if BY_TYPE[encoder.model.config.model_type.replace("maskclip", "clip")].loss == "sigmoid":
        return torch.sigmoid(logits + encoder.model.logit_bias.item())
    return logits.softmax(dim=1)


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("name", BY_TYPE)
def test_scores_and_predictions_are_those_of_the_pipeline(name, backend, folder_of):
    encoder = load_encoder(str(folder_of(name)), image_backend=backend)
    classify = pipeline("zero-shot-image-classification", model=str(folder_of(name)))
    classify.image_processor = encoder.processor.image_processor if backend == "pil" else classify.image_processor
    found = classify(PICTURES, candidate_labels=LABELS, hypothesis_template=TEMPLATE.replace("{c}", "{}"))
    expected = torch.tensor([[{row["label"]: row["score"] for row in rows}[label] for label in LABELS] for rows in found])
    logits = expected.logit()
    assert (logits.max(dim=1).values - logits.min(dim=1).values).min() > 1e-2  # the labels can be told apart
    torch.testing.assert_close(scores_of(encoder), expected, rtol=1e-4, atol=1e-6)

    record = evaluate_zero_shot(encoder, images(), LABELS, [TEMPLATE], details=True)
    predicted = [prediction["predicted"] for prediction in record["details"]["predictions"]]
    assert predicted == [rows[0]["label"] for rows in found]


@pytest.mark.parametrize("name", BY_TYPE)
def test_masked_features_are_those_of_the_model_under_that_mask(name, folder_of):
    folder = str(folder_of(name))
    whole = load_encoder(folder).encode_images(images()).features
    encoder = load_encoder(folder, patch_mask=RANDOM)
    assert encoder.describe()["patch_mask"] == {"name": "random", "mask_ratio": 0.5}
    masked = encoder.encode_images(images()).features
    assert (masked - whole).norm(dim=1).min() > 1e-3
    assert encoder.work.kept_shares / len(PICTURES) == pytest.approx(0.5, abs=0.02)  # of each picture's own grid
    torch.testing.assert_close(encoder.encode_images(images()).features, masked, rtol=0, atol=0)

    model = add_patch_mask(AutoModel.from_pretrained(folder), {"name": "random", "mask_ratio": 0.5}).eval()
    processor = encoder.processor
    torch.manual_seed(0)  # of the first batch
    with torch.no_grad():
        inputs = processor.image_processor(images=PICTURES, return_tensors="pt")
        expected = F.normalize(model.get_image_features(**inputs, apply_patch_mask=True).pooler_output, dim=-1)
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-6)

    model.save_pretrained(encoder_folder := Path(folder).with_name(f"{name}-masked"))
    recorded = add_patch_mask(AutoModel.from_pretrained(encoder_folder))  # the mask that it records
    again = Encoder(recorded, processor, apply_patch_mask=True)
    torch.testing.assert_close(again.encode_images(images()).features, masked, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BY_TYPE)
def test_a_mask_is_refused_where_there_is_none(name, folder_of):
    processor = AutoProcessor.from_pretrained(folder_of(name))
    model = AutoModel.from_pretrained(folder_of(name))
    with pytest.raises(ConfigError, match=f"a {BY_TYPE[name].prefix}Model has no patch mask; .*add_patch_mask gives it one"):
        Encoder(model, processor, apply_patch_mask=True)
    with pytest.raises(ConfigError, match="the patch mask of this .*Model keeps every patch; give it one by set_patch_mask"):
        Encoder(add_patch_mask(model, "none"), processor, apply_patch_mask=True)
    with pytest.raises(ConfigError, match="the patch mask 'attentive' goes by a teacher's attention, which an evaluation has"):
        Encoder(add_patch_mask(model, "attentive"), processor, apply_patch_mask=True)


@pytest.mark.parametrize("end", [2, "the last"])
def test_the_texts_of_metaclip_2_are_those_of_its_own_class(end, folder_of, tmp_path):
    tokenizer = make_tokenizer("metaclip_2" if end == 2 else "clip")
    config = make_config("metaclip_2", tokenizer)
    assert (config.text_config.eos_token_id == 2) == (end == 2)
    model = transformers.MetaClip2Model(config).eval()
    model.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(folder_of("metaclip_2"))
    processor.tokenizer = tokenizer
    processor.save_pretrained(tmp_path)
    texts = [*CAPTIONS, f"{CAPTIONS[0]} and {CAPTIONS[1]} and {CAPTIONS[2]} " * 9]
    encoder = load_encoder(str(tmp_path))
    assert isinstance(encoder.model, transformers.MetaClip2Model)
    found = encoder.encode_texts(texts)

    tokens = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_text_features(**tokens).pooler_output
        of_clip = CLIPModel.from_pretrained(tmp_path).eval().get_text_features(**tokens).pooler_output
    torch.testing.assert_close(found, F.normalize(expected, dim=-1), rtol=1e-5, atol=1e-6)
    assert ((F.normalize(of_clip, dim=-1) - found).abs().max() > 0.1) == (end == 2)  # which nobody would be told of


def test_a_model_that_is_read_as_another_family_is_refused_before_anything_is_encoded(folder_of):
    folder = folder_of("metaclip_2")
    processor = AutoProcessor.from_pretrained(folder)
    with pytest.raises(ConfigError, match="a CLIP with eos_token_id=2 would take its features from another token than 2, with"):
        Encoder(CLIPModel.from_pretrained(folder), processor)
    processor.tokenizer = make_tokenizer("siglip")
    Encoder(AutoModel.from_pretrained(folder), processor)  # its end token is the same
    processor.tokenizer = make_tokenizer("siglip2")
    with pytest.raises(ConfigError, match="or the tokenizer is of another model"):
        Encoder(AutoModel.from_pretrained(folder), processor)


def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused(folder_of):
    processor = AutoProcessor.from_pretrained(folder_of("siglip"))
    config = make_config("siglip", processor.tokenizer)
    config.text_config.vocab_size = 40
    encoder = Encoder(transformers.SiglipModel(config), processor)
    with pytest.raises(ConfigError, match="a siglip_text_model with 40 tokens: its tokenizer gives token .*of another model"):
        encoder.encode_texts(CAPTIONS)


# What prepares texts: the family, its tokenizer, and whether it makes letters small.
TEXTS = {
    "siglip": ("siglip", make_tokenizer, False),
    "siglip with the tokenizer of SigLIP 2": ("siglip", lambda name: make_gemma_tokenizer(CAPTIONS * 5), True),
    "siglip2": ("siglip2", make_tokenizer, True),
}


@pytest.mark.parametrize("row", TEXTS)
def test_texts_of_sigmoid_families_are_padded_to_their_context_and_small_where_the_tokenizer_says_so(row, folder_of):
    name, make, makes_small = TEXTS[row]
    model, processor = AutoModel.from_pretrained(folder_of(name)), AutoProcessor.from_pretrained(folder_of(name))
    processor.tokenizer = make(name)
    encoder = Encoder(model, processor)
    assert encoder.describe()["texts"] == {"padding": "max_length", "max_length": 64, "lower_case": makes_small}
    found = encoder.encode_texts(CAPTIONS)
    options = {"truncation": True, "max_length": 64, "return_tensors": "pt"}
    with torch.no_grad():
        features = [
            F.normalize(
                model.eval().get_text_features(**processor.tokenizer(CAPTIONS, padding=padding, **options)).pooler_output
            )
            for padding in ("max_length", "longest")
        ]
    torch.testing.assert_close(found, features[0], rtol=1e-5, atol=1e-6)
    assert (found - features[1]).norm(dim=1).max() > 1e-3
    large = encoder.encode_texts([caption.upper() for caption in CAPTIONS])
    assert torch.equal(large, found) == makes_small


def test_a_tokenizer_that_passes_over_its_lower_casing_is_said_and_recorded(folder_of, tmp_path, caplog):
    """As Transformers reads SigLIP 2 of one resolution."""
    processor = AutoProcessor.from_pretrained(folder_of("siglip"))
    model = json.loads(make_gemma_tokenizer(CAPTIONS * 5).backend_tokenizer.to_str())["model"]
    options = {"padding_side": "right", "model_max_length": 64, "do_lower_case": True, "model_input_names": ["input_ids"]}
    merges = [tuple(merge) for merge in model["merges"]]
    processor.tokenizer = transformers.GemmaTokenizer(vocab=model["vocab"], merges=merges, **options)
    AutoModel.from_pretrained(folder_of("siglip")).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert type(encoder.processor.tokenizer) is transformers.GemmaTokenizer
    assert "GemmaTokenizer: keeps capital letters, although its do_lower_case is set" in caplog.text
    assert encoder.describe()["texts"]["lower_case"] is False
    caplog.clear()
    load_encoder(str(folder_of("siglip2")))
    load_encoder(str(folder_of("clip")))
    assert "capital" not in caplog.text


def test_pictures_of_naflex_keep_their_aspect_ratio_within_the_budget_of_patches(folder_of):
    encoder = load_encoder(str(folder_of("siglip2")))
    about = encoder.describe()
    assert (about["max_num_patches"], about["resize"], about["crop"], encoder.image_size) == (16, None, None, SIDE)
    squashed = ImageSet([(picture.resize((32, 32)), 0) for picture in PICTURES])
    found = encoder.encode_images(images()).features
    is_square = torch.tensor([picture.width == picture.height for picture in PICTURES])
    differs = (encoder.encode_images(squashed).features - found).norm(dim=1) > 1e-3
    assert torch.equal(differs, ~is_square)
    encoder.processor.image_processor.max_num_patches = 9
    smaller = Encoder(encoder.model, encoder.processor)
    assert (smaller.describe()["max_num_patches"], smaller.image_size) == (9, 24)
    assert (smaller.encode_images(images()).features - found).norm(dim=1).min() > 1e-3


# What each family's record says beside the weights.
RECORDS = {
    "clip": ("CLIP", "longest", {"shortest_edge": 32}, {"height": 32, "width": 32}, None),
    "chinese_clip": ("ChineseCLIP", "longest", {"shortest_edge": 32}, {"height": 32, "width": 32}, None),
    "siglip": ("SigLIP and SigLIP 2", "max_length", {"height": 32, "width": 32}, None, None),
    "siglip2": ("SigLIP 2 NaFlex", "max_length", None, None, 16),
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_command_evaluates_a_folder_and_records_what_its_family_does(name, folder_of, tmp_path, capsys):
    for number, picture in enumerate(PICTURES):
        place = tmp_path / "photos" / LABELS[number] / "1.png"
        place.parent.mkdir(parents=True)
        picture.save(place)
    command = ["evaluate", "--model", str(folder_of(name)), "--data", str(tmp_path / "photos")]
    command += ["--task", "zero_shot_classification", "--output", str(tmp_path / "eval.json")]
    assert main(command) == 0, capsys.readouterr().err
    (record,) = json.loads((tmp_path / "eval.json").read_text())["results"].values()
    said = record["model_family"], record["texts"]["padding"], record["resize"], record["crop"], record["max_num_patches"]
    assert said == RECORDS[name]
    assert main(command) == 0
    assert "as it stands in the output file" in capsys.readouterr().out


# Models that are no dual encoders of a family, each with words of its message.
def _classifier(folder: Path) -> None:
    config = make_config("siglip", make_tokenizer("siglip"))
    transformers.SiglipForImageClassification(config).save_pretrained(folder)


REFUSED = {
    "blip": (transformers.BlipConfig, "is a 'blip', no image and text encoder of a known family; known are CLIP (clip), "),
    "owlvit": (transformers.OwlViTConfig, "is a 'owlvit', no image and text encoder"),
    "vit": (transformers.ViTConfig, "is a 'vit', no image and text encoder"),
    "bert": (transformers.BertConfig, "is a 'bert', no image and text encoder"),
    "xclip": (transformers.XCLIPConfig, "is a 'xclip', no image and text encoder"),
    "tower of CLIP": (transformers.CLIPVisionConfig, "is a 'clip_vision_model', no image and text encoder"),
    "tower of SigLIP": (transformers.SiglipVisionConfig, "is a 'siglip_vision_model', no image and text encoder"),
    "classifier": (None, "it is no whole SiglipModel"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_is_of_no_family_is_refused_in_one_line_before_anything_is_read(row, tmp_path, capsys):
    config, message = REFUSED[row]
    _classifier(tmp_path / "model") if config is None else config().save_pretrained(tmp_path / "model")  # without weights
    capsys.readouterr()
    command = ["evaluate", "--model", str(tmp_path / "model"), "--suite", "scenes", "--output", str(tmp_path / "eval.json")]
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'model'}: ")
    assert message in error
    assert not (tmp_path / "eval.json").exists()


def test_a_model_of_no_family_is_no_encoder(folder_of):
    processor = AutoProcessor.from_pretrained(folder_of("siglip"))
    config = make_config("siglip", processor.tokenizer)
    models = [transformers.BertModel(transformers.BertConfig(hidden_size=12, num_hidden_layers=1))]
    models += [transformers.SiglipVisionModel(config.vision_config), transformers.SiglipForImageClassification(config)]
    for model in models:
        with pytest.raises(ConfigError, match=f"a {type(model).__name__} is no image and text encoder of a known family"):
            Encoder(model, processor)
