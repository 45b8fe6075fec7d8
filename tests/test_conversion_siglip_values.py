"""Proves that a SigLIP has open_clip's own values in Transformers, and Transformers' in open_clip: pixels, tokens, features and
logits; that the tables of names are open_clip's and timm's; and what does not go to open_clip, or has not its tokenizer."""

import copy
import json

import pytest
import torch
from helpers import random_picture
from safetensors.torch import load_file
from tiny_siglip import LENGTH, TOWER, WIDTH, know_tiny_siglip, letters_tokenizer, random_siglip, write_folder
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipImageProcessor,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from hf_maskclip.cli import main
from hf_maskclip.conversion.open_clip_siglip import GELU, MODELS, PAD_TOKENS, TANH, TOWERS, config_of_model_cfg
from hf_maskclip.conversion.open_clip_siglip_weights import siglip_file_weights
from hf_maskclip.conversion.siglip_tokenizer import canonicalizes, siglip_tokenizer

TEXTS = ["a red ball", "A  Red_BALL!", "it's blue; (the fish)\n", "", "x" * 80]


@pytest.fixture
def tokenizer():
    return letters_tokenizer()


@pytest.fixture(params=[GELU, TANH])
def model_cfg(request, monkeypatch):
    return know_tiny_siglip(monkeypatch, request.param)


@pytest.fixture
def open_clip(model_cfg, monkeypatch):
    """open_clip, whose timm has the tiny picture tower, too."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is of the test extra")
    from timm.models import _registry
    from timm.models.vision_transformer import _create_vision_transformer

    def tiny(pretrained=False, **kwargs):
        act = {"act_layer": "gelu_tanh"} if TOWERS[TOWER][0].activation == TANH else {}
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
        form = {"class_token": False, "global_pool": "map"}
        return _create_vision_transformer(TOWER, pretrained=pretrained, **(sizes | act | form | kwargs))

    monkeypatch.setitem(_registry._model_entrypoints, TOWER, tiny)
    return open_clip


def assert_same_values(open_clip, there, plain, activation):
    """open_clip's model in one folder, and that of Transformers in another: pixels, tokens, features and logits."""
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{there}")
    theirs.eval()
    assert type(theirs.visual.trunk.attn_pool.mlp.act).__name__ == ("GELU" if activation == GELU else "GELUTanh")
    model, tokenize = SiglipModel.from_pretrained(plain), open_clip.get_tokenizer(f"local-dir:{there}")
    pictures = [random_picture(n, size) for n, size in enumerate([(60, 60), (48, 32), (32, 64), (33, 90)])]
    pixels = SiglipImageProcessorPil.from_pretrained(plain)(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, torch.stack([transform(picture) for picture in pictures]), rtol=0, atol=1e-6)
    tokens = AutoTokenizer.from_pretrained(plain)(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    assert tokens["input_ids"].tolist() == tokenize(TEXTS).tolist()
    with torch.no_grad():
        found = model(pixel_values=pixels, **tokens)
        images, texts = theirs.encode_image(pixels), theirs.encode_text(tokens["input_ids"])
        torch.testing.assert_close(found.vision_model_output.pooler_output, images, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.text_model_output.pooler_output, texts, rtol=0, atol=1e-5)
        logits = theirs.get_logits(pixels, tokens["input_ids"])[0]
    torch.testing.assert_close(found.logits_per_image, logits, rtol=0, atol=1e-5)
    for values in (images, texts, logits):
        assert values.std() > 0.1  # values that differ by less than the tolerance would prove nothing
    assert texts[0].sub(texts[2]).abs().max() > 0.01


@pytest.mark.slow
def test_open_clips_own_model_has_the_same_values_here(open_clip, model_cfg, tokenizer, tmp_path):
    there = tmp_path / "there"
    write_folder(there, model_cfg, tokenizer)
    torch.manual_seed(1)
    own = open_clip.model.CustomTextCLIP(**{key: value for key, value in model_cfg.items() if key != "custom_text"})
    for parameter in own.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save({"state_dict": own.state_dict()}, there / "open_clip_pytorch_model.bin")
    (there / "open_clip_model.safetensors").unlink()
    assert main(["convert", str(there), str(tmp_path / "plain")]) == 0
    assert_same_values(open_clip, there, tmp_path / "plain", TOWERS[TOWER][0].activation)


@pytest.mark.slow
def test_a_siglip_of_transformers_has_the_same_values_there(open_clip, model_cfg, tokenizer, tmp_path, capsys):
    model = random_siglip(config_of_model_cfg(model_cfg, {}), seed=2)
    fitted = siglip_tokenizer(tokenizer, "canonicalize", LENGTH)
    model.save_pretrained(tmp_path / "plain")
    size = {"height": 32, "width": 32}
    SiglipProcessor(SiglipImageProcessor(size=size), fitted).save_pretrained(tmp_path / "plain")
    assert main(["convert", str(tmp_path / "plain"), str(tmp_path / "there"), "--to", "open_clip"]) == 0
    assert capsys.readouterr().out.startswith("written to")  # nothing is other
    assert_same_values(open_clip, tmp_path / "there", tmp_path / "plain", TOWERS[TOWER][0].activation)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_names_sizes_and_weights_are_open_clips(name):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is of the test extra")
    assert open_clip.get_model_config(name) == MODELS[name]
    cfg = {key: value for key, value in copy.deepcopy(MODELS[name]).items() if key != "custom_text"}
    with torch.device("meta"):
        theirs = open_clip.model.CustomTextCLIP(**cfg)
        ours = SiglipModel(config_of_model_cfg(MODELS[name], {}))
    shapes = {key: tuple(weight.shape) for key, weight in siglip_file_weights(ours.state_dict()).items()}
    assert shapes == {key: tuple(weight.shape) for key, weight in theirs.state_dict().items()}
    tower, trunk = TOWERS[MODELS[name]["vision_cfg"]["timm_model_name"]][0], theirs.visual.trunk
    assert trunk.blocks[0].attn.num_heads == trunk.attn_pool.num_heads == tower.heads
    acts = {type(part.act).__name__ for part in (trunk.blocks[-1].mlp, trunk.attn_pool.mlp)}
    assert acts == {"GELU" if tower.activation == GELU else "GELUTanh"}
    assert {trunk.norm.eps, trunk.blocks[0].norm2.eps, trunk.attn_pool.norm.eps, theirs.text.ln_final.eps} == {1e-6}


# ---------------------------------------------------------------------------------------- what does not go to open_clip

# Part of the configuration, what is changed in it, and the words of the refusal, or of what is said.
NOT_THERE = {
    "width": (
        "vision_config",
        {"hidden_size": 48, "intermediate_size": 96},
        "are (48, 2, 2, 96, 8): timm, open_clip's source",
    ),
    "image size": ("vision_config", {"image_size": 40}, "vision_config.image_size=40: timm has such a tower for 32"),
    "norms": ("vision_config", {"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05: timm's SigLIP has True, 3, 1e-06"),
    "channels": ("vision_config", {"num_channels": 1}, "num_channels 1, layer_norm_eps 1e-06: timm's SigLIP has True, 3"),
    "projection": ("text_config", {"projection_size": 16}, "projection_size=16: must be 32, vision_config.hidden_size"),
    "activation": ("text_config", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu': open_clip has gelu and gelu_pyt"),
    "vocabulary": (
        "text_config",
        {"vocab_size": 30},
        "tokenizer does not fit: its highest id is 43, the text tower has 30",
    ),
}


@pytest.fixture
def plain(model_cfg, tokenizer, tmp_path):
    """A function that writes a `SiglipModel` with changes of its configuration: its folder."""

    def make(part="vision_config", changes=None, tokenizer=tokenizer):
        config = config_of_model_cfg(model_cfg, {})
        config = type(config).from_dict(config.to_dict() | {part: getattr(config, part).to_dict() | (changes or {})})
        random_siglip(config).save_pretrained(tmp_path / "plain")
        size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
        SiglipProcessor(SiglipImageProcessor(size=size), tokenizer).save_pretrained(tmp_path / "plain")
        return tmp_path / "plain"

    return make


@pytest.mark.parametrize("model_cfg", [TANH], indirect=True)
@pytest.mark.parametrize("name", NOT_THERE)
def test_what_open_clip_has_not_is_one_line(name, plain, tmp_path, capsys):
    part, changes, words = NOT_THERE[name]
    assert main(["convert", str(plain(part, changes)), str(tmp_path / "there"), "--to", "open_clip"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "there").exists()


def test_another_gelu_of_the_picture_tower_is_said(model_cfg, plain, tmp_path, capsys):
    theirs = TOWERS[TOWER][0].activation
    ours = TANH if theirs == GELU else GELU
    folder = plain("vision_config", {"hidden_act": ours})
    assert main(["convert", str(folder), str(tmp_path / "there"), "--to", "open_clip"]) == 0
    assert f"the picture tower has {ours} here and {theirs} in timm's {TOWER}" in capsys.readouterr().out


def test_naflex_and_a_folder_that_lacks_weights_are_refused(plain, tmp_path, capsys):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    Siglip2Model(Siglip2Config(text_config=small | {"vocab_size": 99}, vision_config=small)).save_pretrained(
        tmp_path / "naflex"
    )
    assert main(["convert", str(tmp_path / "naflex"), str(tmp_path / "there"), "--to", "open_clip"]) == 2
    assert "naflex: is a SigLIP 2 NaFlex (model_type 'siglip2'): open_clip has" in capsys.readouterr().err
    folder = plain()
    weights = load_file(folder / "model.safetensors")
    torch.save({name: weight for name, weight in weights.items() if ".head." not in name}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert main(["convert", str(folder), str(tmp_path / "there"), "--to", "open_clip"]) == 2
    assert "weights of a SigLIP, such as 'text_model.head.bias'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("clean", ["canonicalize", "lower", "whitespace"])
def test_texts_have_open_clips_tokens_after_saving_too(clean, tokenizer, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is of the test extra")
    tokenizer.save_pretrained(tmp_path / "theirs")
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path / "theirs"), context_length=LENGTH, clean=clean)
    siglip_tokenizer(tokenizer, clean, LENGTH).save_pretrained(tmp_path / "ours")
    ours = AutoTokenizer.from_pretrained(tmp_path / "ours")
    texts = [*TEXTS, "".join(f"a{mark}b " for mark in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")[:60], "\t a\u3000b "]
    found = ours(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert found.keys() == {"input_ids"}
    assert found["input_ids"].tolist() == theirs(texts).tolist()
    assert canonicalizes(ours) == (clean == "canonicalize")
    assert not canonicalizes(tokenizer)


def test_a_tokenizer_that_does_not_canonicalize_is_not_made_to_in_open_clip(plain, tmp_path):
    """SigLIP 2's of Transformers lowers letters, and leaves punctuation: open_clip's would take it off."""
    lowering = siglip_tokenizer(letters_tokenizer(), "lower", LENGTH)
    assert main(["convert", str(plain(tokenizer=lowering)), str(tmp_path / "there"), "--to", "open_clip"]) == 0
    written = json.loads((tmp_path / "there" / "open_clip_config.json").read_text())
    assert written["model_cfg"]["text_cfg"]["tokenizer_kwargs"] == {"clean": "whitespace"}


def without_end(tokenizer):
    tokenizer.backend_tokenizer.post_processor = None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="</s>")


def with_other_filling(tokenizer):
    return type(tokenizer)(vocab=tokenizer._vocab_scores, extra_ids=0, pad_token="<pad>")


def without_filling(tokenizer):
    tokenizer.pad_token = None
    return tokenizer


def with_start(tokenizer):
    backend, special = tokenizer.backend_tokenizer, [("<pad>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="<pad> $A </s>", special_tokens=special)
    tokens = {"bos_token": "<pad>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def filling_left(tokenizer):
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return tokenizer


UNFIT = {
    "start": (with_start, "starts a text with its start token 0, which SigLIP's do not ('a dog' is [0, "),
    "left": (filling_left, "fills texts on the left, SigLIP's on the right"),
    "no end": (without_end, "does not end a text with its end token 1, as SigLIP's do"),
    "other filling": (with_other_filling, "fills texts with token 0; SigLIP of 47 tokens fills them with 1"),
    "no filling": (without_filling, "has no pad_token, which fills"),
}


@pytest.mark.parametrize("model_cfg", [GELU], indirect=True)
@pytest.mark.parametrize("name", UNFIT)
def test_a_tokenizer_that_was_brought_and_does_not_fit_is_refused(name, model_cfg, tokenizer, tmp_path, capsys, monkeypatch):
    change, words = UNFIT[name]
    write_folder(tmp_path / "there", model_cfg, tokenizer)
    monkeypatch.setitem(PAD_TOKENS, 47, 1)
    change(tokenizer).save_pretrained(tmp_path / "brought")
    convert = ["convert", str(tmp_path / "there"), str(tmp_path / "plain"), "--tokenizer", str(tmp_path / "brought")]
    assert main(convert) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.endswith("give its own by --tokenizer\n")
    assert not (tmp_path / "plain").exists()


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, without a tokenizer.json, as SigLIP's own of Transformers is. It may canonicalize by itself."""

    def __init__(self, own: bool, **kwargs):
        self.own, self.letters = own, ["</s>", *" abcdefghijklmnopqrstuvwxyzABDELR_'!"]
        super().__init__(own=own, eos_token="</s>", pad_token="</s>", **kwargs)

    vocab_size = property(lambda self: len(self.letters))

    def get_vocab(self):
        return {letter: number for number, letter in enumerate(self.letters)}

    def _tokenize(self, text, **kwargs):
        return [letter for letter in text.lower() if letter not in "_'!"] if self.own else list(text)

    def _convert_token_to_id(self, token):
        return self.letters.index(token)

    def _convert_id_to_token(self, index):
        return self.letters[index]


def test_a_tokenizer_in_python_canonicalizes_by_itself_or_is_refused():
    fitted = siglip_tokenizer(Letters(own=True), "canonicalize", LENGTH)
    assert fitted(["A Red!"], padding="max_length")["input_ids"] == fitted(["a red"], padding="max_length")["input_ids"]
    assert fitted("a red", padding="max_length").keys() == {"input_ids"}
    assert len(fitted("a red", padding="max_length")["input_ids"]) == LENGTH
    assert not canonicalizes(fitted)  # an underscore is left out, which the command says
    with pytest.raises(ValueError, match=r"tokenizer Letters: must lower letters and take punctuation off, as open_clip does"):
        siglip_tokenizer(Letters(own=False), "canonicalize", LENGTH)
    assert siglip_tokenizer(Letters(own=False), "whitespace", LENGTH)("a")["input_ids"]
