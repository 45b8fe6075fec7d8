"""Drawn scenes as a data source: an endless supply of pairs, decoded by drawing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .scene_drawing import draw_scene
from .scenes import caption_scene, sample_scene
from .source import Source

NAME = "scenes"
# An epoch: shards x scenes in each. The supply is endless; another epoch draws the same again in another order.
SHARDS, SCENES_PER_SHARD = 1024, 1024


@dataclass
class SceneDecoder:
    """Draws the scene of a row, at `image_size` pixels, and says what it shows. (`crop_scale` changes nothing.)"""

    image_size: int = 224
    crop_scale: float = 0.0

    def __call__(self, row: dict[str, Any], rng: np.random.Generator) -> tuple[Image.Image, str]:
        return self.picture(row), caption_scene(row["scene"], rng)

    def picture(self, row: dict[str, Any]) -> Image.Image:
        return draw_scene(row["scene"], self.image_size)[0]

    def captions(self, row: dict[str, Any], rng: np.random.Generator) -> list[str]:
        return [caption_scene(row["scene"], rng)]


def open_scenes(split: str, seed: int) -> Source:
    """The scenes of a split.

    Captions say left and right, so pictures must not be flipped. Scenes are independent of each other, so none is shuffled.
    """
    gen_kwargs = {"shards": list(range(SHARDS)), "split": split, "seed": seed}
    stream = datasets.IterableDataset.from_generator(_sample_scenes, gen_kwargs=gen_kwargs)
    return Source(NAME, stream, SceneDecoder(), may_flip=False, needs_shuffling=False, eval_data=NAME)


def _sample_scenes(shards: list[int], split: str, seed: int) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for index in range(shard * SCENES_PER_SHARD, (shard + 1) * SCENES_PER_SHARD):
            yield {"__key__": f"{split}-{index:08d}", "scene": sample_scene(index, seed=seed, split=split)}
