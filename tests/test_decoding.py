"""Proves that pictures of any mode and captions of any field are decoded, no larger than crops need, and that what is no pair
is skipped by its cause."""

import numpy as np
import pytest
import torch
from helpers import encode_image, random_picture
from PIL import Image
from torchvision.transforms import v2

from hf_maskclip.data.decoding import PairDecoder, sample_key
from hf_maskclip.data.pictures import MAX_IMAGE_PIXELS, SkippedSample, decode_image
from hf_maskclip.data.sources import open_files
from training.data.forms import CropTransform

RNG = np.random.default_rng(0)


def test_caption_keys_reach_into_json_lists_and_fall_back(shards):
    row = next(iter(open_files(str(shards))))
    drawn = {PairDecoder(caption_key="json.captions")(row, np.random.default_rng(seed))[1] for seed in range(20)}
    assert drawn == {"first of 0", "second of 0"}
    assert PairDecoder(caption_key="json.absent,txt")(row, RNG)[1] == "a red ball on grass number 0"
    with pytest.raises(SkippedSample, match="caption_missing"):
        PairDecoder(caption_key="json.absent")(row, RNG)


@pytest.mark.parametrize("text", ["a ball\non grass", b"\xef\xbb\xbf a ball\r\n\ton  grass\n"])
def test_a_caption_is_one_line(text):
    """As CLIP's tokenizers read it. In open_clip, too, a text file is one caption, whatever its lines."""
    assert PairDecoder().captions({"txt": text}, RNG) == ["a ball on grass"]
    assert PairDecoder().captions({"texts": [text, "two fish"]}, RNG) == ["a ball on grass", "two fish"]


def skip_cause(**files: bytes) -> str:
    with pytest.raises(SkippedSample) as skipped:
        PairDecoder()({"__key__": "x", "png": encode_image(random_picture(0)), "txt": b"a ball"} | files, RNG)
    return str(skipped.value)


def test_causes_of_skipping():
    picture = encode_image(random_picture(0))
    assert skip_cause(txt=b" \n") == "caption_empty"
    assert skip_cause(txt="Caf\u00e9".encode("latin-1")) == "caption_not_utf8"
    assert skip_cause(png=b"") == "image_undecodable"
    assert skip_cause(png=b"not a picture") == "image_undecodable"
    assert skip_cause(png=picture[: len(picture) // 2]) == "image_undecodable"
    side = int(MAX_IMAGE_PIXELS**0.5) + 1
    assert skip_cause(png=encode_image(Image.new("1", (side, side)))) == "image_too_large"
    with pytest.raises(SkippedSample, match="json_undecodable"):
        PairDecoder(caption_key="json.caption")({"json": b"{"}, RNG)
    with pytest.raises(SkippedSample, match="image_missing"):
        PairDecoder()({"txt": b"a ball"}, RNG)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_unusual_pictures_become_rgb(mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    picture = Image.new(mode, (5, 7)) if mode == "I;16" else random_picture(0, (5, 7)).convert(mode)
    decoded = decode_image(encode_image(picture, form))
    assert decoded.mode == "RGB"
    assert decoded.size == (5, 7)
    assert CropTransform(32, 0.5, 0.5)(decoded).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("size", "decoded"),
    [((640, 480), (320, 240)), ((2000, 1500), (500, 375)), ((500, 400), (500, 400)), ((2000, 300), (2000, 300))],
)
def test_a_jpeg_is_decoded_no_larger_than_its_crops_need(size, decoded):
    picture = random_picture(0, (64, 48)).resize(size)
    jpeg = encode_image(picture, "JPEG")
    small = decode_image(jpeg, image_size=224, crop_scale=0.9)
    assert small.size == decoded
    assert decode_image(jpeg).size == size
    assert decode_image(encode_image(picture), image_size=224, crop_scale=0.9).size == size  # a PNG can only be decoded whole
    whole, drafted = (np.asarray(p.resize((64, 48)), np.float32) for p in (decode_image(jpeg), small))
    assert np.abs(whole - drafted).mean() < 2
    for seed in range(50):  # no crop is smaller than what it becomes
        torch.manual_seed(seed)
        crop = v2.RandomResizedCrop(224, scale=(0.9, 1.0)).make_params([small])
        assert min(crop["height"], crop["width"]) >= 224


def test_rows_without_a_key_have_one_by_their_content(tmp_path):
    row = {"image": {"bytes": b"abc", "path": None}, "text": "a ball"}
    assert sample_key(row) == sample_key(dict(row)) != sample_key(row | {"text": "a box"})
    assert sample_key(row | {"__key__": "x1"}) == "x1"
