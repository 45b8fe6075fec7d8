"""The order of rows: shuffled inside windows. So a reader goes on from any place of an epoch by reading one window again."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice, takewhile
from threading import Event
from typing import Any, NamedTuple

import datasets
import numpy as np

from training.data.read_ahead import one_ahead

UNSHUFFLED_WINDOW = 256  # rows; as many are read again where a run goes on with rows that are not shuffled

# The buffer of `shuffle` holds a single row here, so nothing of it is lost where a stream goes on, and there is nothing to say.
logging.getLogger("datasets.iterable_dataset").addFilter(lambda record: "state dict of a shuffle buffer" not in record.msg)


class Place(NamedTuple):
    """Where a reader is: after so many rows of a window.

    Attributes:
        epoch: its number.
        window: its number in the epoch.
        start: the state of the stream before the window's first row; None at the beginning of the epoch.
        used: rows of the window, in their shuffled order.
    """

    epoch: int = 0
    window: int = 0
    start: dict[str, Any] | None = None
    used: int = 0


class Windows:
    """The rows of a stream in their order. At most two windows of undecoded rows are in memory: the next is read ahead.

    Args:
        open_epoch: the stream of an epoch, by its number, with its shards in an order of their own.
        size: rows of a window, which are shuffled; below 2 they keep their order.
        order: what the order inside windows depends on, besides their numbers, such as seed and worker.
    """

    def __init__(self, open_epoch: Callable[[int], datasets.IterableDataset], size: int, order: list[int]):
        self.open_epoch, self.size, self.order = open_epoch, size, order

    def epoch_from(self, place: Place) -> Iterator[tuple[dict[str, Any], Place]]:
        """The rows of an epoch from a place on, each with the place after it."""
        stream = self.open_epoch(place.epoch)
        if place.start:
            stream.load_state_dict(place.start)
        _, number, start, used = place
        with closing(one_ahead(partial(self._read, stream, number))) as windows:
            for window, after in windows:
                for count, index in enumerate(self._order(place.epoch, number, len(window))[used:], start=used + 1):
                    row, window[index] = window[index], None  # makes room for the next window
                    yield row, Place(place.epoch, number, start, count)
                number, start, used = number + 1, after, 0

    def _read(self, stream: datasets.IterableDataset, number: int, has_stopped: Event) -> Iterator[tuple[list[Any], dict]]:
        """The rows of each window from a number on, with the state of the stream after them."""
        rows = takewhile(lambda row: not has_stopped.is_set(), stream)
        while window := list(islice(rows, self._length(number))):
            yield window, stream.state_dict()
            number += 1

    def _length(self, window: int) -> int:
        """The rows of a window. The first has one more, lest windows end where shards of a round number of rows do.

        From there the stream would go on by reading that shard again, to its end.
        """
        return (self.size if self.size > 1 else UNSHUFFLED_WINDOW) + (window == 0)

    def _order(self, epoch: int, window: int, length: int) -> np.ndarray:
        """The order of the rows of a window."""
        if self.size < 2:
            return np.arange(length)
        return np.random.default_rng([*self.order, epoch, window]).permutation(length)
