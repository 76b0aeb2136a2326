"""Costs: what is timed is what ran, contenders take turns, medians count."""

import time

import pytest
import torch

from kvcalib.evaluation import costs
from kvcalib.evaluation.contender import Unquantized
from kvcalib.evaluation.costs import measure_costs
from kvcalib.evaluation.failures import Failures
from tests.evaluation.contenders import Custom, Refusing
from tests.tiny import tiny_llama, tokens

PAUSE = 0.02


class Slow(Custom):
    """Waits in layer 0, once per pass, and notes its passes."""

    def __init__(self, name, order):
        super().__init__(name, self.wait)
        self.order = order

    def wait(self, key, value):
        self.order.append((self.name, key.shape[2]))
        time.sleep(PAUSE)
        return key, value


def test_seconds_are_those_of_a_pass():
    order = []
    found = measure_costs(tiny_llama(), [Custom("own"), Slow("slow", order)], tokens(1, 24), Failures(), 4, rounds=3)
    for seconds in (found["slow"].prefill_seconds, found["slow"].decode_seconds):
        assert PAUSE <= seconds < 20 * PAUSE
    assert 0 < found["own"].decode_seconds < found["slow"].decode_seconds
    assert found["own"].prefill_seconds > 0
    # One round that does not count, then three: a prompt of 20 tokens and 4 passes of one.
    assert order == 4 * [("slow", 20), *4 * [("slow", 1)]]
    if not torch.cuda.is_available():
        assert found["own"].peak_bytes is None


def test_contenders_take_turns():
    order = []
    measure_costs(tiny_llama(), [Slow("a", order), Slow("b", order)], tokens(1, 6), Failures(), 1, rounds=2)
    assert [name for name, size in order if size == 5] == ["a", "b", "b", "a", "a", "b"]


def test_medians_pass_over_a_slow_round(monkeypatch):
    """The third of four rounds is ten times slower; the median does not see it, and the warm-up is not in it."""
    clock = iter([t for round_ in (500.0, 1.0, 10.0, 1.0, 1.0) for t in (0.0, round_, 0.0, round_ / 10)])
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    found = measure_costs(tiny_llama(), [Unquantized()], tokens(1, 6), Failures(), 1, rounds=4)["fp16"]
    assert found.prefill_seconds == pytest.approx(1.0)
    assert found.decode_seconds == pytest.approx(0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="device memory needs a GPU")
def test_peak_memory_holds_the_cache():
    model = tiny_llama().cuda()
    found = measure_costs(model, [Unquantized()], tokens(1, 400).cuda(), Failures(), 2, rounds=1)["fp16"]
    assert found.peak_bytes >= 2 * 2 * 32 * 400 * 4  # layers, keys and values, channels, tokens, float32


def test_failures_and_bad_sizes():
    failures = Failures()
    found = measure_costs(tiny_llama(), [Refusing(), Custom("own")], tokens(1, 8), failures, 2, rounds=1)
    assert (list(found), list(failures)) == (["own"], ["refusing"])
    for ids, new, rounds in ((tokens(2, 8), 2, 1), (tokens(1, 8), 8, 1), (tokens(1, 8), 2, 0)):
        with pytest.raises(ValueError, match="no prompt is left"):
            measure_costs(tiny_llama(), [], ids, Failures(), new, rounds)
