"""open_clip's checkpoints of CLIP and SigLIP, read and written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import CLIPModel, SiglipModel

from ..errors import ConfigError, fail
from .checkpoint import read_checkpoint
from .open_clip_architecture import open_clip_config
from .open_clip_families import Family
from .open_clip_folder import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, OpenClipModel, find_open_clip_model
from .open_clip_pixels import preprocess_cfg_of
from .open_clip_siglip import model_cfg_of, other_activation
from .open_clip_siglip_weights import siglip_file_weights
from .open_clip_weights import to_open_clip_weights
from .siglip_tokenizer import canonicalizes
from .tokens import LEGACY_END_TOKEN

if TYPE_CHECKING:  # they import torchvision, which takes seconds
    from transformers import CLIPImageProcessor, CLIPProcessor, SiglipImageProcessor, SiglipProcessor

# ---------------------------------------------------------------------------------------------------- from open_clip


@dataclass
class Conversion:
    """A converted model.

    Attributes:
        family: what kind of model it is.
        image_processor: that prepares pictures as the model's were.
        end_token: that texts are pooled at, as `CLIPTextConfig.eos_token_id` says it: 2 is the highest of a caption. None of a
            SigLIP, which pools at the last position.
        extra: the names in the checkpoint that are no weights of it.
        averages: the keys of averages that the checkpoint holds beside its weights.
        remarks: what was taken for granted, or otherwise than a file says, a line each.
    """

    family: Family
    model: CLIPModel | SiglipModel
    image_processor: "CLIPImageProcessor | SiglipImageProcessor"
    end_token: int | None
    extra: list[str]
    averages: list[str]
    remarks: list[str]


def convert_open_clip_checkpoint(
    checkpoint: str | Path, model_name: str = "", token_ids: Mapping[str, int] | None = None, key: str = ""
) -> Conversion:
    """Read a checkpoint of open_clip, or of a fork of it such as those of CLIP-PGS and cluster masking.

    Args:
        checkpoint: `.pt` (weights, or a training checkpoint with `state_dict`; read without unpickling objects),
            `.safetensors`, or a folder for open_clip's `local-dir:`. Architecture and preparation of pictures are those of
            the `open_clip_config.json` in the folder, or beside the file.
        model_name: open_clip's name, such as `ViT-B-16`, where no such file says it; `-quickgelu` is OpenAI's activation.
        token_ids: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`; by default those of CLIP, or of SigLIP.
        key: which of the file's sets of weights, such as `state_dict_ema`.

    Raises:
        ConfigError: an unknown name, a file of another kind, a part that a model of Transformers has not, or weights that are
            missing or of other sizes.
    """
    return convert_open_clip_model(find_open_clip_model(checkpoint, model_name), token_ids or {}, key)


def convert_open_clip_model(source: OpenClipModel, token_ids: Mapping[str, int], key: str) -> Conversion:
    """As [`convert_open_clip_checkpoint`], of a model that was found."""
    family = source.family
    family.config_of(source.model_cfg, {})  # what it cannot be is said first
    read = read_checkpoint(source.weights, key)
    weights = read.weights
    for name in ("logit_scale", "logit_bias"):
        if name in weights and weights[name].numel() == 1:  # open_clip has it with and without a dimension
            weights[name] = weights[name].reshape(())
    model_cfg = family.with_sizes_of(weights, source.model_cfg) if source.preprocess_cfg is None else source.model_cfg
    config = family.config_of(model_cfg, token_ids)
    with torch.device("meta"):
        expected = family.model_class(config).state_dict()
    extra = _check_shapes(source, weights, expected)
    image_size = config.vision_config.image_size
    preprocess_cfg = family.preprocess_cfg if source.preprocess_cfg is None else source.preprocess_cfg
    image_processor = family.image_processor_of(preprocess_cfg, image_size)
    end = family.end_token(model_cfg)
    if end not in (None, LEGACY_END_TOKEN, config.text_config.eos_token_id):
        found = config.text_config.eos_token_id
        fail(f"{source.weights}: its texts are pooled at the token {end}, the tokenizer's end token is {found}")
    converted = {name: weight.float() for name, weight in family.from_open_clip_weights(weights, list(expected)).items()}
    model = family.model_class.from_pretrained(None, config=config, state_dict=converted)
    return Conversion(family, model, image_processor, end, extra, read.averages, source.remarks(image_size))


def _check_shapes(
    source: OpenClipModel, weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> list[str]:
    """The names that are no weights of the model. Raises ConfigError for weights that are missing or of other sizes."""
    family = source.family
    shapes = {name: tuple(weight.shape) for name, weight in family.to_open_clip_weights(expected).items()}
    wrong = [
        f"{name} is {tuple(weights[name].shape) if name in weights else 'missing'}, {source.name} has {shape}"
        for name, shape in shapes.items()
        if name not in weights or tuple(weights[name].shape) != shape
    ]
    extra = sorted(set(weights) - set(shapes))
    wrong += [f"{name} is of a layer that {source.name} does not have" for name in extra if name.endswith(family.layer_ends)]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ConfigError(f"{source.weights}: does not fit {source.name}: {'; '.join(wrong[:3])}{more}")
    return extra


# ------------------------------------------------------------------------------------------------------ to open_clip


def export_to_open_clip(model: CLIPModel, output_dir: str | Path, processor: "CLIPProcessor") -> None:
    """Write a model for `open_clip.create_model_and_transforms("local-dir:OUTPUT_DIR")`, with its tokenizer.

    Raises:
        ConfigError: an activation, or a preparation of pictures, that open_clip does not have.
    """
    _write(open_clip_config(model.config), to_open_clip_weights(model.state_dict()), Path(output_dir), processor)


def export_siglip_to_open_clip(model: SiglipModel, output_dir: str | Path, processor: "SiglipProcessor") -> str:
    """As [`export_to_open_clip`], of a SigLIP. Returns what is other there than here, empty where nothing is.

    Raises:
        ConfigError: sizes that none of timm's picture towers has, or a part or preparation of pictures that open_clip does
            not have.
    """
    clean = "canonicalize" if canonicalizes(processor.tokenizer) else "whitespace"  # the tokenizer does what else it does
    model_cfg = model_cfg_of(model.config, clean)
    _write(model_cfg, siglip_file_weights(model.state_dict()), Path(output_dir), processor)
    return other_activation(model.config)


def _write(
    model_cfg: dict[str, Any],
    weights: Mapping[str, torch.Tensor],
    output_dir: Path,
    processor: "CLIPProcessor | SiglipProcessor",
) -> None:
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg_of(processor)}
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    output_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output_dir / OPEN_CLIP_WEIGHTS)
    (output_dir / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor.tokenizer.save_pretrained(output_dir)
