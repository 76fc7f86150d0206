"""Divides the panels of a just-in-time kernel's weight among threads; ctypes lets go of Python's lock for a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import torch

THREAD_BYTES = 1 << 17  # of codes: with less a thread is not worth starting


def parts(panels: int, nbytes: int) -> list[tuple[int, int]]:
    """First panel and the one after the last, for each thread; at most torch's number of threads.

    Args:
        panels: at least one.
        nbytes: of their codes.
    """
    threads = min(torch.get_num_threads(), panels, max(1, nbytes // THREAD_BYTES))
    return list(pairwise(panels * i // threads for i in range(threads + 1)))


def run(kernel: Callable[..., None], calls: Sequence[tuple[int, ...]]) -> None:
    """All calls at the same time, one of them in this thread."""
    waiting = [_pool(len(calls) - 1).submit(kernel, *arguments) for arguments in calls[1:]]
    kernel(*calls[0])
    for each in waiting:
        each.result()


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="quantkit")
