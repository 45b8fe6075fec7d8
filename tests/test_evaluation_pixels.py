"""Proves that evaluation's pixels are open_clip's for pictures of every size, where Transformers' own crop is one pixel off."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_picture
from PIL import Image
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from hf_maskclip.evaluation import Encoder, ImageSet
from hf_maskclip.evaluation.pixels import inputs_of

open_clip = pytest.importorskip("open_clip", reason="open_clip is of the conversion extra")
SIZES = [(640, 427), (427, 640), (640, 478), (478, 640), (500, 334), (334, 500), (300, 260), (224, 224), (225, 224), (1, 1)]
SIZES += [(30, 700), (224, 227), (2000, 3), (640, 480), (375, 500), (223, 226)]


def sizes(count: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    return [tuple(int(side) for side in rng.integers(1, 120, 2)) for _ in range(count)]


def processor_of(size: int, kind=CLIPImageProcessorPil):
    return kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def picture_of(size: tuple[int, int]) -> Image.Image:
    """A picture in which every row and column differs from the next."""
    y, x = np.mgrid[: size[1], : size[0]]
    return Image.fromarray(np.stack([x * 37 % 256, y * 59 % 256, (x * 7 + y * 11) % 256], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(("image_size", "pictures"), [(224, SIZES), (32, sizes(1000)), (33, sizes(100))])
def test_pixels_are_open_clips_for_every_size(image_size, pictures):
    transform = open_clip.image_transform(image_size, is_train=False)
    processor = processor_of(image_size)
    moved = 0
    for size in pictures:
        picture = picture_of(size)
        (pixels,) = inputs_of(processor, [picture])["pixel_values"]
        expected = transform(picture)
        assert pixels.shape == expected.shape
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5, msg=f"{size}")  # a pixel's step is 1 / 70
        own = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
        moved += not torch.allclose(own, expected, atol=1e-3)
    assert moved > len(pictures) / 20  # Transformers' own crop differs, so that there is something to mend


def test_a_batch_of_many_sizes_is_that_of_its_pictures_alone():
    processor = processor_of(32)
    pictures = [picture_of(size) for size in sizes(20)]
    together = inputs_of(processor, pictures)["pixel_values"]
    torch.testing.assert_close(
        together, torch.cat([inputs_of(processor, [picture])["pixel_values"] for picture in pictures]), rtol=0, atol=0
    )


def test_the_other_backend_crops_at_the_same_place():
    """Its resizing differs by a level or two of 255, its crop not: pictures of the crop's short side are not resized."""
    for size in [(32, 33), (35, 32), (32, 39), (41, 32)]:
        expected = open_clip.image_transform(32, is_train=False)(picture_of(size))
        (pixels,) = inputs_of(processor_of(32, CLIPImageProcessor), [picture_of(size)])["pixel_values"]
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


def test_a_processor_without_a_crop_is_left_as_it_is():
    processor = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    pictures = [random_picture(n) for n in range(2)]
    expected = processor(images=pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs_of(processor, pictures)["pixel_values"], expected, rtol=0, atol=0)


def test_features_are_those_of_open_clips_pixels(make_model, processor):
    picture = picture_of((67, 45))  # resized to 47x32: an odd margin
    model = make_model("random").eval()
    processor.image_processor, kept = processor_of(32), processor.image_processor
    try:
        found = Encoder(model, processor).encode_images(ImageSet([(picture, 0)])).features
    finally:
        processor.image_processor = kept
    with torch.no_grad():
        pixels = open_clip.image_transform(32, is_train=False)(picture)[None]
        expected = torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def real_pictures() -> list[Image.Image]:
    """Those that come with Matplotlib and, where it is installed, scikit-learn (a photograph of 640x427)."""
    found = [find_spec(name) for name in ("matplotlib", "sklearn")]
    folders = [Path(spec.origin).parent for spec in found if spec and spec.origin]
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.suffix in (".jpg", ".png")]
    return [Image.open(file).convert("RGB") for file in files]


@pytest.mark.parametrize("image_size", [32, 224])
def test_pixels_of_real_pictures_are_open_clips(image_size):
    pictures = real_pictures()
    assert len({picture.size for picture in pictures}) > 3
    transform, processor = open_clip.image_transform(image_size, is_train=False), processor_of(image_size)
    for picture in pictures:
        torch.testing.assert_close(inputs_of(processor, [picture])["pixel_values"][0], transform(picture), rtol=0, atol=1e-5)
