"""The compiled loops give the same bits in the process that compiled them and in one that reads them from the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import json
import torch
from kvcalib.files import hash_tensor
from kvcalib.runtime import native
from kvcalib.runtime.native_loops import loops
from tests.runtime.test_native import DIM, make_view, turning

torch.set_num_threads(1)
found = {}
for length in (9, 25, 64, 150, 700):
    for widths in (3, "mixed"):
        view = make_view(length, widths, sinks=2, recent=3)[0]
        query = torch.randn(2, 4, 2, DIM, generator=torch.Generator().manual_seed(length))
        drawn = torch.empty(2, 2, view.total)
        out = native.native_attention(query, view, turning(), None, 0.3, drawn=drawn)
        found[f"{length} {widths}"] = hash_tensor(out)
        found[f"{length} {widths} drawn"] = hash_tensor(drawn)
print(json.dumps([sum(loop.cache_hits for loop in loops()), found]))
"""


def test_bits_do_not_depend_on_who_compiled(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    runs = [
        json.loads(subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True).stdout)
        for _ in range(2)
    ]
    assert [hits for hits, _ in runs] == [0, 2]
    (_, compiled), (_, read) = runs
    assert [name for name in compiled if compiled[name] != read[name]] == []
