"""Several threads at once: each with a model of its own, and all on one attached model, without and with a lock."""

from __future__ import annotations

import argparse
import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

from soak_modes import Bed, Found, use

Given = tuple[str, str, int]
OWN, SHARED, QUEUED = "threads: own models, artifacts swapped", "threads: one model", "threads: one model, a lock"
PARALLEL = (OWN, SHARED, QUEUED)
# torch has one random state for all threads.
ALONE = ("sampling", "several returned")


def side_by_side(
    kind: str, beds: list[Bed], way: str, dice: random.Random, options: argparse.Namespace
) -> list[tuple[Given, Found]]:
    """Run kept cases in several threads; what was asked and what came."""
    modes = [mode for mode in options.modes if mode not in ALONE]
    jobs = [[(dice.choice(modes), dice.randrange(options.seeds)) for _ in range(2)] for _ in range(3)]
    if kind == OWN:
        return _own(beds, way, dice, options.ways, jobs)
    lock = threading.Lock() if kind == QUEUED else contextlib.nullcontext()

    def work(mine: list[tuple[str, int]]) -> list[tuple[Given, Found]]:
        found = []
        for mode, seed in mine:
            with lock:
                found.append(((way, mode, seed), use(beds[0], mode, seed)))
        return found

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [pair for part in pool.map(work, jobs) for pair in part]


def _own(
    beds: list[Bed], way: str, dice: random.Random, every: list[str], jobs: list[list[tuple[str, int]]]
) -> list[tuple[Given, Found]]:
    """The other beds run their jobs on artifacts of their own, while the first one's artifact is swapped twice."""
    ways = [way, *(dice.choice(every) for _ in beds[1:])]
    swaps = [dice.choice(every), way]

    def work(number: int) -> list[tuple[Given, Found]]:
        bed, mine = beds[number], ways[number]
        found = []
        if number:
            bed.attach(mine)
        for (mode, seed), after in zip(jobs[number], swaps, strict=True):
            found.append(((mine, mode, seed), use(bed, mode, seed)))
            if number == 0:
                bed.detach()
                mine = after
                bed.attach(mine)
        if number:
            bed.detach()
        return found

    with ThreadPoolExecutor(len(beds)) as pool:
        return [pair for part in pool.map(work, range(len(beds))) for pair in part]
