"""Numbered pieces of work, shared over processes: the same pieces on any number of them, so that results do not change."""

from accelerate import PartialState
from accelerate.utils import gather_object


def is_mine(number: int) -> bool:
    """Whether the piece of this number falls to this process."""
    state = PartialState()
    return number % state.num_processes == state.process_index


def gather_shares(shares: list[tuple]) -> list[tuple]:
    """The pieces of all processes, tuples that begin with their numbers, in order, on every process."""
    everywhere = gather_object(shares) if PartialState().num_processes > 1 else shares
    return sorted(everywhere, key=lambda share: share[0])
