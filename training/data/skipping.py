"""What becomes of samples that give no image-text pair: skipped, counted by cause, logged now and then, and not for ever."""

import logging
from collections import Counter

from hf_maskclip.data.tar_files import UNREADABLE
from hf_maskclip.errors import TrainingStopped

logger = logging.getLogger(__name__)

LOG_EVERY = 1000  # of each cause the first sample is logged, and every so many
WINDOW = 1000  # samples over which the share of skipped ones is taken
EMPTY_EPOCHS = 10  # of a worker, one after the other, in which nothing could be used; each has other shards
SHARD_WINDOW = 20  # shards, over the epochs of a worker, over which the share of lost ones is taken


class SkipMonitor:
    """Watches the samples that a data worker passes over.

    Args:
        max_share: of the last `WINDOW` samples, how many may be skipped, from 0 to 1. With 1 only `EMPTY_EPOCHS` end it.
    """

    def __init__(self, max_share: float):
        self.max_share = max_share
        self.causes: Counter[str] = Counter()
        self._num_recent = 0
        self._recent_causes: Counter[str] = Counter()
        self._recent_shards: Counter[str] = Counter()
        self._shards: set[str] = set()  # of this epoch
        self._lost_shards: set[str] = set()
        self._num_shards = self._num_lost = 0  # since the share of lost ones was taken last
        self._num_empty_epochs = 0
        self._is_epoch_empty = True

    def count_used(self, shard: str = "") -> None:
        self._is_epoch_empty = False
        self._shards.add(shard)
        self._advance()

    def end_epoch(self) -> None:
        """Raises TrainingStopped where too many of the last shards could not be read, each of which is but one sample, or where
        the last epochs had nothing to use."""
        self._num_empty_epochs = self._num_empty_epochs + 1 if self._is_epoch_empty else 0
        self._is_epoch_empty = True
        if self._num_empty_epochs == EMPTY_EPOCHS and self.max_share == 1:  # below that the last samples end it
            raise TrainingStopped(f"no image-text pair in {EMPTY_EPOCHS} epochs of a data worker ({_in_words(self.causes)})")
        self._num_shards += len(self._shards)
        self._num_lost += len(self._lost_shards)
        example = min(self._lost_shards, default="")
        self._shards.clear()
        self._lost_shards.clear()
        if self._num_shards < SHARD_WINDOW:
            return
        if self._num_lost > self.max_share * self._num_shards:
            raise TrainingStopped(
                f"{self._num_lost} of the last {self._num_shards} shards could not be read to their end, such as {example}; "
                f"max_skipped_share={self.max_share} are allowed"
            )
        self._num_shards = self._num_lost = 0

    def count_skipped(self, cause: str, key: str, shard: str) -> None:
        """Raises TrainingStopped where too many are skipped, with their causes and the shard that has the most of them."""
        self._shards.add(shard)
        if cause == UNREADABLE:
            self._lost_shards.add(shard)
        self.causes[cause] += 1
        self._recent_causes[cause] += 1
        self._recent_shards[shard] += 1
        if self.causes[cause] == 1 or self.causes[cause] % LOG_EVERY == 0:
            logger.warning("skipped: %s (number %d) in %s, key %s", cause, self.causes[cause], shard, key)
        self._advance()

    def _advance(self) -> None:
        self._num_recent += 1
        if self._num_recent < WINDOW:
            return
        num_skipped = self._recent_causes.total()
        if num_skipped > self.max_share * WINDOW:
            (shard, count), *_ = self._recent_shards.most_common(1)
            raise TrainingStopped(
                f"{num_skipped} of the last {WINDOW} samples gave no image-text pair ({_in_words(self._recent_causes)}), "
                f"{count} of them in {shard}; max_skipped_share={self.max_share} are allowed"
            )
        self._num_recent = 0
        self._recent_causes.clear()
        self._recent_shards.clear()


def _in_words(causes: Counter[str]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in causes.most_common())
