"""Every kernel variant compiles for sm_80 and sm_90 without a GPU, and the main ones keep to their registers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "bench/results/kernels-aot.json"
MOST_STACK = 512


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("target", ["80", "90"])
@pytest.mark.parametrize("only", ["main", "other"])
def test_every_variant_compiles(only, target, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "bench/kernels_aot.py",
        "--only",
        only,
        "--targets",
        target,
        "--json",
        tmp_path / "r.json",
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert len(rows) >= 8
    spilled = {r["variant"]: r["stack"] for r in rows if r["stack"] > (0 if r["main"] else MOST_STACK)}
    assert not spilled, f"bytes of stack per thread on sm_{target}: {spilled}"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_committed_figures_are_of_these_variants():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = "from tests.runtime.kernels.variants import names; print(*names(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    told = {row["variant"] for row in json.loads(RESULTS.read_text())["rows"]}
    assert told == set(done.stdout.split("\n")[:-1]), "run python bench/kernels_aot.py"
