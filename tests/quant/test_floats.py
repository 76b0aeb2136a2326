"""FP8 e4m3 and NVFP4 against their definitions, written out value by value."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcalib.quant import floats
from kvcalib.stages.export import NOISE


def e4m3_values() -> list[tuple[float, int]]:
    """Every finite e4m3 number of sign 0 and its mantissa's last bit, by the format's definition (bias 7)."""
    found = []
    for code in range(127):  # 127 is NaN
        exponent, mantissa = code >> 3, code & 7
        value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        found.append((value, mantissa & 1))
    return found


E4M3 = e4m3_values()
E2M1 = [(v, i & 1) for i, v in enumerate((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))]


def nearest(table: list[tuple[float, int]], x: float) -> float:
    """The nearest number of `table`, of two the one with an even code."""
    return math.copysign(min(table, key=lambda entry: (abs(entry[0] - abs(x)), entry[1]))[0], x)


@given(st.lists(st.floats(-2000, 2000, width=32), min_size=1, max_size=20), st.floats(0.0625, 10, width=32))
def test_fp8_is_the_nearest_number(values, scale):
    x = torch.tensor(values)
    expected = [nearest(E4M3, float(v)) for v in x / scale]
    assert (floats.fp8(x, scale) / scale).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_fp8_takes_the_even_number_halfway():
    for (low, odd), (high, _) in itertools.pairwise(E4M3):
        assert float(floats.fp8(torch.tensor((low + high) / 2), 1.0)) == (high if odd else low)


@pytest.mark.parametrize("width", [16, 48, 40, 6])
def test_nvfp4_by_hand(width):
    x = torch.randn(5, 2, width, generator=torch.Generator().manual_seed(width)) * 3
    x[0, 0] = 0
    x[1, 1, :4] = torch.tensor([0.25, 0.75, 1.25, 2.5]) * float(x.abs().max()) / 6  # halfway, in the largest units
    largest = float(x.abs().max()) * 1.25
    found = floats.nvfp4(x, largest)
    unit = largest / (6 * 448)
    for row, out in zip(x.reshape(-1, width), found.reshape(-1, width), strict=True):
        for start in range(0, width, 16):
            block = row[start : start + 16]
            scale = nearest(E4M3, float(block.abs().max()) / 6 / unit) * unit
            expected = [nearest(E2M1, float(v) / scale) * scale if scale else 0.0 for v in block]
            assert out[start : start + 16].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_nothing_stays_nothing():
    assert not floats.nvfp4(torch.zeros(2, 1, 16), 0.0).any()
    assert floats.fp8_scale([(torch.zeros(2, 1, 4), torch.ones(2, 1, 4))], 0.0) == (1.0, 0.0)
    with pytest.raises(ValueError, match="inf"):
        floats.fp8_scale([(torch.zeros(1, 1, 1),) * 2], float("inf"))


def test_noise_of_normal_numbers():
    x = torch.randn(4000, 4, 64, generator=torch.Generator().manual_seed(3))
    scale = floats.MARGIN * float(x.abs().max()) / floats.E4M3_MAX
    measured = {"FP8": floats.fp8(x, scale), "NVFP4": floats.nvfp4(x, float(x.abs().max()))}
    for name, rounded in measured.items():
        assert float((x - rounded).square().mean()) == pytest.approx(NOISE[name], rel=0.05)


# Channels 0 and 2 turn together, 1 and 3 too, 4 does not turn.
PARTNER = [2, 3, 0, 1, 4]


def test_turning_is_a_rotation_of_pairs():
    x = torch.randn(50, 3, 5, generator=torch.Generator().manual_seed(0))
    turned = floats.turn(x, PARTNER, torch.Generator().manual_seed(1))
    angle = 2 * torch.pi * torch.rand(50, 3, 2, generator=torch.Generator().manual_seed(1))
    for first, second, turns in ((0, 2, angle[..., 0]), (1, 3, angle[..., 1])):
        rotated = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(turns), turns)
        assert torch.allclose(torch.complex(turned[..., first], turned[..., second]), rotated, atol=1e-6)
    assert torch.equal(turned[..., 4], x[..., 4])


def test_reach_bounds_every_rotation_and_no_more():
    x = torch.randn(40, 2, 5, generator=torch.Generator().manual_seed(5))
    seen = float(x[..., 4].abs().max())
    for angle in np.linspace(0, 2 * np.pi, 2000):
        turn = torch.polar(torch.tensor(1.0), torch.tensor(angle).float())
        for first, second in ((0, 2), (1, 3)):
            rotated = torch.complex(x[..., first], x[..., second]) * turn
            seen = max(seen, float(rotated.real.abs().max()), float(rotated.imag.abs().max()))
    reach = floats.reach(x, PARTNER)
    assert reach >= seen * (1 - 1e-6)
    assert reach == pytest.approx(seen, rel=1e-4)
    x[..., 4] = 100
    assert floats.reach(x, PARTNER) == 100


@pytest.mark.parametrize("tail", [1.0, 30.0, 3000.0])
def test_the_scale_covers_the_range_and_costs_next_to_nothing(tail):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(300, 2, 8, generator=generator)
    x[:, 0, 0] *= tail
    fisher = torch.rand(300, 2, 8, generator=generator)
    largest = float(x.abs().max())
    scale, loss = floats.fp8_scale([(x, fisher)], largest)
    assert scale * 448 >= 1.5 * largest * (1 - 1e-6)

    def predicted(s: float) -> float:
        rounded = np.array([nearest(E4M3, v / s) * s for v in x.flatten().double().tolist()])
        error = (x.flatten().double().numpy() - rounded) ** 2
        return float((fisher.flatten().double().numpy() * error).sum() / 2 / len(x))

    assert loss == pytest.approx(predicted(scale), rel=1e-4)
    others = [predicted(1.5 * largest / 448 * 2**k) for k in np.linspace(0, 2, 9)]
    assert loss <= 1.011 * min(others)


def test_one_scale_for_two_tensors_covers_both():
    small, large = torch.full((3, 1, 4), 0.01), torch.full((3, 1, 4), 5.0)
    scale, loss = floats.fp8_scale([(small, torch.ones(3, 1, 4)), (large, torch.ones(3, 1, 4))], 5.0)
    assert scale * 448 >= 7.5
    parts = [floats.loss(x, floats.fp8(x, scale), torch.ones(3, 1, 4)) for x in (small, large)]
    assert loss == pytest.approx(sum(parts))
