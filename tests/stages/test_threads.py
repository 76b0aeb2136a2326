import threading
import time

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from kvcalib.stages.threads import by_layer, one_thread


@pytest.fixture
def four():
    """Four threads, as a larger machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_a_long_sum_depends_on_threads_and_not_within(four):
    """What all this is for: the last assertion fails on a torch that needs none of it."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 1 << 17)))

    def sums() -> list[float]:
        return [float(row.mean()) for row in x]

    mine = sums()
    with one_thread() as before:
        assert before == 4
        one = sums()
        assert all(pool["num_threads"] == 1 for pool in threadpool_info())
    assert torch.get_num_threads() == 4
    assert by_layer(lambda _: sums(), range(3), 2) == [one] * 3
    assert mine != one


def test_layers_go_side_by_side_in_order(four):
    both = threading.Barrier(2, timeout=20)

    def work(layer: int) -> tuple[int, int]:
        if layer < 2:
            both.wait()
        return layer, torch.get_num_threads()

    assert by_layer(work, range(5), 2) == [(layer, 1) for layer in range(5)]
    assert by_layer(work, [], 2) == []


def test_an_error_ends_what_has_not_begun():
    begun = []

    def work(layer: int) -> None:
        begun.append(layer)
        if layer:
            time.sleep(0.3)
        raise ValueError(f"layer {layer}")

    with pytest.raises(ValueError, match="layer 0"):
        by_layer(work, range(50), 1)
    assert len(begun) < 50
