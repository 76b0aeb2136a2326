"""Work that gives the same bits however many threads there are: each layer's is done by one thread.

torch and the BLAS under numpy split a long sum by their number of threads, and the parts round as they are split. So
what ends up in a file of the run is computed with one thread, and layers go side by side instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")


@contextlib.contextmanager
def threads(count: int) -> Iterator[int]:
    """torch computes with `count` threads in this thread; yields how many it had before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def one_thread() -> Iterator[int]:
    """One thread for all that is computed in the block; yields how many torch had before."""
    with threads(1) as before, threadpool_limits(1):
        yield before


def by_layer(work: Callable[[int], T], layers: Sequence[int], workers: int) -> list[T]:
    """`work` of every layer, in order, `workers` of them at a time with one thread each.

    What `work` raises is raised here, once the layers that were under way are done.
    """
    if not layers:
        return []
    with one_thread(), ThreadPoolExecutor(min(workers, len(layers)), initializer=_alone) as pool:
        try:
            return list(pool.map(work, layers))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _alone() -> None:
    """Settings of OpenMP are each thread's own."""
    threadpool_limits(1, user_api="openmp")
    torch.set_num_threads(1)
