"""What is slow to come, such as rows from another machine, is fetched while what came before is used."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TypeVar

T = TypeVar("T")


def one_ahead(make: Callable[[Event], Iterator[T]]) -> Iterator[T]:
    """The items of an iterator, each made by a thread while the one before is used. What making one raises comes in its place.

    The thread ends with the items, or where the reader stops. It starts with the first item, so in no process that forks.

    Args:
        make: the iterator. It has to end soon once the event that it is given is set.
    """
    has_stopped = Event()
    items = make(has_stopped)
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
    finally:
        has_stopped.set()
        thread.shutdown(cancel_futures=True)
