import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.linalg import hadamard as scipy_hadamard

from kvcalib.evaluation.baselines import find
from kvcalib.evaluation.baselines.baseline import Place
from kvcalib.evaluation.baselines.turboquant import TurboCodec, rotation, sphere_levels


@pytest.mark.parametrize(("head_dim", "bits"), [(3, 2), (16, 3), (24, 2), (64, 4)])
def test_levels_are_the_means_of_their_cells(head_dim, bits):
    """The two conditions of Lloyd and Max, with the density integrated numerically."""
    found = sphere_levels(head_dim, bits)
    edges = [-1.0, *((found[1:] + found[:-1]) / 2), 1.0]

    def density(t):
        return (1 - t * t) ** ((head_dim - 3) / 2)

    for low, high, level in zip(edges[:-1], edges[1:], found, strict=True):
        mean = quad(lambda t: t * density(t), low, high)[0] / quad(density, low, high)[0]
        assert level == pytest.approx(mean, abs=1e-6)


def test_levels_of_many_channels_are_those_of_a_normal_variable():
    """Max (1960), table I: 1 bit .7980, 2 bits .4528 and 1.510."""
    assert sphere_levels(4096, 1)[1] * 64 == pytest.approx(0.7980, abs=1e-3)
    assert sphere_levels(4096, 2)[2:] * 64 == pytest.approx([0.4528, 1.510], abs=1e-3)


def test_a_random_vector_has_such_coordinates():
    x = np.random.default_rng(0).normal(size=(4000, 12))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    middles = (sphere_levels(12, 2)[1:] + sphere_levels(12, 2)[:-1]) / 2
    means = [x[np.digitize(x, middles) == cell].mean() for cell in range(4)]
    assert sphere_levels(12, 2) == pytest.approx(means, abs=5e-3)


@pytest.mark.parametrize(("head_dim", "bits"), [(16, 2), (16, 4), (12, 3)])
def test_codes_are_the_nearest_levels_of_the_turned_vector(head_dim, bits):
    place = Place(0, 2, head_dim)
    x = torch.randn(2, 3, 2, head_dim, generator=torch.Generator().manual_seed(3))
    codec = TurboCodec(place, bits, seed=5)
    rows = codec.encode(x, torch.float16)
    codes, back = codec.layout.unpack(rows["words"]).numpy(), codec.decode(rows).numpy()
    turn = rotation(head_dim, 5).double().numpy()
    table = sphere_levels(head_dim, bits)
    for b, t, h in np.ndindex(2, 3, 2):
        vector = x[b, t, h].double().numpy()
        length = np.sqrt((vector**2).sum())
        turned = [sum(turn[i, j] * vector[j] for j in range(head_dim)) / length for i in range(head_dim)]
        expected = [int(np.argmin(np.abs(table - value))) for value in turned]
        assert codes[b, t, h].tolist() == expected
        assert np.allclose(back[b, t, h], np.float16(length) * (table[expected] @ turn), atol=1e-4)


def test_rotations():
    """Signs times Sylvester's matrix where there is one; orthogonal everywhere; another seed is another one."""
    found = rotation(16, 0).numpy() * 4
    signs = found[0]
    assert set(np.abs(signs)) == {1.0}
    assert np.array_equal(found, scipy_hadamard(16) * signs)
    for head_dim in (16, 12, 80):
        turn = rotation(head_dim, 0).double()
        assert torch.allclose(turn @ turn.T, torch.eye(head_dim, dtype=torch.float64), atol=1e-5)
        assert not torch.equal(rotation(head_dim, 0), rotation(head_dim, 1))


def test_bytes_by_hand():
    """3 bits of 2 heads of 16: 3 words a token, and a norm of two bytes for each head."""
    layer = find("turboquant:bits=3").layer(Place(0, 2, 16))
    x = torch.randn(1, 2, 9, 16)
    layer.update(x, x)
    assert layer.nbytes == 9 * 2 * (3 * 4 + 2 * 2)


def test_zeros_stay_zeros():
    codec = TurboCodec(Place(0, 1, 16), 2, 0)
    x = torch.zeros(1, 1, 1, 16)
    assert torch.equal(codec.decode(codec.encode(x, torch.float16)), x)
