"""Decoding on a CPU: packed caches against the fp cache and against transformers' HQQ and Quanto caches, in one run.

    python bench/decode_cpu.py [--model MODEL] [--data SRC] [--contexts 512 2048 8192] [--bits 4 3 2] [--json PATH]

HQQ and Quanto need `pip install -e ".[bench]"`; a row whose package is missing is left out, and said so. All caches
hold the same prompt; steps are timed in turn, round after round, and medians compared, since machines are noisy. Peak
memory is the growth of the process's resident memory over a filled-from-empty cache and its steps, in a process of its
own. "step" is what one decode step allocates at most at a time through torch and numpy.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, QuantizedCache

CHUNK = 512
PACKAGES = {"hqq4": "hqq", "quanto4": "optimum.quanto"}


class Bench:
    """One model, its artifacts, and a cache of every kind."""

    def __init__(self, model, artifacts):
        from kvcalib.model.loading import load_model, load_tokenizer
        from kvcalib.runtime.loader import load, prove

        self.model = load_model(model, "float32", "cpu")
        self.tokenizer = load_tokenizer(model)
        self.artifacts = {name: load(path) for name, path in artifacts.items()}
        layers = sorted({i for a in self.artifacts.values() for i in a.quantizers})
        self.rotations = prove(self.model, layers) if layers else {}

    def enter(self, kind):
        """Make the model ready for caches of `kind`."""
        from kvcalib.runtime.loader import attach, detach

        detach(self.model)
        if kind in self.artifacts:
            attach(self.model, self.artifacts[kind], rotations=self.rotations)

    def new_cache(self, kind):
        if kind in self.artifacts:
            return self.artifacts[kind].new_cache(self.model)
        if kind == "fp":
            return DynamicCache(config=self.model.config)
        return QuantizedCache(backend=kind.rstrip("0123456789"), config=self.model.config, nbits=4)

    @torch.no_grad()
    def fill(self, kind, ids):
        self.enter(kind)
        cache = self.new_cache(kind)
        for start in range(0, ids.shape[1], CHUNK):
            self.model(ids[:, start : start + CHUNK], past_key_values=cache, logits_to_keep=1)
        return cache

    @torch.no_grad()
    def step(self, cache, token):
        began = time.perf_counter()
        self.model(token, past_key_values=cache)
        return time.perf_counter() - began


def timings(bench, caches, ids, rounds, steps):
    """Seconds of every timed step, by kind; the caches take turns."""
    kinds = list(caches)
    found = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            bench.enter(kind)
            # The first step after a change of cache warms up what the others left cold.
            bench.step(caches[kind], ids[:, :1])
            found[kind] += [bench.step(caches[kind], ids[:, i : i + 1]) for i in range(1, 1 + steps)]
    return found


def peak_allocation(bench, kind, cache, ids):
    """Largest sum of bytes that one decode step holds at a time beyond what it started with."""
    import tracemalloc

    from torch.profiler import ProfilerActivity, profile

    bench.enter(kind)
    bench.step(cache, ids[:, :1])
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        bench.step(cache, ids[:, :1])
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak + numpy_peak


def memory(arguments):
    """Child process: growth of resident memory while a cache is filled and stepped, and the cache's bytes."""
    kind, model, artifacts, contexts = arguments
    bench = Bench(model, json.loads(artifacts))
    ids = tokens(bench, int(contexts))
    bench.fill(kind, ids[:, :CHUNK])
    resident = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    cache = bench.fill(kind, ids)
    for i in range(8):
        bench.step(cache, ids[:, i : i + 1])
    held = cache.nbytes() if hasattr(cache, "nbytes") else None
    print(json.dumps({"peak": _status("VmHWM") - resident, "cache": held}))


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def tokens(bench, length):
    vocabulary = bench.model.get_input_embeddings().weight.shape[0]
    return torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


def build_artifacts(model, data, bits, folder):
    """Artifacts `{name: path}` of one short calibration."""
    from kvcalib.rundir import RunDir
    from kvcalib.stages import build, fisher, fit_nuq

    run = RunDir(folder / "run", create=True)
    fisher.run(run, model, fisher.FisherSettings(data=data, samples=8, seq_len=512, dtype="float32", device="cpu"))
    fit_nuq.run(run, fit_nuq.FitNuqSettings(choices=None))
    paths = {}
    for width in bits:
        paths[f"kvcalib{width}"] = str(folder / f"nuq{width}")
        build.run(run, folder / f"nuq{width}", width, width)
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 6144, 8192])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path, default=Path("bench/results/decode_cpu.json"))
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        memory(options.memory_of)
        return
    console = Console(width=110)
    peers = [kind for kind, package in PACKAGES.items() if _installed(package)]
    for kind in set(PACKAGES) - set(peers):
        console.print(f"{kind}: {PACKAGES[kind]} is not installed, the row is left out")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        artifacts = build_artifacts(options.model, options.data, options.bits, Path(folder))
        bench = Bench(options.model, artifacts)
        kinds = ["fp", *artifacts, *peers]
        for context in options.contexts:
            ids = tokens(bench, context)
            caches = {kind: bench.fill(kind, ids) for kind in kinds}
            found = timings(bench, caches, ids, options.rounds, options.steps)
            middle = {kind: statistics.median(times) for kind, times in found.items()}
            config = bench.model.config
            full = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context
            for kind in kinds:
                child = subprocess.run(
                    [sys.executable, __file__, "--memory-of", kind, options.model, json.dumps(artifacts), str(context)],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                measured = json.loads(child.stdout.splitlines()[-1])
                rows.append(
                    {
                        "context": context, "cache": kind, "step_seconds": middle[kind],
                        "tokens_per_second": 1 / middle[kind], "speed_against_fp": middle["fp"] / middle[kind],
                        "peak_bytes": measured["peak"], "cache_bytes": measured["cache"],
                        "step_allocation_bytes": peak_allocation(bench, kind, caches[kind], ids),
                        "full_fp_copy_bytes": full,
                    }
                )  # fmt: skip
            console.print(f"{context} tokens: done", highlight=False)
    table = Table(title=f"decode on a CPU, {options.model}, {torch.get_num_threads()} threads")
    for column in ("context", "cache", "tokens/s", "against fp", "peak MB", "cache MB", "step MB", "step / fp copy"):
        table.add_column(column, justify="right")
    for row in rows:
        held = row["cache_bytes"]
        table.add_row(
            str(row["context"]), row["cache"], f"{row['tokens_per_second']:.1f}", f"{row['speed_against_fp']:.2f}",
            f"{row['peak_bytes'] / 1e6:.1f}", "" if held is None else f"{held / 1e6:.2f}",
            f"{row['step_allocation_bytes'] / 1e6:.2f}",
            f"{row['step_allocation_bytes'] / row['full_fp_copy_bytes']:.3f}",
        )  # fmt: skip
    console.print(table)
    body = {
        "bench": "decode_cpu", "model": Path(options.model).name, "date": datetime.now(UTC).isoformat("T", "seconds"),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "protocol": f"float32, batch 1, {options.rounds} rounds of {options.steps} steps in turn, medians",
        "rows": rows,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(body, indent=1) + "\n")
    console.print(f"written: {options.json}", highlight=False)


def _installed(package):
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _cpu():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
