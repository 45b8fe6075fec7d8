"""The model of a run: a preset with random weights, or a CLIP folder or Hub id to train on."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPProcessor, PreTrainedTokenizerBase

from hf_maskclip import MaskCLIPConfig, MaskCLIPModel
from hf_maskclip.data.specs import is_hub_id
from hf_maskclip.errors import as_config_error, fail
from training.model.fit import check_has_tokenizer, check_image_processor, check_is_no_run
from training.model.initialization import initialize_as_clip

CONTEXT_LENGTH = 77  # caption tokens, as in CLIP


def _tower(width: int, layers: int, heads: int, **kwargs: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"hidden_act": "gelu"} | kwargs


# name: vision tower, text tower, projection size. The vit-* are open_clip's; tiny and small are for CPUs.
PRESETS = {
    "tiny": (_tower(128, 4, 4, image_size=64, patch_size=8), _tower(128, 3, 4), 128),
    "tiny-96": (_tower(128, 4, 4, image_size=96, patch_size=8), _tower(128, 3, 4), 128),
    "small": (_tower(192, 6, 6, image_size=96, patch_size=8), _tower(192, 4, 6), 192),
    "vit-s-16": (_tower(384, 12, 6, image_size=224, patch_size=16), _tower(384, 12, 6), 384),
    "vit-b-32": (_tower(768, 12, 12, image_size=224, patch_size=32), _tower(512, 12, 8), 512),
    "vit-b-16": (_tower(768, 12, 12, image_size=224, patch_size=16), _tower(512, 12, 8), 512),
}


def build_model(name: str, patch_mask: dict[str, Any] | str, tokenizer: PreTrainedTokenizerBase | None) -> MaskCLIPModel:
    """A preset with random weights, sized for the tokenizer; or the weights of a folder or Hub id, in float32.

    Args:
        name: a key of `PRESETS`, a folder, or a Hub id.
        patch_mask: replaces the mask that the checkpoint records; `""` keeps it (a preset has `pgs`).
        tokenizer: needed for a preset.
    """
    if name not in PRESETS:
        with as_config_error("model", name):
            # float32 whatever the checkpoint holds: half-precision weights lose small updates.
            return MaskCLIPModel.from_pretrained(name, patch_mask=patch_mask or None, dtype=torch.float32)
    tokens = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = MaskCLIPModel(preset_config(name, patch_mask or "pgs", vocab_size=len(tokenizer), **tokens))
    initialize_as_clip(model)
    return model


def preset_config(name: str, patch_mask: dict[str, Any] | str, **text_options: Any) -> MaskCLIPConfig:
    """The configuration of a preset; `text_options` are what depends on the tokenizer, CLIP's own by default."""
    vision, text, projection_dim = PRESETS[name]
    return MaskCLIPConfig(
        vision_config=vision | {"patch_mask": patch_mask, "projection_dim": projection_dim},
        text_config=text | {"max_position_embeddings": CONTEXT_LENGTH, "projection_dim": projection_dim} | text_options,
        projection_dim=projection_dim,
    )


def load_tokenizer(tokenizer: str, model: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the options name; None where one has to be trained on the captions (a preset without a tokenizer)."""
    source = tokenizer or (None if model in PRESETS else model)
    if source is None:
        return None
    check_has_tokenizer(source)
    with as_config_error("tokenizer", source):
        return AutoTokenizer.from_pretrained(source)


def check_names(model: str, tokenizer: str) -> None:
    """Raise a ConfigError for a model or tokenizer that is neither a preset, nor a folder, nor in the form of a Hub id."""
    for option, name, presets in (("model", model, PRESETS), ("tokenizer", tokenizer, {"": None})):
        if name in presets or Path(name).is_dir():
            if option == "model":
                check_is_no_run(name)
            continue
        if not is_hub_id(name):
            allowed = f"one of {', '.join(PRESETS)}, " if option == "model" else ""
            fail(f"{option}={name!r}: must be {allowed}an existing folder, or a Hub id such as org/name")


def build_processor(name: str, model: MaskCLIPModel, tokenizer: PreTrainedTokenizerBase) -> CLIPProcessor:
    """The processor that is saved with the model: the checkpoint's image processor, or CLIP's at the preset's image size.

    Raises:
        ConfigError: the checkpoint has none, or one of another size than the model.
    """
    if name in PRESETS:
        size = model.config.vision_config.image_size
        image_processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    else:
        with as_config_error("model", name):
            image_processor = CLIPImageProcessor.from_pretrained(name)
    check_image_processor(image_processor, model.config.vision_config, name)
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
