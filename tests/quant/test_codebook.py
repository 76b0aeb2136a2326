import numpy as np
import pytest
import torch

from kvcalib.quant.codebook import LADDER, Codebook, fixed_ladder, ladder_slice, normal_float_levels, uniform_levels


def ladders(heads=2, head_dim=3, seed=0):
    rng = np.random.default_rng(seed)
    parts = [np.sort(rng.normal(size=(heads, head_dim, 1 << b)), axis=-1) for b in range(9)]
    return torch.from_numpy(np.concatenate(parts, axis=-1))


def test_encode_takes_the_nearest_centroid_of_each_channels_own_width():
    table = ladders()
    widths = torch.tensor([[0, 1, 2], [3, 5, 8]])
    book = Codebook.from_ladders(table, widths)
    x = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(1))
    codes = book.encode(x)
    for h in range(2):
        for d in range(3):
            levels = table[h, d, ladder_slice(int(widths[h, d]))].float()
            expected = (x[:, h, d, None] - levels).abs().argmin(-1)
            assert torch.equal(codes[:, h, d].long(), expected)
            assert torch.equal(book.decode(codes)[:, h, d], levels[expected])


def test_ragged_round_trip_and_size():
    widths = torch.tensor([[0, 3, 2], [8, 1, 4]])
    book = Codebook.from_ladders(ladders(), widths)
    ragged = book.ragged()
    assert ragged.numel() == int((1 << widths.int()).sum())
    again = Codebook.from_ragged(ragged, widths)
    assert torch.equal(again.centroids, book.centroids)
    with pytest.raises(ValueError, match=f"codebook has {ragged.numel() - 1} centroids, expected {ragged.numel()}"):
        Codebook.from_ragged(ragged[:-1], widths)


def test_two_bit_normal_float_is_kvquants_table():
    assert np.allclose(normal_float_levels(2), [-1, 0, 0.338, 1], atol=1e-3)


def test_three_bit_normal_float_is_kvquants_table():
    expected = [-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1]
    assert np.allclose(normal_float_levels(3), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["nf", "int"])
def test_fixed_ladders_are_ascending_and_full(name):
    table = fixed_ladder(name)
    assert len(table) == LADDER
    for bits in range(9):
        levels = table[ladder_slice(bits)]
        assert len(set(levels)) == 1 << bits
        assert (np.diff(levels) > 0).all()


def test_uniform_levels_are_equal_steps():
    assert np.allclose(uniform_levels(2), [-1, -1 / 3, 1 / 3, 1])
