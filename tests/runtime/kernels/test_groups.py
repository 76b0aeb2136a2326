"""Layouts with an order: what the builder promises, and what the detection finds."""

import pytest
import torch

from kvcalib.quant.packing import PLANES, Layout
from tests.runtime.kernels.layers import make_angles, order_of, widths_of


def pairs_of(angles):
    return torch.stack([angles.first, angles.second], 1)


@pytest.mark.parametrize("segment", ["head", "row"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_groups_of_16_are_found_and_aligned(dim, segment):
    angles = make_angles(dim)
    order = order_of(angles, 3)
    widths = widths_of("mixed", 3, dim, order, torch.Generator())
    layout = Layout.build(widths, segment, order)
    layout.check()
    pairs = pairs_of(angles)
    heads = layout.groups(pairs)
    mate = dict(pairs.tolist())
    for h, groups in enumerate(heads):
        assert sorted(d for g in groups for d in g.channels) == list(range(dim))
        for g in groups:
            assert [mate[a] for a in g.channels[::2]] == list(g.channels[1::2])
            for plane, size in enumerate(PLANES[g.width]):
                word, half = g.planes[plane]
                for i, d in enumerate(g.channels):
                    at = 32 * word + 16 * half + size * i
                    assert divmod(at, 32) == (int(layout.word[plane, h, d]), int(layout.shift[plane, h, d]))
    codes = torch.randint(0, 256, (5, 3, dim)) % (1 << widths)
    assert torch.equal(layout.unpack(layout.pack(codes)).long(), codes)


def test_order_decides_among_equal_widths():
    order = torch.tensor([[3, 1, 0, 2]])
    layout = Layout.build(torch.tensor([[2, 2, 4, 2]]), "head", order)
    fields = (layout.word[0, 0].long() * 32 + layout.shift[0, 0].long()).argsort().tolist()
    assert fields == [2, 3, 1, 0]


def test_what_is_not_grouped_is_not_found():
    widths = torch.full((2, 32), 3)
    assert Layout.build(widths).groups() is not None
    assert Layout.build(widths).groups(pairs_of(make_angles(32))) is None, "channels in order are not RoPE pairs"
    order = order_of(make_angles(32), 2)
    assert Layout.build(widths, order=order).groups(pairs_of(make_angles(32))) is not None
    widths[1, 5] = 2
    assert Layout.build(widths).groups() is None
    split = Layout.build(torch.full((1, 16), 2))
    split.shift = split.shift.roll(1, -1)
    assert split.groups() is None or split.groups()[0][0].channels[0] == 1


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(4)[None], r"order has shape \(1, 4\), expected \(2, 4\)"),
        (torch.tensor([[0, 1, 2, 3], [0, 1, 1, 3]]), r"order\[1\] is \[0, 1, 1, 3\], expected each of 0..3 once"),
    ],
)
def test_a_bad_order_is_refused(order, message):
    with pytest.raises(ValueError, match=message):
        Layout.build(torch.ones(2, 4), order=order)
