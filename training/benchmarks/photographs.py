"""Shards of pictures like photographs, made for the occasion, for what measures a loader."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_shards(folder: Path, count: int, samples: int) -> str:
    """Shards of JPEGs of 640 x 480 pixels with the 1/f spectrum of photographs; returns their brace pattern."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(480)[:, None], np.fft.rfftfreq(640)[None]).clip(1 / 640)
    pictures = []
    for _ in range(16):
        noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, 480, 640))) / frequency**1.2, s=(480, 640))
        pixels = (128 + 60 * noise / noise.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    for shard in range(count):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(samples):
                caption = f"a photograph of thing number {rng.integers(1000)} in place {rng.integers(1000)}".encode()
                for extension, content in (("jpg", pictures[rng.integers(16)]), ("txt", caption)):
                    info = tarfile.TarInfo(f"{shard}-{number:04d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/{{0..{count - 1}}}.tar"
