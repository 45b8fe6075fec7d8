"""The model of a run: a preset with random weights, or a folder or Hub id of a dual encoder to train on."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)
from transformers.image_utils import PILImageResampling
from transformers.utils import logging

from hf_maskclip import MaskCLIPConfig, MaskCLIPModel, add_patch_mask
from hf_maskclip.data.specs import is_hub_id
from hf_maskclip.dual_encoders import family_of_folder, load_dual_encoder, load_processor
from hf_maskclip.errors import as_config_error, fail
from hf_maskclip.models.attention import DEFAULT_ATTENTION
from hf_maskclip.models.patch_mask_registry import resolve_patch_mask
from training.model.fit import check_has_tokenizer, check_image_processor, check_is_no_run
from training.model.initialization import initialize_as_clip

logger = logging.get_logger(__name__)

CONTEXT_LENGTH = 77  # caption tokens, as in CLIP
SIGLIP_CONTEXT_LENGTH = 64  # which Transformers' pipeline pads captions of SigLIP to


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
    "siglip-tiny": (_tower(128, 4, 4, image_size=64, patch_size=8), _tower(128, 3, 4), 128),
    "siglip-s-16": (_tower(384, 12, 6, image_size=224, patch_size=16), _tower(384, 12, 6), 384),
    "siglip-b-16": (_tower(768, 12, 12, image_size=224, patch_size=16), _tower(768, 12, 12), 768),
}
SIGLIPS = ("siglip-tiny", "siglip-s-16", "siglip-b-16")


def build_model(name: str, patch_mask: dict[str, Any] | str, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """A preset with random weights, sized for the tokenizer; or the weights of a folder or Hub id, in float32.

    The model of a CLIP is a MaskCLIPModel; that of another family is the family's own, with a patch mask.

    Args:
        name: a key of `PRESETS`, a folder, or a Hub id.
        patch_mask: replaces the mask that the checkpoint records; `""` keeps it (a preset has `pgs`).
        tokenizer: needed for a preset.
    """
    if name not in PRESETS:
        return _load_model(name, patch_mask)
    tokens = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = preset_config(name, patch_mask or "pgs", vocab_size=len(tokenizer), **tokens)
    if isinstance(config, SiglipConfig):
        return add_patch_mask(SiglipModel._from_config(config, attn_implementation=DEFAULT_ATTENTION))
    model = MaskCLIPModel(config)
    initialize_as_clip(model)
    return model


def _load_model(name: str, patch_mask: dict[str, Any] | str) -> PreTrainedModel:
    if family_of_folder(name).model_type == "clipseg":
        fail(f"model={name!r}: is a CLIPSeg, whose encoders are those of a CLIP; train that CLIP")
    # float32 whatever the checkpoint holds: half-precision weights lose small updates.
    model = load_dual_encoder(name, patch_mask or None, dtype=torch.float32, attn_implementation=DEFAULT_ATTENTION)
    recorded = model.config.vision_config.patch_mask["name"]
    if recorded == "none" and not patch_mask and not isinstance(model, MaskCLIPModel):  # which says so itself
        logger.warning_once(f"{name} without a patch mask: it trains on whole images; give one by --patch_mask")
    return model


def preset_config(name: str, patch_mask: dict[str, Any] | str, **text_options: Any) -> MaskCLIPConfig | SiglipConfig:
    """The configuration of a preset; `text_options` are what depends on the tokenizer, the family's own by default."""
    vision, text, projection_dim = PRESETS[name]
    if name in SIGLIPS:
        context = {"max_position_embeddings": SIGLIP_CONTEXT_LENGTH, "projection_size": projection_dim}
        vision = vision | {"patch_mask": resolve_patch_mask(patch_mask)}
        return SiglipConfig(vision_config=vision, text_config=text | context | text_options)
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


def build_processor(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """The processor that is saved with the model: the checkpoint's image processor, or the family's at the preset's image size.

    Raises:
        ConfigError: the checkpoint has none, or one of another size than the model.
    """
    if name in PRESETS:
        processor = _processor_of_preset(name, model.config.vision_config.image_size, tokenizer)
    elif isinstance(model, MaskCLIPModel):
        with as_config_error("model", name):
            image_processor = CLIPImageProcessor.from_pretrained(name)
        processor = CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
    else:
        processor = load_processor(name)
        processor.tokenizer = tokenizer
    check_image_processor(processor.image_processor, model.config.vision_config, name)
    return processor


def _processor_of_preset(name: str, size: int, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    square = {"height": size, "width": size}
    if name in SIGLIPS:
        image_processor = SiglipImageProcessor(size=square, resample=PILImageResampling.BICUBIC)
        return SiglipProcessor(image_processor=image_processor, tokenizer=tokenizer)
    image_processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square)
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
