"""What a Linux process has in memory, by who holds it: the C library's blocks in use, pages of its own, mapped files.

Resident memory alone cannot tell a leak from a heap with gaps or from library code that was read in at last. Bytes in
use can: they are what somebody asked `malloc` for and did not free, wherever it lies.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2` (malloc.h, since 2.33)."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO]


_C = ctypes.CDLL(None)
_C.mallinfo2.restype = _MallInfo
_C.mallinfo2.argtypes = []


def settle() -> None:
    """Collect garbage and give freed memory back to the system."""
    for _ in range(2):
        gc.collect()
    _C.malloc_trim(0)


def resident() -> int:
    """Bytes of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def parts() -> dict[str, int]:
    """Bytes, and Python's blocks.

    own, mapped: resident pages without and with a file behind them. in_use: of `malloc`, all arenas and large blocks;
    gaps: what its arenas keep free, resident or not. blocks: of Python's own allocator, of at most 512 bytes each.
    """
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))
    pages = {name: 1024 * int(size) for name, size, _ in lines}
    heap = _C.mallinfo2()
    return {
        "own": pages["RssAnon:"], "mapped": pages["RssFile:"], "in_use": heap.uordblks + heap.hblkhd,
        "gaps": heap.fordblks, "blocks": sys.getallocatedblocks(),
    }  # fmt: skip
