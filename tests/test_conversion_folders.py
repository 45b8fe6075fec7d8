"""Proves that a folder of open_clip, and a file beside open_clip_config.json, become the model that the file says: its
architecture, preparation of pictures and tokenizer, as open_clip has them, or are refused in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import random_picture
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from hf_maskclip.cli import main
from hf_maskclip.conversion.open_clip import convert_open_clip_checkpoint, export_to_open_clip
from hf_maskclip.conversion.open_clip_architecture import config_of_model_cfg, open_clip_config
from hf_maskclip.conversion.open_clip_tokenizer import clip_tokenizer, find_vocabulary
from hf_maskclip.conversion.tokens import misfit

HALVES = (0.5, 0.5, 0.5)
OPENAI_MEAN = pytest.approx((0.48145466, 0.4578275, 0.40821073))
# Of preprocess_cfg: what stands there, and what the image processor has.
PREPARATIONS = {
    "nothing": ({}, {"image_mean": OPENAI_MEAN, "resample": 3, "do_center_crop": True, "size": {"shortest_edge": 32}}),
    "nulls": ({"mean": None, "interpolation": None}, {"image_mean": OPENAI_MEAN, "resample": 3}),
    "inception": ({"mean": HALVES, "std": HALVES}, {"image_mean": HALVES, "image_std": HALVES, "do_center_crop": True}),
    "one number": ({"mean": 0.5, "std": 0.25}, {"image_mean": HALVES, "image_std": (0.25,) * 3}),
    "bilinear": ({"interpolation": "bilinear", "resize_mode": "shortest"}, {"resample": 2, "size": {"shortest_edge": 32}}),
    "random": ({"interpolation": "random"}, {"resample": 3}),
    "squash": (
        {"resize_mode": "squash", "mean": HALVES, "fill_color": 0, "size": [32, 32]},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False, "image_mean": HALVES},
    ),
}
REFUSED = {
    "preprocess_cfg": {
        "resize_mode='longest': pads pictures to a square": {"resize_mode": "longest", "fill_color": 127},
        "resize_mode='fit': must be": {"resize_mode": "fit"},
        "interpolation='lanczos': must be": {"interpolation": "lanczos"},
        "std=[0.5, 0.5]: must be": {"std": [0.5, 0.5]},
        "mean='imagenet': must be": {"mean": "imagenet"},
    },
    "vision_cfg": {
        "timm_model_name='convnext_base': a CLIP": {"timm_model_name": "convnext_base"},
        "layers=[3, 4, 6, 3]: a CLIP": {"layers": [3, 4, 6, 3]},
        "pool_type='avg': a CLIP": {"pool_type": "avg"},
        "no_ln_pre=True: a CLIP": {"no_ln_pre": True},
        "image_size=[32, 48]: a CLIP": {"image_size": [32, 48]},
        "ls_init_value=0.0001: a CLIP": {"ls_init_value": 1e-4},
        "norm_kwargs={'eps': 1e-06, 'bias': False}: a CLIP": {"norm_kwargs": {"eps": 1e-6, "bias": False}},
        "act_kwargs={'approximate': 'tanh'}: Transformers": {"act_kwargs": {"approximate": "tanh"}},  # beside quick_gelu
    },
    "text_cfg": {
        "hf_model_name='roberta-base': a CLIP": {"hf_model_name": "roberta-base"},
        "pool_type='last': a CLIP": {"pool_type": "last"},
        "no_causal_mask=True: a CLIP": {"no_causal_mask": True},
        "tokenizer_kwargs={'clean': 'canonicalize'}: a CLIP": {"tokenizer_kwargs": {"clean": "canonicalize"}},
        "eos_id=2: of this end token": {"pool_type": "eos", "eos_id": 2},
        "texts are pooled at the token 5": {"pool_type": "eos", "eos_id": 5},
    },
}


@pytest.fixture
def folder(make_clip, processor, tmp_path):
    """A function that writes a folder of open_clip with changes of its configuration: its path, and the model."""

    def make(preprocess_cfg=None, **parts):
        model = make_clip().eval()
        export_to_open_clip(model, tmp_path / "there", processor)
        file = tmp_path / "there" / "open_clip_config.json"
        config = json.loads(file.read_text())
        config["preprocess_cfg"] = config["preprocess_cfg"] if preprocess_cfg is None else preprocess_cfg
        for part, changes in parts.items():
            config["model_cfg"][part] |= changes
        file.write_text(json.dumps(config))
        return tmp_path / "there", model

    return make


@pytest.mark.parametrize("name", PREPARATIONS)
def test_the_file_gives_architecture_pictures_and_tokenizer(name, folder, tmp_path, tokenizer):
    preparation, expected = PREPARATIONS[name]
    there, model = folder(preparation)
    assert main(["convert", str(there), str(tmp_path / "back")]) == 0
    back = CLIPModel.from_pretrained(tmp_path / "back")
    assert all(torch.equal(weight, model.state_dict()[key]) for key, weight in back.state_dict().items())
    assert back.config.text_config.hidden_act == model.config.text_config.hidden_act == "quick_gelu"
    found = CLIPProcessor.from_pretrained(tmp_path / "back")
    prepared = found.image_processor.to_dict()
    assert {key: prepared[key] for key in expected if key != "size"} == {k: v for k, v in expected.items() if k != "size"}
    assert {k: v for k, v in dict(found.image_processor.size).items() if v} == expected.get("size", {"shortest_edge": 32})
    assert found.tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["inception", "bilinear", "squash"])
def test_there_and_back_the_preparation_is_the_same(name, folder, tmp_path):
    there, _ = folder(PREPARATIONS[name][0])
    assert main(["convert", str(there), str(tmp_path / "plain")]) == 0
    assert main(["convert", str(tmp_path / "plain"), str(tmp_path / "again"), "--to", "open_clip"]) == 0
    before, after = (json.loads((path / "open_clip_config.json").read_text()) for path in (there, tmp_path / "again"))
    kept = {key: value for key, value in before["preprocess_cfg"].items() if key != "fill_color"}
    assert kept.items() <= after["preprocess_cfg"].items()
    assert before["model_cfg"] == after["model_cfg"]


@pytest.mark.parametrize(("part", "words"), [(part, words) for part, rows in REFUSED.items() for words in rows])
def test_what_a_clip_of_transformers_cannot_be_is_one_line(part, words, folder, tmp_path, capsys):
    changes = REFUSED[part][words]
    there, _ = folder(changes) if part == "preprocess_cfg" else folder(**{part: changes})
    assert main(["convert", str(there), str(tmp_path / "back")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "back").exists()


def test_a_file_beside_the_configuration_and_a_name_that_agrees_or_contradicts(folder, tmp_path, capsys):
    there, model = folder({"mean": HALVES})
    torch.save({"state_dict": {f"module.{k}": v for k, v in _weights(there).items()}}, there / "epoch_3.pt")
    assert main(["convert", str(there / "epoch_3.pt"), str(tmp_path / "back")]) == 0
    assert CLIPProcessor.from_pretrained(tmp_path / "back").image_processor.image_mean == HALVES
    assert main(["convert", str(there), str(tmp_path / "other"), "--open_clip_model", "ViT-B-16"]) == 2
    error = capsys.readouterr().err
    assert "--open_clip_model ViT-B-16: embed_dim is 512" in error
    assert "open_clip_config.json says 24" in error
    (there / "open_clip_model.safetensors").unlink()
    shutil.copy(there / "epoch_3.pt", there / "epoch_4.pt")
    assert main(["convert", str(there), str(tmp_path / "other")]) == 2
    assert "give one file of weights; it has epoch_3.pt, epoch_4.pt" in capsys.readouterr().err
    (there / "open_clip_config.json").write_text("[]")
    assert main(["convert", str(there / "epoch_3.pt"), str(tmp_path / "other")]) == 2
    assert "is no configuration of open_clip" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "back"), str(tmp_path / "other")]) == 2
    assert "is a model of Transformers, for open_clip by --to open_clip" in capsys.readouterr().err


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "open_clip_model.safetensors")


def test_a_size_that_is_not_the_models_is_said_and_weights_of_another_size_are_refused(folder, tmp_path, capsys):
    there, _ = folder({"size": 48})
    assert main(["convert", str(there), str(tmp_path / "back")]) == 0
    assert "pictures have 32 pixels, the model's size, which open_clip takes too: not 48" in capsys.readouterr().out
    there, _ = folder(vision_cfg={"image_size": 64})
    assert main(["convert", str(there), str(tmp_path / "other")]) == 2
    assert "visual.positional_embedding is (17, 32), open_clip_config.json has (65, 32)" in capsys.readouterr().err


def test_norms_and_activations_go_both_ways(config_parts):
    parts = config_parts()
    parts["text_config"] |= {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "intermediate_size": 93}
    parts["vision_config"] |= {"hidden_act": "gelu"}
    config = CLIPConfig(**parts)
    there = open_clip_config(config)
    ids = {key: getattr(config.text_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    back = config_of_model_cfg(there, ids)
    for tower in ("text_config", "vision_config"):
        assert getattr(back, tower).to_dict() == getattr(config, tower).to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", PREPARATIONS)
def test_pixels_and_features_are_open_clips(name, folder, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is of the test extra")
    there, _ = folder(PREPARATIONS[name][0])
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{there}")
    tokenize, texts = open_clip.get_tokenizer(f"local-dir:{there}"), ["a red ball on grass", "two blue fish"]
    assert main(["convert", str(there), str(tmp_path / "back")]) == 0
    model, image_processor = (
        CLIPModel.from_pretrained(tmp_path / "back"),
        CLIPImageProcessorPil.from_pretrained(tmp_path / "back"),
    )
    pictures = [random_picture(n, size) for n, size in enumerate([(60, 60), (48, 32), (32, 64)])]
    pixels = image_processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, torch.stack([transform(picture) for picture in pictures]), rtol=0, atol=1e-6)
    ids = AutoTokenizer.from_pretrained(tmp_path / "back")(texts, padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        images, found = model.get_image_features(pixels).pooler_output, model.get_text_features(ids).pooler_output
        torch.testing.assert_close(images, theirs.eval().encode_image(pixels), rtol=0, atol=1e-5)
        torch.testing.assert_close(found, theirs.encode_text(tokenize(texts)), rtol=0, atol=1e-5)
    assert images.std() > 0.01


# ------------------------------------------------------------------------------------------------------- tokenizers

TEXTS = [
    "a photo of a cat",
    "A  Red\tBALL!",
    "it's 12,345 dogs'll",
    "Ünïcode 漢字 🙂",
    "",
    "x" * 40,
    "semi-colon; (a_b) #tag",
    "naïve café\n",
]


def test_clips_own_tokenizer_has_open_clips_ids():
    open_clip = pytest.importorskip("open_clip", reason="open_clip is of the test extra")
    assert find_vocabulary() is not None
    tokenizer, theirs = clip_tokenizer(), open_clip.SimpleTokenizer()
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == [theirs.sot_token_id, *theirs.encode(text), theirs.eot_token_id], text
    assert len(tokenizer) == theirs.vocab_size == 49408
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (49407, 77)


def test_without_open_clip_and_hub_one_line_names_the_option(make_clip, monkeypatch, folder, tmp_path, capsys):
    there, _ = folder()
    weights = (there / "open_clip_model.safetensors").rename(tmp_path / "weights.safetensors")
    monkeypatch.setattr("hf_maskclip.conversion.open_clip_tokenizer.find_spec", lambda name: None)
    asked = []

    def no_answer(repo_id, file):
        asked.append(repo_id)
        raise ConnectionError("no network")

    monkeypatch.setattr("hf_maskclip.model_folder.file_exists", no_answer)
    assert main(["convert", str(weights), str(tmp_path / "back"), "--open_clip_model", "ViT-B-32"]) == 2
    error = capsys.readouterr().err
    assert "--tokenizer: CLIP's own is not to be had" in error
    assert "name the folder of a tokenizer by --tokenizer, or install open_clip_torch" in error
    assert error.count("\n") == 1
    assert asked == ["openai/clip-vit-base-patch32"]  # once


# Vocabulary of the text tower beside the tokenizer's, end token that it pools at beside the tokenizer's: why it is refused.
FITS = {
    (0, 0): "",
    (64, 0): "",  # padded
    (-1, 0): "its highest id is",
    (64, -1): "pools at another token",
}


@pytest.mark.parametrize("more", FITS)
def test_a_padded_vocabulary_takes_the_tokenizer_and_a_smaller_one_does_not(more, tokenizer):
    end = tokenizer.eos_token_id
    reason = misfit(tokenizer, len(tokenizer) + more[0], end + more[1])
    assert (FITS[more] in reason) if FITS[more] else reason == ""
    assert misfit(tokenizer, len(tokenizer) + 64, 2) == ""  # at the highest id, which is the end token
    extended = CLIPTokenizer(vocab=dict(tokenizer.get_vocab()), merges=[])
    extended.add_tokens(["<mask>"])
    assert "not at" in misfit(extended, len(extended), 2)


@pytest.mark.parametrize("pool_type", ["eos", "argmax"])
def test_a_padded_vocabulary_is_converted(pool_type, make_clip, processor, folder, tmp_path):
    there, model = folder(text_cfg={"vocab_size": len(processor.tokenizer) + 24, "pool_type": pool_type})
    weights = _weights(there)
    rows = torch.cat([weights["token_embedding.weight"], torch.zeros(24, 32)])
    torch.save(
        weights | {"token_embedding.weight": rows, "logit_scale": weights["logit_scale"].reshape(1)}, there / "padded.pt"
    )
    assert main(["convert", str(there / "padded.pt"), str(tmp_path / "back")]) == 0
    back, info = CLIPModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"]
    ids = torch.as_tensor(np.stack([processor.tokenizer(["a red ball"])["input_ids"][0]]))
    features = model.eval().get_text_features(ids).pooler_output
    for other in (back, convert_open_clip_checkpoint(there / "padded.pt").model):  # in Python, without a tokenizer's ids
        weights = other.state_dict()
        for name, weight in model.state_dict().items():
            same = weights[name]
            assert torch.equal(same[: len(weight)] if name.endswith("token_embedding.weight") else same, weight), name
        found = other.eval().get_text_features(ids).pooler_output
        torch.testing.assert_close(found, features, rtol=0, atol=1e-6)  # some CPUs' sums depend on where memory begins


def test_the_python_function_reads_a_folder(folder):
    there, model = folder({"mean": HALVES})
    converted = convert_open_clip_checkpoint(there)
    assert converted.extra == []
    assert converted.image_processor.image_mean == HALVES
    assert converted.end_token == model.config.text_config.eos_token_id
