"""Time and error of `kvcalib.quant.kmeans` beside the KMeans of scikit-learn that KVQuant (2401.18079) uses.

    python bench/kmeans.py [--points 1000000] [--json bench/results/kmeans.json]

Both get the same float32 values in the same process, after a call that compiles or warms up. A time is the
best of `--repeats` calls (a tenth as many of scikit-learn's, at least 3), because other work on the machine
can only add to it; the JSON also has the processor time, which such work disturbs less. Bar: at least 50
times faster than `KMeans(n_init="auto", max_iter=50)`, and never a larger error.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import sklearn
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans

from kvcalib.quant import kmeans

FASTER = 50
LEVELS = (4, 8, 16)
CHANNEL = 8192


def data(n: int) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Values and weights: the last two have squared normal weights, which resemble Fisher information."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(n).astype(np.float32)
    heavy = rng.standard_t(2, n).astype(np.float32)
    two = np.concatenate([rng.normal(-2, 0.5, n // 2), rng.normal(1, 1, n - n // 2)]).astype(np.float32)
    chi = np.square(rng.standard_normal(n)).astype(np.float32)
    return {
        "normal": (normal, None),
        "student-t, 2 dof": (heavy, None),
        "bimodal": (two, None),
        "lognormal": (np.exp(normal), None),
        "normal, weighted": (normal, chi),
        "student-t, weighted": (heavy, chi),
    }


def best_of(repeats: int, call: Callable[[], Any]) -> tuple[float, float]:
    """Least seconds and least processor seconds of `repeats` calls, after one that is not timed."""
    call()
    wall, processor = [], []
    for _ in range(repeats):
        start, busy = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    return min(wall), min(processor)


def compare(x: np.ndarray, w: np.ndarray | None, levels: int, repeats: int) -> dict[str, float]:
    """Time and error of both on one input."""
    theirs = KMeans(levels, n_init="auto", max_iter=50, random_state=0)
    their_time, their_busy = best_of(max(3, repeats // 10), lambda: theirs.fit(x[:, None], sample_weight=w))
    their_error = kmeans.objective(x, w, theirs.cluster_centers_[:, 0])
    our_time, our_busy = best_of(repeats, lambda: kmeans.fit(x, w, levels))
    our_error = kmeans.objective(x, w, kmeans.fit(x, w, levels))
    return {
        "levels": levels,
        "seconds": our_time,
        "sklearn_seconds": their_time,
        "times_faster": their_time / our_time,
        "processor_seconds": our_busy,
        "sklearn_processor_seconds": their_busy,
        "objective": our_error,
        "sklearn_objective": their_error,
        "objective_ratio": our_error / their_error,
    }


def ladders(repeats: int) -> dict[str, float]:
    """Seconds per channel of 8192 tokens for all codebooks of 0..8 bits: one by one, and 64 at a time."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((CHANNEL, 64)).astype(np.float32)
    w = np.square(rng.standard_normal(x.shape)).astype(np.float32)
    alone, _ = best_of(repeats, lambda: kmeans.fit_ladder(x[:, 0], w[:, 0]))
    together, _ = best_of(max(3, repeats // 10), lambda: kmeans.fit_ladders(x, w))
    return {
        "tokens": CHANNEL,
        "max_bits": 8,
        "fit_ladder_seconds": alone,
        "fit_ladders_seconds_per_channel": together / x.shape[1],
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "platform": platform.platform(),
        "cpu": models[0] if models else platform.processor(),
        "cpu_count": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "scikit_learn": sklearn.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="kmeans beside scikit-learn: time and error")
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "kmeans.json")
    options = parser.parse_args()

    report: dict[str, Any] = {"machine": machine(), "points": options.points, "repeats": options.repeats}
    report["rows"] = []
    table = Table(title=f"k-means of {options.points:,} float32 values: kvcalib beside scikit-learn")
    for column in ("data", "levels", "ours, ms", "sklearn, ms", "times faster", "our error", "its", "ratio"):
        table.add_column(column, justify="left" if column == "data" else "right")
    for name, (x, w) in data(options.points).items():
        for levels in LEVELS:
            row = compare(x, w, levels, options.repeats)
            report["rows"].append({"data": name, **row})
            table.add_row(
                name,
                str(levels),
                f"{row['seconds'] * 1e3:.2f}",
                f"{row['sklearn_seconds'] * 1e3:.0f}",
                f"{row['times_faster']:.0f}",
                f"{row['objective']:.6g}",
                f"{row['sklearn_objective']:.6g}",
                f"{row['objective_ratio']:.6f}",
            )
    ladder = report["ladder"] = ladders(options.repeats)
    slowest = min(row["times_faster"] for row in report["rows"])
    worst = max(row["objective_ratio"] for row in report["rows"])
    report["passed"] = slowest >= FASTER and worst <= 1

    report["machine"]["load_average_after"] = os.getloadavg()[0]

    console = Console(width=120)
    console.print(table)
    alone, together = ladder["fit_ladder_seconds"], ladder["fit_ladders_seconds_per_channel"]
    console.print(
        f"All codebooks of 0..8 bits of a channel of {CHANNEL} weighted tokens: {alone * 1e3:.2f} ms alone, "
        f"{together * 1e3:.2f} ms as one of 64 on all cores."
    )
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    verdict = "PASS" if report["passed"] else "FAIL"
    console.print(f"{verdict}: {slowest:.0f} times faster or more (bar {FASTER}), ratio up to {worst:.6f}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
