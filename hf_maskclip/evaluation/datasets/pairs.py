"""Pairs for retrieval, in any form that training takes."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.decoding import SkippedSample
from ...data.sources import open_source
from ..encoder import ImageSet
from ..tasks import Evaluation, Rows, retrieval

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairKeys:
    """The fields of pictures and captions, as options name them; empty: the known ones."""

    image_key: str = ""
    caption_key: str = ""


def pairs(name: str, paths: list[str], keys: PairKeys, split: str) -> Evaluation:
    """Retrieval among pictures and captions. A sample without a caption is left out."""
    sources = [open_source(path, split=split, image_key=keys.image_key, caption_key=keys.caption_key) for path in paths]
    for source in sources:
        source.check()
    decoder = sources[0].decoder

    def captions(row: dict[str, Any]) -> list[str] | None:
        try:
            return decoder.captions(row, np.random.default_rng(0))
        except SkippedSample as cause:
            logger.warning("%s: evaluation leaves out %s (%s)", name, row.get("__key__"), cause)
            return None

    rows = Rows([source.stream for source in sources], captions, decoder, name)
    return retrieval(name, ",".join(paths), ImageSet(rows), split)
