"""Pictures, shards, masks and records that tests make and read. What pytest hands to tests is in conftest.py."""

import io
import json
import shutil
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import nn
from transformers import AutoModel, CLIPModel

from hf_maskclip import ContrastiveLoss, PatchSelection, build_patch_mask
from hf_maskclip.models.patch_masking import patchify
from training.tracking import read_metrics

IMAGE_SIZE, PATCH_SIZE, CONTEXT_LENGTH = 32, 8, 32
CAPTIONS = ["a red ball on grass", "two blue fish", "a small house", "a green tree left of a car"]
SAME = ("step", "loss", "learning_rate", "logit_scale", "kept_patches", "samples_seen", "skipped")
# Of the weights of each tower, the first parts of their names.
TOWERS = {"vision": ("vision_model.", "visual_projection."), "text": ("text_model.", "text_projection.")}
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


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
    mask, device = build_patch_mask(spec, patch_size=8), images.device
    num_patches = patchify(images, 8).shape[1]
    embeds = torch.randn(len(images), num_patches, 12, generator=torch.Generator().manual_seed(1)).to(device)
    if mask.needs_patch_scores and "patch_scores" not in kwargs:
        scores = torch.rand(len(images), num_patches, generator=torch.Generator().manual_seed(seed + 100))
        kwargs["patch_scores"] = scores.to(device)
    return mask(images, embeds, generator=torch.Generator(device).manual_seed(seed), **kwargs)


def rows_of(selection: PatchSelection) -> list[list[int]]:
    lengths = [selection.indices.shape[1]] * len(selection.indices) if selection.lengths is None else selection.lengths.tolist()
    return [row[:length] for row, length in zip(selection.indices.tolist(), lengths, strict=True)]


def assert_uniform(visible: torch.Tensor) -> None:
    """Each share is a mean of 1000 draws: it lies within five standard errors of the mean of all."""
    shares = visible.double().mean(dim=0)
    assert len(visible) == 1000
    assert 0.1 < shares.mean() < 0.9
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


def reset_accelerate() -> None:
    """Let the next Accelerator be a first one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def losses_of(output_dir: str | Path) -> list[dict]:
    """The records of a run's steps, without those of its evaluations."""
    return [record for record in read_metrics(Path(output_dir) / "metrics.jsonl") if "loss" in record]


def require(package: str) -> None:
    """Skip the test where a package of the extras is absent. Does not import it, which can take seconds."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -e '.[test,demo]'")


def shared_data(name: str) -> Path:
    """A folder of the developers' sample data; the test skips itself where it is absent."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"the sample data {folder} is not here")
    return folder


def words(options: dict) -> list[str]:
    """Options as on the command line."""
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def same(records: list[dict]) -> list[tuple]:
    """What has to be equal, to the last bit, in two runs of the same options."""
    return [tuple(record[key] for key in SAME) for record in records]


def as_killed_at(folder: Path, step: int) -> None:
    """Leave what a run has on its disk when it is killed a step after a checkpoint: later ones, results and half a line."""
    for checkpoint in (folder / "checkpoints").glob("step-????????"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            checkpoint.rename(checkpoint.with_suffix(".partial"))  # not complete
    shutil.rmtree(folder / "export")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')


class FailingLoss(ContrastiveLoss):
    """Not a number at one of its calls."""

    fails_at = 0

    def forward(self, *args):
        FailingLoss.fails_at -= 1
        return super().forward(*args) * (float("nan") if FailingLoss.fails_at == 0 else 1.0)


def without_speed(results: dict[str, dict]) -> dict[str, dict]:
    """Records of evaluations without what depends on the machine."""
    return {name: {key: record[key] for key in record if key not in ("speed", "hardware")} for name, record in results.items()}


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights of an export, which has to be a whole and plain CLIP."""
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is CLIPModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.state_dict()


def unchanged(folder: str | Path, base: str | Path) -> set[str]:
    """The weights that are the same in two folders, to the last bit."""
    after, before = weights_of(folder), weights_of(base)
    return {key for key, value in before.items() if torch.equal(value, after[key])}


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def assert_equal_gradients(given: list[torch.Tensor], expected: list[torch.Tensor], rtol: float) -> None:
    assert len(given) == len(expected)
    assert sum(gradient.abs().max() > 1e-4 for gradient in expected) > 20
    for gradient, want in zip(given, expected, strict=True):
        # The gradient of a key's bias is zero but for rounding.
        torch.testing.assert_close(gradient, want, rtol=rtol, atol=max(1e-6, rtol * want.abs().max().item()))
