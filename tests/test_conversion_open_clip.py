"""Proves that weights go to open_clip and come back unchanged, that features agree with open_clip's, and that a checkpoint that
does not fit, or holds other things than weights, is refused by name."""

import json
import pickle

import pytest
import torch
from helpers import random_picture
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from hf_maskclip.conversion.checkpoint import read_checkpoint
from hf_maskclip.conversion.open_clip import convert_open_clip_checkpoint, export_to_open_clip
from hf_maskclip.conversion.open_clip_architecture import MODELS, clip_config
from hf_maskclip.conversion.open_clip_weights import from_open_clip_weights, to_open_clip_weights


@pytest.fixture(
    params=["ViT-B-16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ViT-B-32-quickgelu", "ViT-L-14"))]
)
def shallow_model(request, monkeypatch, tokenizer):
    """A model of open_clip with two layers a tower and the test's vocabulary: its name, and a CLIPModel with random weights."""
    name = request.param.removesuffix("-quickgelu")
    cfg = json.loads(json.dumps(MODELS[name]))
    cfg["vision_cfg"]["layers"] = cfg["text_cfg"]["layers"] = 2
    cfg["text_cfg"]["vocab_size"] = len(tokenizer)
    monkeypatch.setitem(MODELS, name, cfg)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = CLIPModel(clip_config(request.param, ids)).eval()
    for parameter in model.parameters():  # zeros and ones would hide weights that are swapped
        parameter.data += 0.02 * torch.randn_like(parameter)
    return request.param, model


@pytest.fixture
def pil_processor(tokenizer):
    return CLIPProcessor(CLIPImageProcessorPil(), tokenizer)


def test_weights_return_unchanged(shallow_model):
    _, model = shallow_model
    weights = model.state_dict()
    there = to_open_clip_weights(weights)
    assert len(there) < len(weights)
    assert there["visual.proj"].shape == weights["visual_projection.weight"].t().shape
    back = from_open_clip_weights(there, list(weights))
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_features_agree_with_open_clips_both_ways(shallow_model, pil_processor, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is of the test extra")
    name, model = shallow_model
    export_to_open_clip(model, tmp_path / "there", pil_processor)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'there'}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'there'}")
    theirs.eval()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "epoch_3.pt")
    token_ids = {key: getattr(pil_processor.tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    back = convert_open_clip_checkpoint(tmp_path / "epoch_3.pt", name, token_ids)
    assert back.extra == []

    pictures, texts = [random_picture(n, (300, 260)) for n in range(3)], ["a red ball on grass", "two blue fish"]
    inputs = pil_processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    pixels = torch.stack([transform(picture) for picture in pictures])
    torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = theirs.encode_image(pixels), theirs.encode_text(tokenize(texts))
        for ours in (model, back.model.eval()):
            images = ours.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
            found = ours.get_text_features(input_ids=inputs["input_ids"]).pooler_output
            torch.testing.assert_close(images, expected[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(found, expected[1], rtol=0, atol=1e-4)
    assert expected[0].std() > 0.1  # features that differ by less than the tolerance would prove nothing


@pytest.mark.slow
def test_the_sizes_are_open_clips():
    open_clip = pytest.importorskip("open_clip", reason="open_clip is of the test extra")
    assert {name: open_clip.get_model_config(name) for name in MODELS} == MODELS


def test_what_does_not_fit_is_named(shallow_model, tmp_path):
    name, model = shallow_model
    weights = to_open_clip_weights(model.state_dict())
    other = "ViT-B-32" if name == "ViT-B-16" else "ViT-B-16"
    torch.save(weights, tmp_path / "weights.pt")
    message = rf"weights.pt: does not fit {other}: .*, {other} has .* more\)"
    with pytest.raises(ValueError, match=message):
        convert_open_clip_checkpoint(tmp_path / "weights.pt", other)
    third = {key.replace("resblocks.1.", "resblocks.2."): weight for key, weight in weights.items()}
    torch.save(weights | third, tmp_path / "deep.pt")
    with pytest.raises(ValueError, match=r"resblocks.2.attn.in_proj_weight is of a layer that .* does not have"):
        convert_open_clip_checkpoint(tmp_path / "deep.pt", name)
    with pytest.raises(ValueError, match="open_clip model 'RN50': must be one of ViT-S-32"):
        convert_open_clip_checkpoint(tmp_path / "weights.pt", "RN50")
    torch.save({name: w for name, w in weights.items() if name != "visual.proj"}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match="visual.proj is missing"):
        convert_open_clip_checkpoint(tmp_path / "short.pt", name)


def test_keys_of_forks_are_reported_and_half_precision_becomes_float32(shallow_model, tmp_path):
    name, model = shallow_model
    weights = {key: weight.half() for key, weight in to_open_clip_weights(model.state_dict()).items()}
    torch.save({"state_dict": weights | {"visual.gs_block.weight": torch.zeros(3)}}, tmp_path / "fork.pt")
    converted = convert_open_clip_checkpoint(tmp_path / "fork.pt", name)
    assert converted.extra == ["visual.gs_block.weight"]
    assert converted.model.dtype == torch.float32


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_a_checkpoint_is_never_unpickled(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": Harmful()}, tmp_path / "harmful.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Harmful()))
    (tmp_path / "text.pt").write_text("no checkpoint")
    for file in ("harmful.pt", "old.pt", "text.pt"):
        with pytest.raises(ValueError, match=f"{file}: holds more than weights, or is no checkpoint"):
            read_checkpoint(tmp_path / file)
    torch.save({"state_dict": {"a": 1}}, tmp_path / "numbers.pt")
    with pytest.raises(ValueError, match="numbers.pt: holds no weights"):
        read_checkpoint(tmp_path / "numbers.pt")


def test_an_activation_that_open_clip_lacks_is_refused(shallow_model, pil_processor, tmp_path):
    model = shallow_model[1]
    model.config.text_config.hidden_act = "relu"
    with pytest.raises(ValueError, match="open_clip has gelu, gelu_pytorch_tanh, or quick_gelu, for both towers"):
        export_to_open_clip(model, tmp_path, pil_processor)
