"""From MaskCLIP to plain CLIP: a folder that Transformers loads without this package."""

from pathlib import Path

from transformers import CLIPConfig, CLIPModel, ProcessorMixin

from .modeling_maskclip import MaskCLIPModel


def export_to_clip(model: MaskCLIPModel, output_dir: str | Path, processor: ProcessorMixin) -> None:
    """Write a trained model as `model_type: clip`, with its processor and tokenizer, for `AutoModel` and `pipeline`.

    The patch mask stays in the configuration (`vision_config.patch_mask`), which Transformers keeps and ignores, so that
    `MaskCLIPModel.from_pretrained(output_dir)` trains on with it.

    Args:
        model: the trained model.
        output_dir: a folder, made if it does not exist.
        processor: the `CLIPProcessor` (tokenizer and image processor) that the model was trained with.
    """
    parts = {"text_config": model.config.text_config, "vision_config": model.config.vision_config}
    plain = {key: _without_model_type(part.to_dict()) for key, part in parts.items()}
    config = CLIPConfig.from_dict(_without_model_type(model.config.to_dict()) | plain)
    # The weights are handed over, not copied: the shell has none of its own to initialise.
    clip = CLIPModel.from_pretrained(None, config=config, state_dict=model.state_dict())
    clip.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


def _without_model_type(config: dict) -> dict:
    return {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
