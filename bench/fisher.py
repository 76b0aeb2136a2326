"""How much a fisher pass costs beside forward passes alone, and how its memory grows with the text.

    python bench/fisher.py [--model MODEL] [--data SRC] [--seq-len 512] [--samples 16] [--json PATH]

Bars: the whole pass (self-test, forward, backward, statistics, file) takes at most 2.7 times the forward passes over
the same tokens in the same batches; peak memory grows by less than 10 % from 16 to 256 sequences. Timings on a shared
machine are noisy: both sides are measured in turn, several times, and the medians are compared.
"""

from __future__ import annotations

import argparse
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


def forward_alone(model, sequences, batch_size):
    """Seconds of forward passes to logits and loss without gradients."""
    from kvcalib.calibration.fisher import summed_nll

    began = time.perf_counter()
    with torch.no_grad():
        for start in range(0, len(sequences), batch_size):
            summed_nll(model, torch.from_numpy(sequences[start : start + batch_size]))
    return time.perf_counter() - began


def fisher_pass(model, sequences, batch_size, keep, folder):
    """Seconds of the whole pass, its self-test and its file included."""
    from kvcalib.calibration.fisher import PassSettings, run_pass
    from kvcalib.model.identity import identify
    from kvcalib.model.selftest import full_attention_layers
    from kvcalib.runtime.loader import prove

    began = time.perf_counter()
    rotations = prove(model, full_attention_layers(model))
    settings = PassSettings("bench", 0, keep, 5, batch_size, "0" * 64)
    run_pass(model, rotations, sequences, identify(model), settings).save(folder / "calibration.safetensors")
    return time.perf_counter() - began


def peak_memory(model, data, seq_len, samples, keep):
    """Peak resident bytes of `kvcalib fisher` on `samples` sequences, in a process of its own."""
    code = (
        "import resource, sys\n"
        "from kvcalib.cli import app\n"
        "try:\n    app(sys.argv[1:], standalone_mode=False)\n"
        "finally:\n    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "--samples",
            str(samples),
            "--seq-len",
            str(seq_len),
            "--keep-tokens",
            str(keep),
            "--run",
            f"{folder}/run",
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, "fisher", model, "--data", data, *options],
            capture_output=True,
            text=True,
            check=True,
        )
    return int(done.stdout.split("peak")[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="skip the memory comparison (256 sequences)")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "fisher.json")
    options = parser.parse_args()

    from kvcalib.model.loading import load_model, load_tokenizer
    from kvcalib.model.text import token_sequences

    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    sequences = token_sequences(options.data, tokenizer, options.samples, options.seq_len)
    keep = len(sequences) * options.seq_len // 2
    forward, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        forward_alone(model, sequences[: options.batch_size], options.batch_size)
        fisher_pass(model, sequences[: options.batch_size], options.batch_size, keep, Path(folder))
        for _ in range(options.rounds):
            forward.append(forward_alone(model, sequences, options.batch_size))
            whole.append(fisher_pass(model, sequences, options.batch_size, keep, Path(folder)))
    ratio = statistics.median(w / f for w, f in zip(whole, forward, strict=True))
    result = {
        "model": options.model,
        "tokens": int(sequences.size),
        "seq_len": options.seq_len,
        "batch_size": options.batch_size,
        "forward_seconds": forward,
        "fisher_seconds": whole,
        "ratio": ratio,
        "bar": 2.7,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "processor": _processor()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }
    table = Table(title="a fisher pass against forward passes alone")
    for column in ("measure", "value", "bar", ""):
        table.add_column(column)
    table.add_row("forward passes, median", f"{statistics.median(forward):.2f} s", "", "")
    table.add_row("fisher pass, median", f"{statistics.median(whole):.2f} s", "", "")
    table.add_row("ratio, median of rounds", f"{ratio:.2f}", "2.7", "PASS" if ratio <= 2.7 else "FAIL")
    if not options.no_memory:
        small, large = (peak_memory(options.model, options.data, options.seq_len, n, keep) for n in (16, 256))
        growth = large / small - 1
        result["peak_bytes"] = {"16": small, "256": large}
        result["peak_growth"] = growth
        table.add_row("peak memory, 16 sequences", f"{small / 1e6:.0f} MB", "", "")
        table.add_row("peak memory, 256 sequences", f"{large / 1e6:.0f} MB", "", "")
        table.add_row("growth", f"{100 * growth:+.1f} %", "10 %", "PASS" if growth < 0.1 else "FAIL")
    Console().print(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def _processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
