"""The sources that a run trains on, one or several, and the share of each in its samples."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest

from PIL import Image

from hf_maskclip.data.mix import read_mix
from hf_maskclip.data.source import Source
from hf_maskclip.data.sources import open_source
from training.config import TrainingConfig


@dataclass
class MixedSource:
    """A source of a run.

    Attributes:
        name: that no other source of the run has.
        share: of the samples of the run.
        keys: `image_key` and `caption_key` of its rows.
    """

    name: str
    source: Source
    share: float
    keys: tuple[str, str]


class Mix:
    """The sources of a run."""

    def __init__(self, sources: list[MixedSource]):
        self.sources = sources

    @classmethod
    def open(cls, config: TrainingConfig) -> "Mix":
        """The sources that the options name. Raises ConfigError where one of them cannot be read."""
        parts, seen = read_mix(config.train_data), Counter[str]()
        total = sum(part.weight for part in parts)
        sources = []
        for part in parts:
            seen[part.data] += 1  # one source comes twice where each time another caption of it is read
            name = part.data if seen[part.data] == 1 else f"{part.data} #{seen[part.data]}"
            image_key, caption_key = part.image_key or config.image_key, part.caption_key or config.caption_key
            source = open_source(part.data, seed=config.seed, image_key=image_key, caption_key=caption_key)
            sources.append(MixedSource(name, source, part.weight / total, (image_key, caption_key)))
        return cls(sources)

    @property
    def with_fewest_shards(self) -> MixedSource:
        return min(self.sources, key=lambda mixed: mixed.source.stream.num_shards)

    @property
    def num_shards(self) -> int:
        """Over all sources."""
        return sum(mixed.source.stream.num_shards for mixed in self.sources)

    @property
    def eval_data(self) -> str:
        """What a run is evaluated on by default; empty: nothing."""
        return next((mixed.source.eval_data for mixed in self.sources if mixed.source.eval_data), "")

    def check(self, to_the_end: bool = False) -> None:
        """As [`Source.check`], of each source."""
        for mixed in self.sources:
            mixed.source.check(to_the_end)

    def captions(self, limit: int) -> dict[str, list[str]]:
        """The captions of the first samples of each source, by its name: of `limit` samples its share."""
        return {mixed.name: list(mixed.source.captions(math.ceil(mixed.share * limit))) for mixed in self.sources}

    def pairs(self) -> Iterator[tuple[Image.Image, str]]:
        """The pairs of the sources, which take turns."""
        return (pair for turn in zip_longest(*(mixed.source.pairs() for mixed in self.sources)) for pair in turn if pair)

    def pictures(self, count: int) -> list[Image.Image]:
        """The first `count` pictures of [`pairs`]."""
        return [picture for picture, _ in islice(self.pairs(), count)]
