"""What a long run must not let grow: memory and live objects at rest, and the slope of each with its interval.

At rest means: nothing attached, no cache held, garbage collected and freed memory given back to the system
(`malloc_trim`). What is left then is what the process keeps for ever. Objects from before the meter are not counted.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from soak_memory import parts, resident, settle
from transformers import Cache

BLOCKS = 12
"""Means of so many stretches are fitted, not the samples: neighbours are not independent of each other."""
IN_USE_PER_HOUR = 1e6
SHARE_PER_HOUR = 0.01
"""Flat is what surely grows by less an hour (the slope's upper end): bytes in use, and resident memory's share."""
KINDS = ("settled", "own", "mapped", "in_use", "gaps", "raw")
COUNTS = ("blocks", "tensors", "tensor_bytes", "caches", "hooks", "files", "threads", "objects")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PER = {"operation": ("operations", 1), "hour": ("seconds", 3600)}


def _entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


class Meter:
    """Samples of this process, taken at rest: time, operations, resident bytes before (`raw`) and after `settle`, who
    holds them (`soak_memory.parts`), `COUNTS`, and live objects by type.

    Args:
        models: whose hooks are counted.
    """

    def __init__(self, models: tuple[torch.nn.Module, ...]) -> None:
        gc.collect()
        # What is there now is not looked at again: a sample then takes a tenth of the time.
        gc.freeze()
        self.models, self.began = models, time.monotonic()
        # On disk: the meter must not see itself grow. Kept in memory, 150 samples were 2 MB.
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "samples.jsonl"
        self._path.touch()

    def sample(self, operations: int) -> None:
        raw = resident()
        settle()
        # Read before anything is counted: counting takes memory itself.
        settled, apart = resident(), parts()
        live = gc.get_objects()
        types = Counter(f"{type(x).__module__}.{type(x).__qualname__}" for x in live)
        # Not isinstance: some lazy modules answer that by importing.
        tensors = [x for x in live if issubclass(type(x), torch.Tensor)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        hooks = [len(getattr(m, name)) for model in self.models for m in model.modules() for name in HOOKS]
        found = {
            "seconds": round(time.monotonic() - self.began, 1), "operations": operations, "raw": raw,
            "settled": settled, **apart, "tensors": len(tensors), "tensor_bytes": sum(storages.values()),
            "caches": sum(issubclass(type(x), Cache) for x in live), "hooks": sum(hooks),
            "files": _entries("/proc/self/fd"), "threads": _entries("/proc/self/task"), "objects": len(live),
        }  # fmt: skip
        with self._path.open("a") as file:
            file.write(json.dumps([found, types]) + "\n")

    def _samples(self) -> list[tuple[dict[str, float], dict[str, int]]]:
        return [tuple(json.loads(line)) for line in self._path.read_text().splitlines()]

    def columns(self) -> dict[str, list[float]]:
        """The samples but for objects by type, by name."""
        rows = [row for row, _ in self._samples()]
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}

    def report(self) -> dict[str, Any]:
        """Slopes over the last two thirds of the time, what grew in them, and the verdicts on memory."""
        columns, types = self.columns(), [Counter(kinds) for _, kinds in self._samples()]
        late = [i for i, s in enumerate(columns["seconds"]) if s >= columns["seconds"][-1] / 3]

        def fit(values: list[float], per: str) -> dict[str, float] | None:
            axis, scale = PER[per]
            return slope([columns[axis][i] / scale for i in late], [values[i] for i in late])

        slopes = {f"{what}_per_{per}": fit(columns[what], per) for what in KINDS for per in PER}
        median = float(np.median([columns["settled"][i] for i in late]))
        limits = {"in_use": IN_USE_PER_HOUR, "settled": SHARE_PER_HOUR * median}
        counts = {name: columns[name] for name in COUNTS}
        counts |= {name: [counted[name] for counted in types] for name in sorted({n for c in types for n in c})}
        grown = []
        for name, values in counts.items():
            found = fit(values, "operation")
            if found is not None and found["low"] > 0 and _rises([values[i] for i in late]):
                grown.append({"what": name, "before": values[late[0]], "after": values[-1]} | found)
        return {
            "slopes": slopes, "settled_median": median, "limits_per_hour": limits,
            "memory": {name: judge(slopes[f"{name}_per_hour"], limit) for name, limit in limits.items()},
            "grown": grown,
        }  # fmt: skip


def slope(x: list[float], y: list[float]) -> dict[str, float] | None:
    """Least squares of `y` on `x` over the means of `BLOCKS` stretches, with its 95 % interval (Student's t).

    None with fewer samples than two for each stretch.
    """
    if len(x) < 2 * BLOCKS:
        return None
    means = [[float(np.mean(part)) for part in np.array_split(np.array(v, np.float64), BLOCKS)] for v in (x, y)]
    if len(set(means[1])) == 1:  # whose regression has no error to speak of, nor has scipy a number for it
        return {"slope": 0.0, "low": 0.0, "high": 0.0}
    found = stats.linregress(*means)
    half = float(stats.t.ppf(0.975, BLOCKS - 2) * found.stderr)
    return {"slope": float(found.slope), "low": float(found.slope) - half, "high": float(found.slope) + half}


def judge(found: dict[str, float] | None, limit: float) -> str:
    """ "flat": surely below `limit`; "grows": surely above 0, and perhaps above `limit`; else "unclear"."""
    if found is None:
        return "unclear"
    if found["high"] < limit:
        return "flat"
    return "grows" if found["low"] > 0 else "unclear"


def _rises(values: list[float]) -> bool:
    """Whether each third lies above the one before on average: one step up, once, is not growth."""
    first, second, third = (float(np.mean(part)) for part in np.array_split(np.array(values), 3))
    return first < second < third
