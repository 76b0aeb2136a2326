import numpy as np
import pytest

from kvcalib.evaluation.collect import Alone, collect, packed, unpacked


class Two(Alone):
    """One of two processes, the other of which has measured its share."""

    def __init__(self, others):
        super().__init__()
        self._rows, self.made = dict(others), []

    def keep(self, number, row):
        self.made.append(number)
        super().keep(number, row)


def test_rows_come_in_order_and_none_is_made_twice():
    sequences, shown = np.arange(14).reshape(7, 2), []
    keeper = Two({2: {"sum": 999}, 0: {"sum": 111}})

    def measure(number, batch):
        return {"number": number, "sum": int(batch.sum())}

    rows = collect(keeper, sequences, 2, measure, shown.append)
    assert keeper.made == [1, 3]
    assert [row["sum"] for row in rows] == [111, 4 + 5 + 6 + 7, 999, 12 + 13]
    assert shown == [4, 6, 7, 7]


def test_alone_makes_all():
    rows = collect(Alone(), np.ones((5, 3), int), 2, lambda number, batch: {"rows": len(batch)})
    assert [row["rows"] for row in rows] == [2, 2, 1]


def test_an_error_of_a_batch_is_raised():
    with pytest.raises(ZeroDivisionError):
        collect(Alone(), np.ones((5, 3), int), 2, lambda number, batch: {"x": 1 // 0})


def test_positions_come_back_exactly():
    x = np.random.default_rng(0).standard_normal(1001).astype(np.float32)
    x[:3] = 0, np.inf, np.float32(1e-45)
    assert np.array_equal(unpacked(packed(x)), x)
    assert unpacked(packed(x)).dtype == np.float32
    assert unpacked(packed(x[:0])).shape == (0,)
