"""bench/soak.py on a tiny model for a few seconds, and what it makes of memory that grows."""

import gc
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kvcalib.rundir import RunDir
from kvcalib.stages import build, tiers
from tests.tiny import make_run, tiny_llama

BENCH = Path(__file__).parents[1] / "bench"
NAMES = ("soak", "soak_fresh", "soak_memory", "soak_meter", "soak_modes", "soak_threads")


@pytest.fixture(scope="module")
def bench():
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("soak")
    sys.path[:] = before
    gc.unfreeze()
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def meter(bench):
    return sys.modules["soak_meter"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer-free config on disk, and the artifacts that the soak wants."""
    folder = tmp_path_factory.mktemp("soak")
    model = tiny_llama()
    model.save_pretrained(folder / "model")
    make_run(folder / "run", model)
    run = RunDir(folder / "run")
    for name, bits in (("lowest", 1), ("low", 2), ("middle", 3), ("high", 4)):
        build.run(run, folder / name, bits, bits)
    tiers.run(run, [folder / "lowest", folder / "middle"], folder / "adaptive", tiers.TierSettings(budget=3.5))
    return folder


def test_a_few_seconds_of_it(bench, folder):
    ways, modes = ["low", "adaptive"], ["greedy", "left-padded batch", "save and load"]
    written = folder / "soak.json"
    written.write_text('{"noise": {"cases": 6, "other_bits": []}}')
    # As it is used: in a process of its own, which has run nothing before.
    done = subprocess.run(
        [sys.executable, str(BENCH / "soak.py"), "--model", str(folder / "model"), "--run", str(folder),
         "--minutes", "0.02", "--rounds", "3", "--threads", "1", "--every", "1", "--json", str(written),
         "--parts", "run", "control", "--ways", *ways, "--modes", *modes],
        cwd=BENCH.parent, env=os.environ | {"PYTHONPATH": str(BENCH.parent)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole = json.loads(written.read_text())
    body = whole["run"]
    assert body["cases"] == 6
    assert body["operations"] == sum(body["by_mode"].values()) > 0
    assert set(body["by_mode"]) <= {*modes, *bench.PARALLEL}
    assert sum(body["compared"].values()) > 0
    assert body["other_bits"] == []
    assert body["holds"]["bits of a fresh process"]
    samples = body["samples"]
    assert len(samples["settled"]) > 0
    assert set(samples["caches"]) == {0}
    assert len(set(samples["hooks"])) == len(set(samples["files"])) == 1
    # Too few samples for a slope.
    assert body["measured"]["memory"] == {"in_use": "unclear", "settled": "unclear"}
    assert not body["holds"]["bytes in use are flat"]
    assert all(
        own + mapped <= settled
        for own, mapped, settled in zip(*(samples[n] for n in ("own", "mapped", "settled")), strict=True)
    )
    control = whole["control"]
    assert control["cases"] == 2
    assert set(control["attached"]) == {"plain"}
    assert set(control["by_mode"]) <= {*modes[:2], *bench.PARALLEL}
    assert sum(control["compared"].values()) > 0
    assert control["other_bits"] == []
    said = io.StringIO()
    bench.show(whole, bench.Console(file=said))
    assert "6 cases, other bits in none" in said.getvalue()
    assert "FAIL  resident memory is flat" in said.getvalue()
    assert said.getvalue().count("PASS  bits of a fresh process") == 2
    assert "control, nothing attached" in said.getvalue()


def test_other_bits_are_reported(bench, folder, tmp_path):
    options = bench.arguments().parse_args(["--run", str(folder)])
    kept = {"logits": torch.zeros(2, 3)}
    save_file(kept, tmp_path / "low--greedy--0.safetensors")
    long = bench.Soak(options, [], tmp_path, {"low--greedy--0": bench.digests(kept)})
    long.check("low", "greedy", 0, kept, "greedy")
    assert long.other_bits == []
    long.check("low", "greedy", 0, {"logits": torch.tensor([[0, 0, 0], [0, 0, 0.5]])}, "greedy")
    assert long.other_bits[0]["found"] == "logits: 1 of 6 elements, by up to 0.5"


def memory(kind, n=200):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 2e5, n)
    return {
        "flat": 1e9 + noise,
        "one step": 1e9 + noise + 5e6 * (np.arange(n) > 10),
        "leak": 1e9 + noise + 1e5 * np.arange(n),
        "noise": 1e9 + 1e3 * noise,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "verdict"), [("flat", "flat"), ("one step", "flat"), ("leak", "grows"), ("noise", "unclear")]
)
def test_the_verdict_follows_the_slope(meter, kind, verdict):
    hours = np.linspace(0, 0.5, 200)[70:]
    values = memory(kind)[70:]
    found = meter.slope(list(hours), list(values))
    exact = np.polyfit(hours, values, 1)[0]
    assert found["low"] < found["slope"] < found["high"]
    assert found["slope"] == pytest.approx(exact, abs=(found["high"] - found["low"]) / 2)
    assert meter.judge(found, 1e7) == verdict
    assert meter.slope(list(hours[:20]), list(values[:20])) is None


def test_what_does_not_change_at_all_is_flat(meter):
    found = meter.slope([float(i) for i in range(50)], [298899456.0] * 50)
    assert found == {"slope": 0, "low": 0, "high": 0}
    assert meter.judge(found, 1e6) == "flat"


def test_the_interval_holds_what_it_says(meter):
    """Of many runs without growth, 95 % of the intervals hold 0."""
    rng = np.random.default_rng(1)
    hours = list(np.linspace(0, 1, 120))
    found = [meter.slope(hours, list(rng.normal(size=120))) for _ in range(400)]
    inside = sum(f["low"] < 0 < f["high"] for f in found)
    assert 366 <= inside <= 394


def test_bytes_in_use_are_what_was_asked_for(bench):
    """Told apart from resident memory: a block that nobody has written to, then one that was freed."""
    memory = sys.modules["soak_memory"]
    memory.settle()
    before, resident = memory.parts(), memory.resident()
    block = torch.empty(64 << 20, dtype=torch.uint8)
    with_it = memory.parts()
    assert with_it["in_use"] - before["in_use"] == pytest.approx(64 << 20, abs=1 << 16)
    assert memory.resident() - resident < 16 << 20
    block.fill_(1)
    assert memory.parts()["own"] - before["own"] > 60 << 20
    del block
    memory.settle()
    assert abs(memory.parts()["in_use"] - before["in_use"]) < 1 << 16
    blocks = memory.parts()["blocks"]
    kept = [object() for _ in range(5000)]
    assert memory.parts()["blocks"] - blocks == pytest.approx(len(kept), abs=500)


def test_the_meter_does_not_see_itself(bench, meter):
    """Many types make a sample large; it must not stay."""
    kept = [type(f"AKindOfObjectWithALongName{i}", (), {}) for i in range(1000)]
    seen = meter.Meter(())
    kept = [kind() for kind in kept]
    for operation in range(60):
        seen.sample(operation)
    in_use = seen.columns()["in_use"][20:]
    assert len(kept) == 1000
    assert (in_use[-1] - in_use[0]) / len(in_use) < 2000


def test_what_is_kept_is_named(bench, meter, monkeypatch):
    class Leaked:
        pass

    clock = iter(range(10_000))
    monkeypatch.setattr(meter, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    seen, kept = meter.Meter(()), []
    for operation in range(45):
        kept += [Leaked(), [torch.zeros(3)]]
        seen.sample(operation)
    found = {row["what"]: row for row in seen.report()["grown"]}
    name = f"{__name__}.{Leaked.__qualname__}"
    assert found[name]["slope"] == pytest.approx(1)
    assert found["tensors"]["slope"] == pytest.approx(1)
    assert found["tensor_bytes"]["slope"] == pytest.approx(12)
    assert "hooks" not in found
    assert "files" not in found
