import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcalib.quant.packing import Layout, pack, unpack


def loop_pack(codes, layout):
    """Packing bit by bit, in Python integers: an independent reading of the table."""
    planes = {0: [], 1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [4, 4]}
    words = [0] * layout.words
    for h in range(codes.shape[0]):
        for d in range(codes.shape[1]):
            value = int(codes[h, d])
            for plane, size in enumerate(planes[int(layout.widths[h, d])]):
                field = value & ((1 << size) - 1)
                value >>= size
                words[int(layout.word[plane, h, d])] |= field << int(layout.shift[plane, h, d])
            assert value == 0
    return [w - (1 << 32) if w >= 1 << 31 else w for w in words]


widths_tables = st.integers(1, 3).flatmap(
    lambda h: st.integers(1, 20).flatmap(
        lambda d: st.lists(st.integers(0, 8), min_size=h * d, max_size=h * d).map(lambda w: np.array(w).reshape(h, d))
    )
)


@settings(max_examples=60, deadline=None)
@given(widths_tables, st.sampled_from(["head", "row", None]), st.integers(0, 2**31))
def test_any_widths_survive_and_agree_with_a_loop(widths, segment, seed):
    layout = Layout.build(torch.tensor(widths), segment)
    layout.check()
    codes = torch.tensor(np.random.default_rng(seed).integers(0, 1 << widths, size=(2, 3, *widths.shape)))
    words = layout.pack(codes)
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, layout.words)
    assert torch.equal(layout.unpack(words).long(), codes)
    assert words[1, 2].tolist() == loop_pack(codes[1, 2], layout)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 64, 80, 128])
def test_uniform_pack_has_exact_width(bits, count):
    codes = torch.randint(0, 1 << bits, (5, count), generator=torch.Generator().manual_seed(bits))
    words = pack(codes, bits)
    assert words.shape == (5, -(-count * bits // 32))
    assert torch.equal(unpack(words, bits, count).long(), codes)


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_waste_less_than_two_percent(head_dim, bits):
    layout = Layout.build(torch.full((8, head_dim), bits))
    assert layout.waste < 0.02
    if head_dim % 32 == 0:
        assert layout.segment == "head"


def test_head_segments_stand_alone():
    layout = Layout.build(torch.full((2, 64), 3), "head")
    first, second = (set(layout.word[:, h][layout.word[:, h] >= 0].tolist()) for h in range(2))
    assert not first & second


def test_channels_of_one_width_stand_together():
    widths = torch.tensor([[2, 4, 2, 4, 2, 4, 2, 4]])
    layout = Layout.build(widths, "head")
    fours = sorted(layout.shift[0, 0][widths[0] == 4].tolist())
    assert fours == [0, 4, 8, 12]


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range_are_named(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}, expected 1..8"):
        pack(torch.zeros(1, 4, dtype=torch.long), bits)


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"codes span 0\.\.4, expected 0\.\.3"):
        pack(torch.tensor([[0, 4]]), 2)


def test_widths_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"widths\[0\]\[1\] is 9, expected 0..8"):
        Layout.build(torch.tensor([[1, 9]]))


@pytest.mark.parametrize("field", ["overlap", "outside", "missing"])
def test_check_finds_a_table_that_lies(field):
    layout = Layout.build(torch.full((1, 8), 4))
    layout.check()
    if field == "overlap":
        layout.shift[0, 0, 1] = layout.shift[0, 0, 0]
    elif field == "outside":
        layout.word[0, 0, 0] = 7
    else:
        layout.word[0, 0, 0] = -1
    with pytest.raises(ValueError, match=r"^(word|shift)\b.*(overlap|expected)"):
        layout.check()
