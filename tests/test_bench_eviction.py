"""bench/eviction.py on a tiny model: its parts measure what they say."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvcalib.evaluation.continuation import evaluate_continuations
from kvcalib.evaluation.trials import Trial
from kvcalib.runtime.eviction import Eviction
from tests.tiny import make_artifact, tiny_llama, tokens

PATH = Path(__file__).parents[1] / "bench/eviction.py"
POLICIES = ("window", "h2o")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_eviction", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_eviction"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_eviction"]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("a"), model, key_bits=4, value_bits=4)


def test_prompts_read_once_give_what_each_trial_gives_alone(bench, model, artifact):
    ids = tokens(4, 96).numpy()
    rows, _ = bench.quality(model, "4 bits", artifact, ids, [0.5, 0.25], 2, POLICIES)
    assert [(row["policy"], row["keep"]) for row in rows] == [
        ("none", 1), ("full", 1), ("window", 0.5), ("window", 0.25), ("h2o", 0.5), ("h2o", 0.25),
    ]  # fmt: skip
    for row in rows[2:]:
        trial = Trial(artifact, Eviction(row["keep"], policy=row["policy"]))
        alone = evaluate_continuations(model, [trial], ids, batch_size=2, step=8)[0]
        assert row["sequence_nll"] == pytest.approx(alone.sequence_nll, abs=1e-5)
        assert row["cache_bytes"] == alone.cache_bytes
        assert row["kept"] == alone.kept
        assert row["eviction_nll"] == pytest.approx(row["nll"] - rows[1]["nll"])
    assert rows[3]["cache_bytes"] < rows[2]["cache_bytes"] < rows[1]["cache_bytes"]
    (found,) = bench.comparisons(rows[2::2], ours="h2o", others=("window",))
    difference = np.subtract(rows[4]["sequence_nll"], rows[2]["sequence_nll"])
    assert found["difference"] == pytest.approx(difference.mean())
    assert found["error"] == pytest.approx(difference.std(ddof=1) / 2)


def test_both_comparisons_of_time(bench, model, artifact):
    rows = bench.decode_times(model, artifact, 128, 0.25, POLICIES, rounds=4, steps=5)
    at = {(row["comparison"], row["policy"]): row for row in rows}
    assert set(at) == {(kind, p) for kind in ("share", "constant") for p in ("none", *POLICIES)} | {("share", "fp")}
    assert all(row["seconds"] > 0 for row in rows)
    assert at["share", "none"]["against_none"] == 1
    assert 128 < at["share", "none"]["tokens_held"] < 134
    for policy in POLICIES:
        assert 25 <= at["share", policy]["tokens_held"] <= 40
        constant = at["constant", policy]
        assert 110 < constant["tokens_held"] <= 128
        assert 0 < constant["evictions"] <= 4
        assert abs(constant["tokens_held"] - at["constant", "none"]["tokens_held"]) < 8


def test_a_stream_and_its_baseline(bench, model, artifact):
    ids = tokens(1, 700)
    nll, sizes, seconds = bench.stream(model, artifact, ids, 64, 120, "window", every=80)
    assert len(nll) == 120
    assert np.isfinite(nll).all()
    assert sizes[-1][0] == 699
    assert all(kept <= 64 for _, _, kept in sizes)
    assert len({size for tokens_, size, _ in sizes if tokens_ > 128}) == 1
    assert seconds > 0
    found = bench.recomputed(model, ids, 64, 120, 16)
    # The first target of the second window: what a window of 64 tokens, 49 of them before it, says.
    with torch.no_grad():
        for target in (580, 596, 611, 699):
            end = 580 + 16 * ((target - 580) // 16) + 16
            end = min(end, 700)
            context = ids[:, end - 1 - 64 : target]
            logits = model(context).logits[0, -1].double().log_softmax(-1)
            assert found[target - 580] == pytest.approx(-float(logits[ids[0, target]]), abs=1e-4)


def test_checks_read_the_rows(bench):
    at = {"artifact": "4 bits", "keep": 0.2, "bytes_ratio": 1}
    body = {
        "quality": {
            "comparisons": [
                at | {"against": "h2o", "difference": -0.01, "error": 0.002},
                at | {"against": "window", "difference": 0.01, "error": 0.02},
            ],
            "rows": [{"policy": "qhitter", "keep": 0.2, "artifact": "4 bits", "times_smaller": 17.5}],
        },
        "time": {"rows": [{"policy": "h2o", "comparison": "share", "against_none": 1.2}]},
        "stream": {
            "rows": [
                {"artifact": "4 bits", "policy": "window", "difference": 0.04, "error": 0.01, "least_bytes": 100,
                 "most_bytes": 102}
            ]
        },
    }  # fmt: skip
    assert [holds for _, _, holds in bench.checks(body)] == [True, False, True, False, True, False]
