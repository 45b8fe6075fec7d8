"""open_clip's preparation of pictures (`preprocess_cfg`) as an image processor of Transformers, and back."""

import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, fail

if TYPE_CHECKING:  # they import torchvision, which takes seconds
    from transformers import CLIPImageProcessor, CLIPProcessor, SiglipImageProcessor, SiglipProcessor

BICUBIC, BILINEAR = 3, 2  # as Pillow numbers them
INTERPOLATIONS = {"bicubic": BICUBIC, "bilinear": BILINEAR, "random": BICUBIC}  # random is of training alone


def image_processor_of(preprocess_cfg: Mapping[str, Any], image_size: int) -> "CLIPImageProcessor":
    """The image processor of a CLIP that prepares pictures as open_clip does.

    Args:
        preprocess_cfg: open_clip's; what it is silent about is open_clip's default.
        image_size: of the model, in pixels, which open_clip takes whatever `size` says.

    Raises:
        ConfigError: Transformers' image processor cannot do it.
    """
    from transformers import CLIPImageProcessor

    given = {key: value for key, value in preprocess_cfg.items() if value is not None}
    statistics = {f"image_{key}": _of_channels(key, given[key]) for key in ("mean", "std") if key in given}
    mode, interpolation = given.get("resize_mode", "shortest"), given.get("interpolation", "bicubic")
    if given.get("mode", "RGB") != "RGB":
        fail(f"preprocess_cfg.mode={given['mode']!r}: must be RGB")
    if interpolation not in INTERPOLATIONS:
        fail(f"preprocess_cfg.interpolation={interpolation!r}: must be one of {', '.join(INTERPOLATIONS)}")
    if mode == "longest":
        fail("preprocess_cfg.resize_mode='longest': pads pictures to a square, which a CLIPImageProcessor cannot do")
    if mode not in ("shortest", "squash"):
        fail(f"preprocess_cfg.resize_mode={mode!r}: must be shortest or squash")
    square = {"height": image_size, "width": image_size}
    size = square if mode == "squash" else {"shortest_edge": image_size}
    crop = {"crop_size": square, "do_center_crop": mode == "shortest"}
    return CLIPImageProcessor(size=size, resample=INTERPOLATIONS[interpolation], **crop, **statistics)


def siglip_image_processor_of(
    preprocess_cfg: Mapping[str, Any], image_size: int
) -> "SiglipImageProcessor | CLIPImageProcessor":
    """The same of a SigLIP: its own where pictures are squashed, which is all that it does, else that of a CLIP."""
    from transformers import SiglipImageProcessor

    found = image_processor_of(preprocess_cfg, image_size)
    if found.do_center_crop:
        return found
    statistics = {"image_mean": found.image_mean, "image_std": found.image_std}
    return SiglipImageProcessor(size=found.size, resample=found.resample, **statistics)


def _of_channels(key: str, value: Any) -> list[float]:
    """One number for each channel; of one number, as open_clip takes it, three."""
    values = [value] * 3 if isinstance(value, numbers.Real) else value
    are_numbers = isinstance(values, (list, tuple)) and all(isinstance(number, numbers.Real) for number in values)
    if not are_numbers or len(values) != 3 or (key == "std" and min(values) <= 0):
        fail(f"preprocess_cfg.{key}={value!r}: must be a number, or one for each of three channels")
    return [float(number) for number in values]


def other_size(preprocess_cfg: Mapping[str, Any], image_size: int) -> str:
    """The `size` of a `preprocess_cfg`, where it is another than the model's; else empty."""
    size = preprocess_cfg.get("size")
    sizes = {size} if isinstance(size, int) else set(size or [image_size])
    return "" if sizes == {image_size} else str(size)


def preprocess_cfg_of(processor: "CLIPProcessor | SiglipProcessor") -> dict[str, Any]:
    """open_clip's `preprocess_cfg`. Raises ConfigError for what open_clip's transform does not do."""
    image_processor = processor.image_processor
    size, crop = image_processor.size, image_processor.crop_size
    interpolation = {BICUBIC: "bicubic", BILINEAR: "bilinear"}.get(int(image_processor.resample))
    if interpolation is None:
        raise ConfigError(f"processor: resample {image_processor.resample}: open_clip has bicubic and bilinear")
    if not (image_processor.do_resize and image_processor.do_rescale and image_processor.do_normalize):
        raise ConfigError("processor: open_clip always resizes, rescales and normalises")
    if abs(image_processor.rescale_factor - 1 / 255) > 1e-6:
        raise ConfigError(f"processor: rescale_factor {image_processor.rescale_factor}: open_clip's is 1/255")
    edge = size.get("shortest_edge")
    if edge is None:
        target, mode = [size.get("height"), size.get("width")], "squash"
        fits = None not in target and (not image_processor.do_center_crop or [crop["height"], crop["width"]] == target)
    else:
        target, mode = [edge, edge], "shortest"
        fits = image_processor.do_center_crop and [crop["height"], crop["width"]] == target
    if not fits:
        found = f"size {dict(size)}, crop_size {crop and dict(crop)}, do_center_crop {image_processor.do_center_crop}"
        raise ConfigError(f"processor: {found}: open_clip resizes to the size that it crops, or squashes")
    mean, std = list(image_processor.image_mean), list(image_processor.image_std)
    return {"size": target, "mean": mean, "std": std, "interpolation": interpolation, "resize_mode": mode}
