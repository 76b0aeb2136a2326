"""Memory and time of a fisher pass whose weights stay on disk, beside the same pass with the model in memory.

    python bench/offload.py [--layers 8] [--hidden 1024] [--seq-len 128] [--json PATH]

A random Llama with wide layers is written as a bfloat16 checkpoint and calibrated in processes of their own, once in
memory and once with `--device map --max-memory cpu=0`. Peaks are those of resident memory (VmHWM) beyond what the
process had before it loaded the model: while loading, when transformers maps the whole checkpoint (pages of the file,
which the system takes back where memory is short), and from then on. Bars: half as many layers again raise the second
from disk by less than a quarter of a layer's weights; what both runs write is equal bit by bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 512


def make_model(folder: Path, layers: int, hidden: int) -> int:
    """Write the model; bytes of one layer's weights in float32."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=2, head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return 4 * sum(p.numel() for p in model.model.layers[0].parameters())


def calibrate(folder: str, where: str, seq_len: int) -> None:
    """In a process of its own: one line of JSON with peaks, seconds, and a hash of what was summed."""
    from kvcalib.calibration.fisher import PassSettings, run_pass
    from kvcalib.model.identity import identify
    from kvcalib.model.loading import load_model
    from kvcalib.model.selftest import full_attention_layers
    from kvcalib.runtime.loader import prove

    torch.set_num_threads(1)
    placed = {"device": "map", "max_memory": "cpu=0"} if where == "disk" else {"device": "cpu"}
    before, began = peak(), time.perf_counter()
    model = load_model(folder, **placed)
    loaded, loading = time.perf_counter() - began, peak()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    rotations = prove(model, full_attention_layers(model))
    sequences = np.random.default_rng(0).integers(3, VOCABULARY, (2, seq_len))
    began = time.perf_counter()
    record = run_pass(model, rotations, sequences, identify(model), PassSettings("bench", 0, 64, 5, 1, "0" * 64))
    digest = hashlib.sha256(record.info.model.weights_sha256.encode())
    for name in sorted(record.tensors):
        digest.update(record.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    print(
        json.dumps(
            {
                "loading_bytes": loading - before,
                "peak_bytes": peak() - before,
                "load_seconds": loaded,
                "pass_seconds": time.perf_counter() - began,
                "sha256": digest.hexdigest(),
            }
        )
    )


def peak() -> int:
    """VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "offload.json")
    parser.add_argument("--calibrate", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.calibrate:
        calibrate(*options.calibrate, options.seq_len)
        return
    found: dict[str, dict[str, object]] = {}
    layer_bytes = 0
    for layers in (options.layers, options.layers * 3 // 2):
        with tempfile.TemporaryDirectory() as folder:
            layer_bytes = make_model(Path(folder), layers, options.hidden)
            for where in ("memory", "disk"):
                command = [sys.executable, __file__, "--calibrate", folder, where, "--seq-len", str(options.seq_len)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[f"{layers} layers, {where}"] = json.loads(done.stdout.splitlines()[-1])
    table = Table(title=f"fisher, {layer_bytes / 1e6:.0f} MB of float32 weights a layer")
    for column in ("model", "loading, MB", "then, MB", "in layers", "load, s", "pass, s", "bits"):
        table.add_column(column, justify="right")
    for name, row in found.items():
        same = row["sha256"] == found[name.split(",")[0] + ", memory"]["sha256"]
        table.add_row(
            name, f"{row['loading_bytes'] / 1e6:.0f}", f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['peak_bytes'] / layer_bytes:.2f}", f"{row['load_seconds']:.1f}", f"{row['pass_seconds']:.1f}",
            "equal" if same else "OTHER",
        )  # fmt: skip
    few, more = (row["peak_bytes"] for name, row in found.items() if name.endswith("disk"))
    Console().print(table)
    print(f"from disk, half as many layers again: {(more - few) / 1e6:+.1f} MB; bar {layer_bytes / 4e6:.0f} MB")
    result = {
        "layer_bytes": layer_bytes,
        "found": found,
        "seq_len": options.seq_len,
        "hidden": options.hidden,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
