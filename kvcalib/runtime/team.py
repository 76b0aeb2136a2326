"""Compiled loops on the threads that torch's own operations run on.

After an operation, torch's OpenMP threads spin for a while, ready for the next one. Threads of our own would have to be
woken (60 to 100 us, with the interpreter's lock in between) and would share their cores with the spinning ones. Where
torch runs on GNU's OpenMP, its team takes our loop within a few microseconds; elsewhere a pool of threads does.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_LOOP = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(loop: Any, data: int, threads: int) -> None:
    """Call `loop`, a `numba.cfunc` of an address, with `data` on `threads` threads at once, this one among them.

    The calls share the work out among themselves, by a counter in `data`; a thread that comes late finds nothing left.
    """
    if threads <= 1:
        _function(loop.address)(data)
        return
    parallel = _openmp()
    if parallel is not None:
        parallel(loop.address, data, threads, 0)
        return
    call = _function(loop.address)
    waiting = [_pool(threads - 1).submit(call, data) for _ in range(threads - 1)]
    call(data)
    for future in waiting:
        future.result()


@lru_cache
def _function(address: int) -> Callable[[int], None]:
    return _LOOP(address)


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="kvcalib")


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """`GOMP_parallel` of the very library that torch loaded; None if that is not GNU's, or cannot be told."""
    if "OpenMP" not in torch.__config__.parallel_info() or not hasattr(os, "RTLD_NOLOAD"):
        return None
    root = Path(torch.__file__).parent
    own = sorted([*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")])
    for name in [str(path) for path in own] or ["libgomp.so.1"]:
        try:
            # Only what is in memory already: a second copy would have a second team.
            parallel = ctypes.CDLL(name, mode=os.RTLD_NOLOAD).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.restype = None
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return parallel
    return None
