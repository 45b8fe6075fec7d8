"""Proves that features are computed once, for the right weights, as the model has them in evaluation mode, whole or masked."""

import itertools

import pytest
import torch
from helpers import random_picture
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPProcessor

from hf_maskclip.errors import ConfigError
from hf_maskclip.evaluation import (
    Encoder,
    ImageSet,
)
from hf_maskclip.evaluation.pixels import inputs_of


@pytest.fixture
def encoder(make_model, processor) -> Encoder:
    return Encoder(make_model(), processor, batch_size=2)


def test_features_are_those_of_the_model_in_evaluation_mode_and_the_mode_comes_back(make_model, processor):
    model = make_model("random").train()
    pictures = [random_picture(i) for i in range(5)]
    found = Encoder(model, processor, batch_size=2).encode_images(ImageSet([(p, i) for i, p in enumerate(pictures)]))
    assert model.training
    assert found.targets == [0, 1, 2, 3, 4]
    with torch.no_grad():
        inputs = inputs_of(processor.image_processor, pictures)
        expected = model.eval().get_image_features(**inputs).pooler_output
    torch.testing.assert_close(found.features, F.normalize(expected, dim=-1))


def test_masked_features_are_the_same_each_time_and_differ_from_whole_ones(make_model, make_clip, processor):
    images = ImageSet([(random_picture(i), i) for i in range(5)])
    model = make_model({"name": "random", "mask_ratio": 0.75})
    whole = Encoder(model, processor).encode_images(images).features
    masked, again = (Encoder(model, processor, apply_patch_mask=True).encode_images(images).features for _ in range(2))
    torch.testing.assert_close(masked, again, rtol=0, atol=0)
    assert (masked - whole).norm(dim=1).min() > 1e-3
    with pytest.raises(ValueError, match="a CLIPModel has no patch mask; load it as a MaskCLIPModel"):
        Encoder(make_clip(), processor, apply_patch_mask=True)


def test_text_features_do_not_depend_on_padding_and_long_texts_are_cut(encoder):
    texts = ["a ball", "a small house " * 100, "two fish"]
    alone = torch.cat([encoder.encode_texts([text]) for text in texts])
    torch.testing.assert_close(encoder.encode_texts(texts), alone)


def test_what_cannot_be_decoded_is_left_out_and_counted(encoder):
    samples = [(lambda: None, 0), (lambda: random_picture(1), 1), (random_picture(2), 2), (lambda: None, 3)]
    found = encoder.encode_images(ImageSet(samples))
    assert (found.targets, found.num_undecodable, len(found.features)) == ([1, 2], 2, 2)


@pytest.mark.parametrize(
    ("unreadable", "readable", "message"),
    [
        (3, 2, "3 of 5 pictures of the evaluation data cannot be read"),
        (2, 0, "2 of 2 pictures of the evaluation data cannot be read"),
        (0, 0, "the evaluation data is empty"),
    ],
)
def test_data_of_which_more_than_half_cannot_be_read_is_no_evaluation(unreadable, readable, message, encoder):
    samples = [(lambda: None, 0)] * unreadable + [(random_picture(n), n) for n in range(readable)]
    with pytest.raises(ConfigError, match=message):
        encoder.encode_images(ImageSet(samples))


def test_pictures_may_be_paths_and_what_is_none_is_named(encoder, tmp_path):
    random_picture(3).save(tmp_path / "x.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    file = str(tmp_path / "x.png")
    found = encoder.encode_images(
        ImageSet([(file, 0), (tmp_path / "x.png", 1), (random_picture(3), 2), (tmp_path / "no.png", 3)])
    )
    assert (found.targets, found.num_undecodable) == ([0, 1, 2], 1)
    torch.testing.assert_close(found.features[0], found.features[2], rtol=0, atol=1e-6)
    assert len(set(found.hashes)) == 1
    for wrong, message in ((str(tmp_path / "absent.png"), "absent.png"), (7, "a picture of type int")):
        with pytest.raises(ConfigError, match=message):
            encoder.encode_images(ImageSet([(wrong, 0)]))


class CountedSamples:
    """Four pictures, and how often they were read."""

    def __init__(self):
        self.times_read = 0

    def __iter__(self):
        self.times_read += 1
        return iter([(random_picture(i), i) for i in range(4)])


def test_pictures_with_a_fingerprint_are_encoded_once(encoder):
    samples = CountedSamples()
    for _ in range(3):
        encoder.encode_images(ImageSet(samples, "four pictures"))
    assert samples.times_read == 1
    encoder.encode_images(ImageSet(samples, "others"))
    encoder.encode_images(ImageSet(samples))
    encoder.encode_images(ImageSet(samples))
    assert samples.times_read == 4


def test_kept_features_are_those_of_the_weights_the_processor_and_the_mask(make_model, processor, tokenizer, tmp_path):
    samples = CountedSamples()
    images = ImageSet(samples, "four pictures")

    def features(seed=0, processor=processor, **kwargs) -> torch.Tensor:
        return Encoder(make_model(seed=seed), processor, cache_dir=tmp_path, **kwargs).encode_images(images).features

    first = features()
    torch.testing.assert_close(features(), first, rtol=0, atol=0)
    assert samples.times_read == 1
    size = {"height": 32, "width": 32}
    other_crop = CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=size), tokenizer)
    for number, changed in enumerate(({"seed": 1}, {"processor": other_crop}, {"apply_patch_mask": True})):
        assert (features(**changed) - first).norm() > 1e-3, changed
        assert samples.times_read == number + 2, changed
    bf16 = Encoder(make_model().to(torch.bfloat16), processor, cache_dir=tmp_path).encode_images(images).features
    assert samples.times_read == 5
    assert 0 < (bf16 - first).norm() < 0.2
    assert len(list(tmp_path.iterdir())) == 5


def test_a_record_says_what_the_result_depends_on(make_model, processor, tokenizer):
    about = Encoder(make_model(), processor).describe()
    assert about["precision"] == "float32"
    assert about["image_backend"] == "torchvision"
    assert about["patch_mask"] is None
    assert (about["resize"], about["crop"]) == ({"shortest_edge": 32}, {"height": 32, "width": 32})
    assert set(about["versions"]) >= {"hf_maskclip", "transformers", "torch"}
    assert about["model_hash"] != Encoder(make_model(seed=1), processor).model_hash
    pil = CLIPProcessor(CLIPImageProcessorPil(do_center_crop=False), tokenizer)
    masked = Encoder(make_model("random"), pil, apply_patch_mask=True).describe()
    assert (masked["image_backend"], masked["crop"], masked["patch_mask"]["name"]) == ("pil", None, "random")


def test_pictures_of_every_mode_are_encoded(encoder):
    modes = ("RGB", "L", "RGBA", "P", "CMYK", "1")
    found = encoder.encode_images(ImageSet([(Image.new(mode, (20, 30)), mode) for mode in modes]))
    assert found.targets == list(modes)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(found.features[[0, 4]], 2))
