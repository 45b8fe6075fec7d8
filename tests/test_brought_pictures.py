"""Proves what becomes of the pictures and captions that people bring: any depth, transparency, field type and damage gives the
right picture or a skip by its cause, and never another exception."""

import base64
import io
import struct

import numpy as np
import pytest
from damages import FORMS, damaged_pictures, whole_picture
from helpers import random_picture
from PIL import Image

from hf_maskclip.data.decoding import PairDecoder, captions_of
from hf_maskclip.data.pictures import SkippedSample, decode_image

RAMP = np.linspace(0, 65_535, 256 * 16).round().astype(np.uint16).reshape(16, 256)


def saved(picture: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def cause_of(value, **options) -> str:
    with pytest.raises(SkippedSample) as skipped:
        decode_image(value, **options)
    return str(skipped.value)


# ---- Depth and transparency ------------------------------------------------------------------------------------------------

DEEP = {
    "16-bit PNG": lambda: saved(Image.fromarray(RAMP), "PNG"),
    "16-bit TIFF": lambda: saved(Image.fromarray(RAMP), "TIFF"),
    "16-bit big-endian TIFF": lambda: saved(Image.frombytes("I;16B", (256, 16), RAMP.astype(">u2").tobytes()), "TIFF"),
    "16-bit PGM": lambda: b"P5 256 16 65535\n" + RAMP.astype(">u2").tobytes(),
    "16-bit JPEG 2000": lambda: saved(Image.fromarray(RAMP), "JPEG2000"),
    "32-bit TIFF": lambda: saved(Image.fromarray((RAMP.astype(np.int64) * 32_767).astype(np.int32)), "TIFF"),
    "float TIFF to 1": lambda: saved(Image.fromarray((RAMP / 65_535).astype(np.float32)), "TIFF"),
    "float TIFF to 255": lambda: saved(Image.fromarray((RAMP / 257).astype(np.float32)), "TIFF"),
    "float TIFF to 65535": lambda: saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("make", DEEP.values(), ids=DEEP)
def test_deep_channels_are_scaled_by_their_depth(make):
    pixels = np.asarray(decode_image(make()), np.float64)
    full = 255 if pixels.max() > 200 else 127  # a signed 32-bit picture reaches half of the unsigned scale
    assert pixels.mean() == pytest.approx(full / 2, abs=1)
    assert len(np.unique(pixels)) >= full - 1
    assert (np.diff(pixels[..., 0].flatten()) >= 0).all()


def test_a_dark_deep_picture_stays_dark():
    assert np.asarray(decode_image(saved(Image.fromarray(RAMP // 10), "PNG"))).max() == 25


def on_transparency(mode: str) -> Image.Image:
    """A black square in the middle of a transparent ground, whose hidden colour is black."""
    picture = Image.new("RGBA", (12, 12), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (4, 4, 8, 8))
    return picture.convert(mode)


def grey_picture() -> Image.Image:
    return on_transparency("RGBA").getchannel("A").point(lambda alpha: 1 if alpha else 9)


def palette_picture() -> Image.Image:
    """The same, of two colours, both black."""
    picture = on_transparency("RGBA").getchannel("A").point(lambda alpha: 1 if alpha else 0)
    picture = Image.frombytes("P", picture.size, picture.tobytes())
    picture.putpalette([0, 0, 0, 0, 0, 0])
    return picture


TRANSPARENT = {
    "RGBA PNG": lambda: saved(on_transparency("RGBA"), "PNG"),
    "LA PNG": lambda: saved(on_transparency("LA"), "PNG"),
    "RGBA WebP": lambda: saved(on_transparency("RGBA"), "WEBP", lossless=True),
    "RGBA TIFF": lambda: saved(on_transparency("RGBA"), "TIFF"),
    "GIF": lambda: saved(on_transparency("RGBA"), "GIF"),
    "palette PNG": lambda: saved(palette_picture(), "PNG", transparency=0),
    "grey PNG with a level for it": lambda: saved(grey_picture(), "PNG", transparency=9),
}


@pytest.mark.parametrize("make", TRANSPARENT.values(), ids=TRANSPARENT)
def test_what_is_transparent_lies_on_white(make):
    pixels = np.asarray(decode_image(make()))
    assert (pixels[0, 0] == 255).all()
    assert (pixels[5, 5] < 30).all()


# ---- Types of fields -------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    content = saved(random_picture(0, (9, 7)), "PNG")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(content)
    return tmp_path, content


@pytest.mark.parametrize(
    "wrap",
    [
        lambda folder, content: content,
        lambda folder, content: bytearray(content),
        lambda folder, content: memoryview(content),
        lambda folder, content: {"bytes": content, "path": None},
        lambda folder, content: {"bytes": None, "path": "pictures/a.png"},
        lambda folder, content: [{"bytes": content, "path": "a.png"}],
        lambda folder, content: ["pictures/a.png"],
        lambda folder, content: "pictures/a.png",
        lambda folder, content: str(folder / "pictures" / "a.png"),
        lambda folder, content: folder / "pictures" / "a.png",
        lambda folder, content: Image.open(io.BytesIO(content)),
        lambda folder, content: "data:image/png;base64," + base64.b64encode(content).decode(),
        lambda folder, content: base64.b64encode(content * 20).decode(),
    ],
)
def test_a_picture_is_read_from_a_field_of_any_type(wrap, picture):
    folder, content = picture
    row = {"__key__": "x", "__url__": f"{folder}/table.parquet", "image": wrap(folder, content), "text": "a ball"}
    decoded, caption = PairDecoder()(row, np.random.default_rng(0))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(random_picture(0, (9, 7)).convert("RGB")))
    assert caption == "a ball"


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (None, "image_missing"),
        ([], "image_missing"),
        ({"bytes": None, "path": None}, "image_missing"),
        ([b"a", b"b"], "image_type_unknown"),
        (7, "image_type_unknown"),
        (1.5, "image_type_unknown"),
        (True, "image_type_unknown"),
        ("absent.jpg", "file_unreadable"),
        ({"path": "absent.jpg"}, "file_unreadable"),
        (".", "file_unreadable"),
        ("", "file_unreadable"),
        ("https://example.org/a.jpg", "image_is_url"),
        ("x" * 5000, "image_undecodable"),
        (b"", "image_undecodable"),
    ],
)
def test_what_is_no_picture_is_skipped_by_its_cause(value, cause, tmp_path):
    assert cause_of(value, folder=str(tmp_path)) == cause


# ---- Damage ----------------------------------------------------------------------------------------------------------------


def with_broken_exif() -> bytes:
    """A JPEG turned by its EXIF tag 6, whose entry of the resolution has the type of a text."""
    entries = struct.pack(">HHII", 0x0112, 3, 1, 6 << 16) + struct.pack(">HHII", 0x011A, 2, 4, 0x41424344)
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entries + bytes(4)
    return saved(random_picture(0, (40, 24)), "JPEG", exif=exif)


def test_a_damaged_tag_does_not_cost_the_picture():
    assert sorted(decode_image(with_broken_exif()).size) == [24, 40]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_no_damage_raises_anything_but_a_skip(form):
    used, causes = 0, set()
    assert decode_image(whole_picture(form)).mode == "RGB"
    for content in damaged_pictures(form):
        try:
            decoded = decode_image(content, image_size=16, crop_scale=0.9)
            used += decoded.mode == "RGB"
        except SkippedSample as skipped:
            causes.add(str(skipped))
    assert used
    assert causes <= {"image_undecodable", "image_too_large"}


# ---- Captions --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        (["a dog", None], ["a dog"]),
        (["a dog", float("nan"), 3, True, {"raw": "x"}], ["a dog"]),
        ("a dog ", ["a dog"]),
        (b"\xef\xbb\xbfa dog", ["a dog"]),
        (("a dog", "", "a cat"), ["a dog", "a cat"]),
        (None, "caption_missing"),
        ([], "caption_missing"),
        ([None, None], "caption_missing"),
        (float("nan"), "caption_missing"),
        (7, "caption_missing"),
        ({"raw": "a dog"}, "caption_missing"),
        ([" ", "\n"], "caption_empty"),
        ("", "caption_empty"),
        (b"caf\xe9", "caption_not_utf8"),
        ("caf\udce9", "caption_not_utf8"),
    ],
)
def test_a_caption_is_a_text_and_nothing_else(value, captions):
    if isinstance(captions, list):
        assert captions_of(value) == captions
        return
    with pytest.raises(SkippedSample, match=captions):
        captions_of(value)


@pytest.mark.parametrize(
    ("row", "key", "captions"),
    [
        ({"caption_0": "a", "caption_1": "b", "caption_10": "d", "caption_2": "c"}, "", ["a", "b", "c", "d"]),
        ({"TEXT": "a"}, "", ["a"]),
        ({"sentences": [{"raw": "a"}, {"raw": "b"}]}, "sentences.raw", ["a", "b"]),
        ({"json": b'{"caption": ["a", null]}'}, "", ["a"]),
        ({"title": "a", "text": None}, "", ["a"]),
    ],
)
def test_captions_are_found_in_fields_of_many_names(row, key, captions):
    assert PairDecoder(caption_key=key).captions(row, np.random.default_rng(0)) == captions
