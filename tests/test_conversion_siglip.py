"""Proves that a file or folder of open_clip's SigLIP becomes a plain `SiglipModel` with its pictures and texts, and goes back
unchanged; and that what Transformers has not of it is refused in one line."""

import json

import pytest
import torch
from helpers import random_picture
from safetensors.torch import load_file
from tiny_siglip import LENGTH, NAME, WIDTH, know_tiny_siglip, letters_tokenizer, write_folder
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    CLIPImageProcessor,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    pipeline,
)

from hf_maskclip.cli import main
from hf_maskclip.conversion.open_clip import convert_open_clip_checkpoint
from hf_maskclip.conversion.open_clip_siglip import GELU, SQUASHED, TANH, named_model_cfg

HALVES = [0.5, 0.5, 0.5]


@pytest.fixture
def tokenizer():
    return letters_tokenizer()


@pytest.fixture(params=[GELU, TANH])
def model_cfg(request, monkeypatch):
    return know_tiny_siglip(monkeypatch, request.param)


@pytest.fixture
def folder(model_cfg, tokenizer, tmp_path):
    """A function that writes a folder of open_clip with changes of its configuration: its path, and the weights in it."""

    def make(preprocess_cfg=SQUASHED, **changes):
        return tmp_path / "there", write_folder(tmp_path / "there", model_cfg, tokenizer, preprocess_cfg, **changes)

    return make


def test_there_and_back_names_tensors_and_configuration_are_the_same(folder, tmp_path, model_cfg):
    there, weights = folder()
    assert {"visual.trunk.attn_pool.kv.weight", "text.text_projection.bias", "logit_bias"} <= weights.keys()
    assert main(["convert", str(there), str(tmp_path / "plain")]) == 0
    assert main(["convert", str(tmp_path / "plain"), str(tmp_path / "back"), "--to", "open_clip"]) == 0
    back = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    written = json.loads((tmp_path / "back" / "open_clip_config.json").read_text())
    model_cfg["text_cfg"]["hf_tokenizer_name"] = "local"
    mlp_ratio = written["model_cfg"]["text_cfg"].pop("mlp_ratio"), model_cfg["text_cfg"].pop("mlp_ratio")
    assert [int(24 * ratio) for ratio in mlp_ratio] == [89, 89]
    assert written["model_cfg"] == model_cfg
    assert written["preprocess_cfg"] == SQUASHED | {"size": [32, 32]}


def test_the_folder_is_a_plain_siglip_and_its_pipeline_gives_its_scores(folder, tmp_path, model_cfg, capsys):
    there, _ = folder()
    assert main(["convert", str(there), str(tmp_path / "plain")]) == 0
    assert capsys.readouterr().out.startswith("written to")
    model, info = AutoModel.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert type(model) is SiglipModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    vision, text = model.config.vision_config, model.config.text_config
    activation = TANH if "act_kwargs" in model_cfg["text_cfg"] else GELU
    assert (vision.hidden_act, vision.layer_norm_eps, text.hidden_act, text.layer_norm_eps) == (activation, 1e-6) * 2
    assert (text.pad_token_id, text.eos_token_id, text.projection_size) == (1, 1, WIDTH)
    processor = AutoProcessor.from_pretrained(tmp_path / "plain")
    assert type(processor) is SiglipProcessor
    labels, picture = ["red ball", "blue fish"], random_picture(1)
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "plain"))
    found = classify(picture, candidate_labels=labels)
    texts = [f"This is a photo of {label}." for label in labels]
    inputs = processor(images=picture, text=texts, padding="max_length", truncation=True, return_tensors="pt")
    assert inputs.keys() == {"pixel_values", "input_ids"}  # no mask: the text tower attends to the filling
    assert inputs["input_ids"].shape == (2, LENGTH)
    with torch.no_grad():
        scores = model(**inputs).logits_per_image.sigmoid()[0].tolist()
    assert {row["label"]: row["score"] for row in found} == pytest.approx(dict(zip(labels, scores, strict=True)), abs=1e-6)


PREPARATIONS = {
    "squash": ({"resize_mode": "squash", "mean": HALVES, "std": HALVES}, SiglipImageProcessor, {"height": 32, "width": 32}),
    "silent": ({}, CLIPImageProcessor, {"shortest_edge": 32}),  # open_clip's default crops
    "bilinear": ({"resize_mode": "squash", "interpolation": "bilinear"}, SiglipImageProcessor, {"height": 32, "width": 32}),
}


@pytest.mark.parametrize("name", PREPARATIONS)
def test_pictures_are_prepared_as_the_file_says(name, folder, tmp_path):
    preprocess_cfg, kind, size = PREPARATIONS[name]
    there, _ = folder(preprocess_cfg)
    assert main(["convert", str(there), str(tmp_path / "plain")]) == 0
    found = AutoProcessor.from_pretrained(tmp_path / "plain").image_processor
    assert type(found) is kind
    assert {key: value for key, value in dict(found.size).items() if value} == size
    assert found.resample == (2 if name == "bilinear" else 3)
    assert found.image_mean == pytest.approx(preprocess_cfg.get("mean", (0.48145466, 0.4578275, 0.40821073)))
    old = json.loads((tmp_path / "plain" / "preprocessor_config.json").read_text())  # of Transformers 4
    assert old["image_processor_type"] == kind.__name__


def test_of_weights_alone_the_name_gives_the_rest_and_the_weights_their_sizes(folder, tokenizer, tmp_path, capsys):
    there, weights = folder()
    weights |= {"visual.trunk.pos_embed": torch.randn(1, 25, WIDTH), "text.positional_embedding": torch.randn(8, 24)}
    torch.save({"state_dict": {f"module.{name}": weight.half() for name, weight in weights.items()}}, tmp_path / "epoch_1.pt")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    convert = ["convert", str(tmp_path / "epoch_1.pt"), str(tmp_path / "plain"), "--open_clip_model"]
    assert main([*convert, "vit_t/8-siglip", "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    said = capsys.readouterr().out
    assert "as is SigLIP's default, squashed and with mean and std 0.5: no open_clip_config" in said
    assert "texts have 8 tokens, Transformers' pipeline fills them to 64: use" in said
    config = AutoConfig.from_pretrained(tmp_path / "plain")
    assert (config.vision_config.image_size, config.text_config.max_position_embeddings) == (40, 8)
    processor = AutoProcessor.from_pretrained(tmp_path / "plain")
    assert dict(processor.image_processor.size)["height"] == 40
    assert processor.image_processor.image_std == tuple(HALVES)
    assert main([*convert, NAME]) == 2  # without a tokenizer
    error = capsys.readouterr().err
    assert "--tokenizer: the model's own is not to be had (org/tiny: no such folder, nor kept here of the Hub" in error
    assert error.endswith("name the folder of org/tiny by --tokenizer\n")


def test_a_name_must_not_contradict_the_file(folder, tmp_path, capsys):
    there, _ = folder()
    convert = ["convert", str(there), str(tmp_path / "plain"), "--open_clip_model"]
    for name, words in {"ViT-B-16-SigLIP": "embed_dim is 768", "ViT-B-16": "is a CLIP", "RN50": "or a SigLIP, such as"}.items():
        assert main([*convert, name]) == 2
        assert words in capsys.readouterr().err
    assert main([*convert, NAME]) == 0


# Part of model_cfg, its change, and the words of the refusal.
REFUSED = [
    (
        "vision_cfg",
        {"timm_model_name": "naflexvit_base_patch16_siglip"},
        "naflexvit_base_patch16_siglip': must be one of",
    ),
    (
        "vision_cfg",
        {"timm_model_name": "vit_base_patch16_siglip_gap_224"},
        "siglip_gap_224': must be one of vit_base_patch32",
    ),
    ("vision_cfg", {"timm_pool": "avg"}, "vision_cfg.timm_pool='avg': a SigLIP of Transformers has 'map' there"),
    ("vision_cfg", {"timm_proj": "linear"}, "vision_cfg.timm_proj='linear': a SigLIP of Transformers has 'none' there"),
    ("vision_cfg", {"image_size": [32, 48]}, "vision_cfg.image_size=[32, 48]: must be one whole number"),
    ("vision_cfg", {"image_size": 64}, "visual.trunk.pos_embed is (1, 16, 32), open_clip_config.json has (1, 64, 32)"),
    ("text_cfg", {"hf_model_name": "facebook/nllb-200"}, "hf_model_name='facebook/nllb-200': a SigLIP of Transformers has no"),
    ("text_cfg", {"hf_model_name": "org/nllb", "no_causal_mask": None}, "hf_model_name='org/nllb': a SigLIP of Transformers"),
    ("text_cfg", {"proj_type": "none"}, "text_cfg.proj_type='none': a SigLIP of Transformers has 'linear' there"),
    ("text_cfg", {"proj_bias": False}, "text_cfg.proj_bias=False: a SigLIP of Transformers has True there"),
    ("text_cfg", {"pool_type": "argmax"}, "text_cfg.pool_type='argmax': a SigLIP of Transformers has 'last' there"),
    ("text_cfg", {"no_causal_mask": False}, "text_cfg.no_causal_mask=False: a SigLIP of Transformers has True there"),
    ("text_cfg", {"embed_cls": True}, "text_cfg.embed_cls=True: a SigLIP of Transformers has no such part"),
    ("text_cfg", {"norm_kwargs": {"eps": 1e-6, "bias": False}}, "text_cfg.norm_kwargs={'eps': 1e-06, 'bias': False}: must"),
    ("text_cfg", {"act_kwargs": {"approximate": "none"}}, "text_cfg.act_kwargs={'approximate': 'none'}: must be none, or"),
    (
        "text_cfg",
        {"tokenizer_kwargs": {"clean": "all"}},
        "{'clean': 'all'}: must be none, or clean: canonicalize, lower",
    ),
    ("text_cfg", {"tokenizer_kwargs": {"strip_sep_token": True}}, "tokenizer_kwargs={'strip_sep_token': True}: must be none"),
    (
        "text_cfg",
        {"layers": 1},
        "transformer.resblocks.1.attn.in_proj_weight is of a layer that open_clip_config.json",
    ),
    ("text_cfg", {"vocab_size": 40}, "token_embedding.weight is"),
    ("embed_dim", 48, "model_cfg.embed_dim=48: must be 32, the width of vit_tiny"),
    ("quick_gelu", True, "model_cfg.quick_gelu=True: a SigLIP of Transformers has no such part"),
    ("multimodal_cfg", {"layers": 2}, "model_cfg.multimodal_cfg={'layers': 2}: a SigLIP of Transformers has no such part"),
]


@pytest.mark.parametrize("model_cfg", [GELU], indirect=True)
@pytest.mark.parametrize(("part", "change", "words"), REFUSED, ids=[words[:50] for *_, words in REFUSED])
def test_what_a_siglip_of_transformers_cannot_be_is_one_line(part, change, words, model_cfg, folder, tmp_path, capsys):
    there, _ = folder(**{part: change})
    assert main(["convert", str(there), str(tmp_path / "plain")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "plain").exists()


def test_the_python_function_reads_a_folder(folder, tokenizer):
    there, weights = folder()
    converted = convert_open_clip_checkpoint(there)
    assert type(converted.model) is SiglipModel
    assert torch.equal(converted.model.text_model.head.bias, weights["text.text_projection.bias"])
    assert (converted.end_token, converted.extra, converted.remarks) == (None, [], [])
    assert converted.model.config.text_config.pad_token_id == tokenizer.pad_token_id  # by default, of SigLIP


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP2-NaFlex", "ViT-SO400M-16-SigLIP-i18n-256", "nllb-clip-base-siglip"])
def test_a_name_that_is_no_fixed_siglip_lists_those_that_are(name):
    with pytest.raises(ValueError, match=f"open_clip model '{name}': of SigLIP it must be one of ViT-B-16-SigLIP, ViT-B-16-S"):
        named_model_cfg(name)
