"""Kernel variants compile for sm_80 and sm_90 without a GPU, and the main ones keep to their registers.

All of them take a quarter of an hour: KVCALIB_AOT=all compiles them, and so does `bench/kernels_aot.py`.
"""

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
# Every kernel, decode by one width and by groups, prompts, and encoding with and without feedback. On sm_80, where a
# main variant has the fewest registers left, that one.
CHOSEN = {
    "80": ("decode groups", "encode, feedback"),
    "90": (
        "decode 3 bit", "decode groups", "prefill groups", "encode", "encode, feedback", "reduce", "reduce, drawn",
        "drawn",
    ),
}  # fmt: skip
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def spilled(rows):
    """Bytes of stack per thread, of the variants that have more than they may."""
    return {(r["variant"], r["target"]): r["stack"] for r in rows if r["stack"] > (0 if r["main"] else MOST_STACK)}


@pytest.mark.parametrize("target", CHOSEN)
def test_variants_compile(target, tmp_path):
    every = os.environ.get("KVCALIB_AOT") == "all"
    options = [] if every else [o for name in CHOSEN[target] for o in ("--variant", name)]
    command = [sys.executable, "bench/kernels_aot.py", "--targets", target, *options, "--json", tmp_path / "r.json"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {r["variant"] for r in rows} >= set(CHOSEN[target])
    assert not spilled(rows)


def test_committed_figures_are_of_these_variants():
    from tests.runtime.kernels.variants import names

    rows = json.loads(RESULTS.read_text())["rows"]
    wanted = {(name, f"sm_{target}") for name in names() for target in CHOSEN}
    assert {(r["variant"], r["target"]) for r in rows} == wanted, "run python bench/kernels_aot.py"
    assert not spilled(rows)
