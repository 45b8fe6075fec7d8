"""Proves what the documentation says of other programs that load a model of another family than CLIP: sentence-transformers
encodes as the model does, or its texts are known to be wrong; ONNX Runtime gives the model's scores."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from families import SIDE, make_plain, save_folder
from helpers import CAPTIONS, random_picture
from transformers import AutoModel, AutoProcessor

from hf_maskclip.evaluation import ImageSet
from hf_maskclip.evaluation.runner import load_encoder

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hub.md"
PICTURES = [random_picture(number, (40, 40)) for number in range(2)]


@pytest.fixture
def save(tmp_path):
    def save(name: str) -> Path:
        make_plain(name).save_pretrained(save_folder(name, tmp_path / "model"))
        return tmp_path / "model"

    return save


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metaclip_2", "altclip", "chinese_clip", "clipseg", "siglip"])
def test_sentence_transformers_encodes_pictures_and_all_texts_but_siglips(name, save):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is of the test extra")
    encoder = load_encoder(str(save(name)), image_backend="torchvision")
    there = sentence_transformers.SentenceTransformer(str(save(name)), device="cpu")
    images = encoder.encode_images(ImageSet([(picture, 0) for picture in PICTURES])).features
    torch.testing.assert_close(torch.tensor(there.encode(PICTURES, normalize_embeddings=True)), images, rtol=0, atol=1e-5)
    texts = torch.tensor(there.encode(CAPTIONS, normalize_embeddings=True)) - encoder.encode_texts(CAPTIONS)
    assert (texts.abs().max() < 1e-5) == (name != "siglip")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:# The axis name")  # inputs share the axes of texts, which is meant
@pytest.mark.parametrize("name", ["chinese_clip", "siglip"])
def test_the_pages_code_for_onnx_gives_equal_scores(name, save, tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is of the test extra")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is of the test extra")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL) if "onnx" in code]
    padding = {"padding": True}
    if name == "siglip":  # as the page says below
        padding = {"padding": "max_length"}
        for before, after in (("padding=True", 'padding="max_length"'), ('{0: "texts", 1: "tokens"}', '{0: "texts"}')):
            assert before in code
            code = code.replace(before, after)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("runs/quickstart/export", str(save(name))), {})

    model, processor = AutoModel.from_pretrained(save(name)), AutoProcessor.from_pretrained(save(name))
    inputs = dict(processor.tokenizer(CAPTIONS[:3], return_tensors="pt", **padding))
    inputs["pixel_values"] = torch.randn(4, 3, SIDE, SIDE)
    session = onnxruntime.InferenceSession("clip.onnx", providers=["CPUExecutionProvider"])
    scores = session.run(None, {key: value.numpy() for key, value in inputs.items()})[0]
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
    assert expected.shape == (4, 3)
    assert expected.std() > 1e-3
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
