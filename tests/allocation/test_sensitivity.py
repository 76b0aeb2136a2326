import math

import pytest
import torch

from kvcalib.allocation.sensitivity import (
    HeadStatistics,
    element_range,
    head_statistics,
    relative,
    value_distance,
)
from kvcalib.errors import InputError


def fields(n=5, heads=2, **changed):
    ones = torch.ones(n, heads)
    given = {"key_range": ones, "value_range": ones, "attention": ones / 2, "value_distance": ones}
    rest = {"squared_query_norm": torch.ones(heads), "tokens": 64, "head_dim": 16, "scaling": 0.25}
    return given | rest | changed


def test_distance_is_to_the_mean_output_of_all_queries():
    g = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(3, 80, 80, generator=g, dtype=torch.float64)
    weights = scores.masked_fill(torch.ones(80, 80, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    value = torch.randn(80, 3, 16, generator=g, dtype=torch.float64)
    outputs = torch.einsum("hqt,thd->qhd", weights, value)
    expected = (value - outputs.mean(0)).norm(dim=-1) / math.sqrt(16)
    assert torch.allclose(value_distance(value, weights.sum(1).T), expected)


def test_without_attention_the_distance_is_to_the_mean_value():
    value = torch.tensor([[[1.0, 5.0]], [[3.0, 5.0]]])
    assert value_distance(value, torch.zeros(2, 1)).tolist() == [[math.sqrt(0.5)], [math.sqrt(0.5)]]


def test_range_leaves_out_what_is_kept_exact():
    x = torch.tensor([[[0.0, 1.0, 2.0, 90.0]], [[4.0, 4.0, 4.0, 4.0]]])
    assert element_range(x).tolist() == [[90.0], [0.0]]
    assert element_range(x, 1).tolist() == [[2.0], [0.0]]


def test_statistics_of_a_sample():
    g = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, 7, 3, 8, generator=g)
    drawn, peak = 5 * torch.rand(7, 3, generator=g), torch.rand(7, 3, generator=g)
    found = head_statistics(key, value, drawn, peak, torch.arange(3.0), 99, 0.5)
    assert torch.equal(found.key_range, (key.double().amax(-1) - key.double().amin(-1)))
    assert torch.equal(found.value_range, (value.double().amax(-1) - value.double().amin(-1)))
    assert torch.equal(found.attention, peak.double())
    assert torch.equal(found.value_distance, value_distance(value, drawn))
    assert (found.tokens, found.head_dim, found.scaling) == (99, 8, 0.5)


def test_relative_values_do_not_depend_on_their_unit():
    g = torch.Generator().manual_seed(2)
    key, value = torch.randn(2, 40, 2, 8, generator=g)
    drawn, peak = 5 * torch.rand(40, 2, generator=g), torch.rand(40, 2, generator=g)
    small, large = (
        relative(head_statistics(key, times * value, drawn, peak, torch.ones(2), 99, 0.5)) for times in (0.01, 7)
    )
    assert torch.allclose(small.value_range, large.value_range)
    assert torch.allclose(small.value_distance, large.value_distance)
    assert float(small.value_distance.square().mean()) == pytest.approx(1)
    assert torch.equal(small.key_range, large.key_range)
    constant = head_statistics(key, torch.ones_like(value), drawn, peak, torch.ones(2), 99, 0.5)
    assert torch.allclose(relative(constant).value_range, torch.zeros(40, 2, dtype=torch.float64))


def test_the_mean_of_a_channel_does_not_widen_a_keys_range():
    g = torch.Generator().manual_seed(3)
    key, value = torch.randn(2, 30, 2, 8, generator=g)
    offset = 100 * torch.randn(2, 8, generator=g)
    rest = (value, torch.ones(30, 2), torch.ones(30, 2), torch.ones(2), 99, 0.5)
    plain = head_statistics(key, *rest)
    shifted = head_statistics(key.double() + offset, *rest, key_mean=offset)
    assert torch.allclose(plain.key_range, shifted.key_range)
    assert bool((head_statistics(key.double() + offset, *rest).key_range > 10 * plain.key_range).all())


@pytest.mark.parametrize("name", ["key_range", "value_range", "attention", "value_distance", "squared_query_norm"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_what_is_not_finite_is_named(name, wrong):
    broken = fields()[name].clone()
    broken.view(-1)[-1] = wrong
    with pytest.raises(InputError, match=f"^{name} holds {wrong:g}, expected finite"):
        HeadStatistics(**fields(**{name: broken}))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"attention has shape \[4, 2\], key_range \[5, 2\]"):
        HeadStatistics(**fields(attention=torch.ones(4, 2)))
    with pytest.raises(InputError, match=r"squared_query_norm has shape \[3\]"):
        HeadStatistics(**fields(squared_query_norm=torch.ones(3)))
    with pytest.raises(InputError, match=r"key_range has shape \[0, 2\]"):
        HeadStatistics(**fields(n=0))
    with pytest.raises(InputError, match=r"attention is 3, expected weights in 0\.\.1"):
        HeadStatistics(**fields(attention=torch.full((5, 2), 3.0)))
