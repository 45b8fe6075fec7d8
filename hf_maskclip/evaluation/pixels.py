"""From pictures to pixels as open_clip makes them.

Transformers and torchvision, which open_clip uses, resize alike and differ in the centre crop. Where an odd number of pixels is
cut, Transformers floors its half, and torchvision rounds it to even.
"""

from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms


def pixels_of(image_processor: Any, pictures: list[Image.Image]) -> torch.Tensor:
    """Pixels (B, C, H, W) of RGB pictures of any size, by a Transformers image processor, with torchvision's centre crop."""
    if not image_processor.do_center_crop:
        return image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    resized = image_processor(images=pictures, do_center_crop=False, do_rescale=False, do_normalize=False)["pixel_values"]
    height, width = (image_processor.crop_size[side] for side in ("height", "width"))
    cropped = [transforms.center_crop(torch.as_tensor(picture), [height, width]) for picture in resized]
    done = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
    return image_processor(images=cropped, return_tensors="pt", **done)["pixel_values"]
