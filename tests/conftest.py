"""Tiny models, tokenizers and data that the tests share. No network, no downloads."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from processes import without_pictures
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from hf_maskclip import MaskCLIPConfig, MaskCLIPModel, PatchSelection, build_patch_mask
from hf_maskclip.models import patch_mask_registry
from hf_maskclip.models.patch_masking import patchify
from training.config import TrainingConfig
from training.model.tokenizer import train_tokenizer
from training.tracking import read_metrics
from training.train import main

IMAGE_SIZE, PATCH_SIZE, CONTEXT_LENGTH = 32, 8, 32
CAPTIONS = ["a red ball on grass", "two blue fish", "a small house", "a green tree left of a car"]
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def built_in_masks_only(monkeypatch):
    """A mask that one test registers is unknown to the next."""
    monkeypatch.setattr(patch_mask_registry, "_registered", {})


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(CAPTIONS * 5, vocab_size=1000, context_length=CONTEXT_LENGTH)


@pytest.fixture(scope="session")
def config_parts(tokenizer):
    """Keyword arguments of a tiny `CLIPConfig`: a fresh dict at each call."""

    def make() -> dict:
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        tokens = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        text = tower | tokens | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT_LENGTH}
        vision = tower | {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
        parts = {"text_config": text | {"projection_dim": 24}, "vision_config": vision | {"projection_dim": 24}}
        return parts | {"projection_dim": 24}

    return make


@pytest.fixture
def make_clip(config_parts):
    def make(seed: int = 0) -> CLIPModel:
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig(**config_parts()))

    return make


@pytest.fixture
def make_model(config_parts):
    def make(patch_mask="pgs", seed: int = 0) -> MaskCLIPModel:
        parts = config_parts()
        parts["vision_config"]["patch_mask"] = patch_mask
        torch.manual_seed(seed)
        return MaskCLIPModel(MaskCLIPConfig(**parts))

    return make


@pytest.fixture(scope="session")
def processor(tokenizer):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


@pytest.fixture
def inputs(tokenizer):
    """A batch of four pictures and captions, as the models take them."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"pixel_values": pixel_values, "input_ids": tokenizer(CAPTIONS, padding=True, return_tensors="pt")["input_ids"]}


def photo_like(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Images (B, 3, H, W) with the 1/f spectrum of photographs and a bright textured disc on each, normalised roughly."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]).clamp(
        min=1 / max(height, width)
    )
    noise = torch.fft.rfft2(torch.randn(batch, 3, height, width, generator=generator))
    images = torch.fft.irfft2(noise / frequency**1.2, s=(height, width))
    images = images / images.std(dim=(1, 2, 3), keepdim=True)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    disc = torch.hypot(y - height / 2, x - width / 2) < min(height, width) / 4
    return torch.where(disc, images.roll(7, -1) * 0.5 + 1.5, images * 0.5)


def select_patches(spec, images, seed=0, **kwargs) -> PatchSelection:
    """Run a mask; the attention of its teacher, where it has one, changes with the seed as it would with the epoch."""
    mask = build_patch_mask(spec, patch_size=8)
    num_patches = patchify(images, 8).shape[1]
    embeds = torch.randn(len(images), num_patches, 12, generator=torch.Generator().manual_seed(1))
    if mask.needs_patch_scores and "patch_scores" not in kwargs:
        kwargs["patch_scores"] = torch.rand(len(images), num_patches, generator=torch.Generator().manual_seed(seed + 100))
    return mask(images, embeds, generator=torch.Generator().manual_seed(seed), **kwargs)


def rows_of(selection: PatchSelection) -> list[list[int]]:
    lengths = [selection.indices.shape[1]] * len(selection.indices) if selection.lengths is None else selection.lengths.tolist()
    return [row[:length] for row, length in zip(selection.indices.tolist(), lengths, strict=True)]


def assert_uniform(visible: torch.Tensor) -> None:
    """Each share is a mean of 1000 draws: it lies within five standard errors of the mean of all."""
    shares = visible.double().mean(dim=0)
    assert len(visible) == 1000 and 0.1 < shares.mean() < 0.9
    assert (shares - shares.mean()).abs().max() < 5 * (shares.mean() * (1 - shares.mean()) / 1000).sqrt()


def encode_image(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def random_picture(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """A picture of one colour with noise on it, so that a few steps of training can tell pictures apart."""
    rng = np.random.default_rng(seed)
    noisy = rng.integers(0, 216, 3) + rng.integers(0, 40, (size[1], size[0], 3))
    return Image.fromarray(noisy.astype(np.uint8))


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """Write a webdataset shard: key -> extension -> content."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def pair(number: int, caption: str | None = None) -> dict[str, bytes]:
    caption = caption or f"{CAPTIONS[number % 4]} number {number}"
    return {
        "png": encode_image(random_picture(number)),
        "txt": caption.encode(),
        "json": json.dumps({"captions": [f"first of {number}", f"second of {number}"]}).encode(),
    }


@pytest.fixture
def shards(tmp_path):
    """Three shards of 20, 12 and 7 pairs, under keys 000 to 038."""
    numbers = iter(range(39))
    for index, count in enumerate((20, 12, 7)):
        samples = {f"{number:03d}": pair(number) for number in (next(numbers) for _ in range(count))}
        write_shard(tmp_path / f"train-{index:03d}.tar", samples)
    return tmp_path


@pytest.fixture
def data(tmp_path):
    """Four training shards and one validation shard, all of random pictures."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(4):
        write_shard(folder / f"train-{index}.tar", {f"{index}-{n}": pair(5 * index + n) for n in range(5)})
    write_shard(folder / "val-0.tar", {f"v{n}": pair(100 + n) for n in range(6)})
    return folder


@pytest.fixture
def options(data, tmp_path) -> dict:
    """Those of a short run on the small data."""
    places = {"output_dir": str(tmp_path / "run"), "train_data": f"{data}/train-*.tar"}
    return places | {"batch_size": 4, "max_steps": 4, "num_workers": 0, "mixed_precision": "no", "vocab_size": 1000}


@pytest.fixture
def run(options, monkeypatch):
    """Run `main` on the small data and return its summary, its records of losses, and its folder."""

    def run(pictures: bool = False, **changed):
        reset_accelerate()
        config = TrainingConfig(**(options | changed))
        with monkeypatch.context() as patch:
            if not pictures:
                without_pictures(patch)
            summary = main(config)
        return summary, losses_of(config.output_dir), Path(config.output_dir)

    return run


def reset_accelerate() -> None:
    """Let the next Accelerator be a first one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    reset_accelerate()


def losses_of(output_dir: str | Path) -> list[dict]:
    """The records of a run's steps, without those of its evaluations."""
    return [record for record in read_metrics(Path(output_dir) / "metrics.jsonl") if "loss" in record]


def shared_data(name: str) -> Path:
    """A folder of the developers' sample data; the test skips itself where it is absent."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"the sample data {folder} is not here")
    return folder
