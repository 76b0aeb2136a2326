"""The GPU bench runs from end to end, through the interpreter, and refuses a machine without a GPU in one line."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("evicting", [False, True])
def test_tiny_mode_fills_every_field(tmp_path, evicting):
    command = [sys.executable, "bench/decode_gpu.py", "--tiny", "--json", str(tmp_path / "r.json")]
    command += ["--evicting", "--skip-model"] if evicting else []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["evicting"] == evicting
    for kind in ("attention",) if evicting else ("attention", "model"):
        assert [(r["context"], r["batch"], r["bits"]) for r in report[kind]] == [
            (40, b, w) for b in (1, 2) for w in (2, 3)
        ]
        assert all(r["packed_seconds"] > 0 for r in report[kind])
    # 2 layers of 2 heads: bits of the codes, 2 outliers of 3 bytes.
    each = [2 * 2 * (2 * (32 * bits // 8) + 2 * 2 * 3) for bits in (2, 3)]
    assert [r["bytes_per_token"] for r in report["largest_context"]] == [2 * 2 * 2 * 32 * 2, *each]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, "bench/decode_gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "torch.cuda.is_available() is False" in done.stderr
    assert "--tiny" in done.stderr
