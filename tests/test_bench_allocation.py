"""The plans that bench/allocation.py measures, and what it makes of the measures."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from kvcalib.stages.fit_nuq import Codebooks
from tests.tiny import make_run, tiny_llama

PATH = Path(__file__).parents[1] / "bench/allocation.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_allocation", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_allocation"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_allocation"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("bench") / "run", tiny_llama())


def mean(plan):
    return float(torch.cat([w.flatten() for w in plan.widths.values()]).double().mean())


def test_random_plans_differ_and_keep_their_budget(bench, run):
    codebooks = Codebooks.load(run)
    same, wide = (bench.random_plans(codebooks, kind) for kind in ("same", "wide"))
    assert len(same) == len(wide) == 30
    # Whole layers of 32 of the 128 channels cannot come closer than one bit of theirs.
    assert all(abs(mean(plan) - 2.5) < 32 / 128 for plan in same)
    assert max(map(mean, wide)) - min(map(mean, wide)) > 1.5
    assert (
        len({bench.fingerprint(codebooks, p, bench.EvalSettings()) for p in same + wide}) > 50
    )  # 4 tables: few layer plans
    for plan in same:
        if plan.name.endswith("per layer"):
            assert all(len(w.unique()) == 1 for w in plan.widths.values())


def test_the_plans_of_the_table(bench, run):
    first, rest = bench.table_plans(run, Codebooks.load(run))
    names = {(plan.kind, plan.mean, plan.name) for plan in first + rest}
    assert len(names) == len(first + rest)
    for plan in first + rest:
        if plan.kind == "width":
            assert mean(plan) <= plan.mean
        elif plan.name.startswith("uniform"):
            assert mean(plan) == plan.mean
    found = [name for kind, mean_, name in names if (kind, mean_) == ("bits", 2.0) and name.startswith("uniform")]
    assert sorted(found) == [f"uniform, keys {key} values {4 - key}" for key in (1, 2, 3)]


def test_checks_compare_at_the_same_bits(bench):
    rows = [
        {"kind": "bits", "mean": 2.0, "name": "uniform, keys 2 values 2", "kld": 0.02},
        {"kind": "bits", "mean": 2.0, "name": "uniform, keys 1 values 3", "kld": 0.03},
        {"kind": "bits", "mean": 2.0, "name": "fisher, groups of 16", "kld": 0.021},
        {"kind": "width", "mean": 2.0, "name": "fisher, groups of 16", "kld": 0.01},
        {"kind": "width", "mean": 2.0, "name": "qaq, as published", "kld": 0.04},
    ]
    rows += [
        {"kind": "same", "mean": 2.5, "name": str(i), "predicted_loss": i, "kld": (i - 3) ** 2, "delta_nll": -i}
        for i in range(12)
    ]
    found = {claim: (shown, holds) for claim, shown, holds in bench.checks(rows, (0.0212, 0.0097, 0.0046))}
    assert found["width 2.0: below every uniform split at their bits"] == (
        "0.02100 against 0.02000 (uniform, keys 2 values 2)",
        False,
    )
    assert found["width 2.0: below qaq as published, at the splits' bits"][1]
    assert found["width 2.0: KLD of groups within the bar"][1]
    assert found["rank correlation, one budget"][0].endswith("-1.000 (delta NLL)")
    assert not found["rank correlation, one budget"][1]
