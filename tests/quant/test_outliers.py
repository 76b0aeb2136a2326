import itertools

import pytest
import torch

from kvcalib.quant.outliers import largest, outlier_count, shortest_window


@pytest.mark.parametrize(
    ("share", "elements", "count"), [(0, 128, 0), (0.01, 128, 2), (0.01, 100, 1), (0.01, 1024, 11), (0.05, 16, 1)]
)
def test_count_is_the_share_rounded_up(share, elements, count):
    assert outlier_count(share, elements) == count


def test_share_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"outliers is 0\.7"):
        outlier_count(0.7, 10)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_shortest_window_equals_trying_every_subset(count):
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(count))
    lower, upper, outside = shortest_window(x, count)
    for row in range(20):
        spans = []
        for dropped in itertools.combinations(range(7), count):
            kept = [x[row, i].item() for i in range(7) if i not in dropped]
            spans.append(max(kept) - min(kept))
        assert upper[row].item() - lower[row].item() == pytest.approx(min(spans), abs=1e-6)
        kept = [i for i in range(7) if i not in outside[row].tolist()]
        assert len(kept) == 7 - count
        assert min(x[row, kept]) == lower[row]
        assert max(x[row, kept]) == upper[row]


def test_constant_rows_have_an_empty_range():
    lower, upper, outside = shortest_window(torch.full((2, 5), 3.0), 2)
    assert torch.equal(lower, upper)
    assert outside.shape == (2, 2)


def test_largest_is_sorted_by_index():
    assert largest(torch.tensor([[1.0, 9.0, 3.0, 8.0]]), 2).tolist() == [[1, 3]]
