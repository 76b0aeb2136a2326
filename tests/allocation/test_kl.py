"""Losses by channel that add up to what was measured by layer."""

import math

import pytest
import torch

from kvcalib.allocation.kl import measured_loss
from kvcalib.errors import InputError


def loss(heads=2, dim=4, seed=0):
    size = torch.rand(heads, dim, generator=torch.Generator().manual_seed(seed)) + 0.1
    return size * 4.0 ** -torch.arange(9).view(9, 1, 1)


def test_channels_add_up_to_the_measurement_and_keep_their_shares():
    measured = {0: 9.0, 1: 0.7, 2: 0.3, 3: 0.06, 4: 0.02, 5: 0.004, 6: 0.001, 7: 2e-4, 8: 7e-5}
    scaled = measured_loss(loss(), measured)
    assert scaled.sum((1, 2)).tolist() == pytest.approx(list(measured.values()))
    shares = (loss() / loss().sum((1, 2), keepdim=True)).double()
    assert torch.allclose(scaled / scaled.sum((1, 2), keepdim=True), shares)


def test_widths_that_were_not_measured_are_scaled_as_the_nearest():
    table = loss().double()
    total = table.sum((1, 2))
    scaled = measured_loss(table, {2: float(3 * total[2]), 6: float(5 * total[6])}).sum((1, 2)) / total
    # 4 lies between: the wider one says more of small errors.
    assert scaled.tolist() == pytest.approx([3, 3, 3, 3, 5, 5, 5, 5, 5])


def test_a_layer_that_the_estimate_calls_free_shares_evenly():
    table = loss()
    table[3:] = 0
    scaled = measured_loss(table, {1: 0.5, 3: 0.24})
    assert scaled[3].tolist() == [[pytest.approx(0.03)] * 4] * 2
    assert scaled[8].tolist() == scaled[3].tolist()


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({}, "no width of this layer was measured"),
        ({9: 0.1}, "the measured width is 9, expected 0..8"),
        ({2: -0.1}, "KL measured at 2 bits is -0.1"),
        ({2: math.nan}, "KL measured at 2 bits is nan"),
        ({2: math.inf}, "KL measured at 2 bits is inf"),
    ],
)
def test_what_cannot_have_been_measured_is_named(measured, message):
    with pytest.raises(InputError, match=message):
        measured_loss(loss(), measured)
