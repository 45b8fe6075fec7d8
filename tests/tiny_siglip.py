"""A tiny SigLIP of open_clip for tests: its name and tower beside the real ones, a tokenizer, random weights, a folder."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import SiglipModel, T5Tokenizer

from hf_maskclip.conversion.open_clip_siglip import MODELS, SQUASHED, TANH, TOWERS, Tower, config_of_model_cfg
from hf_maskclip.conversion.open_clip_siglip_weights import siglip_file_weights

TOWER, NAME = "vit_tiny_patch8_siglip_32", "ViT-T-8-SigLIP"
WIDTH, LENGTH = 32, 64


def letters_tokenizer() -> T5Tokenizer:
    """A T5 of single letters, as that of SigLIP's English models: no lower case by itself, and texts are filled with `</s>`."""
    words = [("▁", -2.0), ("▁red", -1.0), ("▁ball", -1.0), ("▁blue", -1.0)]
    letters = [(letter, -3.0 - n / 50) for n, letter in enumerate("abcdefghijklmnopqrstuvwxyzABLR!'_;().")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, pad_token="</s>")


def know_tiny_siglip(monkeypatch, activation: str) -> dict:
    """Make the tiny model known by its name. Returns its `model_cfg`, with SigLIP 2's tanh in both towers or with none."""
    monkeypatch.setitem(TOWERS, TOWER, (Tower(WIDTH, 2, 2, 64, 8, activation), 32))
    text = {"width": 24, "heads": 2, "layers": 2, "mlp_ratio": 3.7362, "norm_kwargs": {"eps": 1e-6}}
    text |= {"context_length": LENGTH, "vocab_size": len(letters_tokenizer()) + 3, "hf_tokenizer_name": "org/tiny"}
    text |= {"tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    text |= {"act_kwargs": {"approximate": "tanh"}} if activation == TANH else {}
    vision = {
        "image_size": 32,
        "timm_model_name": TOWER,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    cfg = {"embed_dim": WIDTH, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(MODELS, NAME, cfg)
    return copy.deepcopy(cfg)


def random_siglip(config, seed: int = 0) -> SiglipModel:
    """With weights of which none is zero or one, for these would hide what is swapped."""
    torch.manual_seed(seed)
    model = SiglipModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def write_folder(folder: Path, model_cfg: dict, tokenizer, preprocess_cfg: dict = SQUASHED, **changes) -> dict:
    """Write open_clip's folder of a model, and what differs from it in the file that says what it is. Returns its weights."""
    folder.mkdir(exist_ok=True)
    weights = siglip_file_weights(random_siglip(config_of_model_cfg(model_cfg, {})).state_dict())
    cfg = dict(model_cfg)
    for part, change in changes.items():
        cfg[part] = cfg.get(part, {}) | change if isinstance(change, dict) else change
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocess_cfg}))
    save_file(weights, folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)
    return weights
