import numpy as np
import pytest
import torch

from kvcalib.errors import InputError
from kvcalib.evaluation.baselines import find
from kvcalib.evaluation.baselines.baseline import Place
from kvcalib.evaluation.baselines.integer import IntCodec


def as_published(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and decoded values of groups `x [n, size]`, number by number."""
    codes, back = np.zeros(x.shape, int), np.zeros_like(x)
    for i, group in enumerate(x):
        low = np.float32(np.float16(group.min()))
        step = np.float32(np.float16(np.float32(group.max() - group.min()) / np.float32(2**bits - 1)))
        for j, value in enumerate(group):
            code = 0 if step == 0 else min(max(np.round((value - low) / step), 0), 2**bits - 1)
            codes[i, j], back[i, j] = code, low + step * np.float32(code)
    return codes, back


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [4, 12])
def test_codes_are_those_of_the_formula(bits, group):
    place = Place(0, 3, 12)
    x = torch.randn(2, 5, 3, 12, generator=torch.Generator().manual_seed(bits)) * 3 + 1
    codec = IntCodec(place, bits, group)
    rows = codec.encode(x, torch.float16)
    codes, back = as_published(x.numpy().reshape(-1, group), bits)
    assert np.array_equal(codec.layout.unpack(rows["words"]).numpy().reshape(-1, group), codes)
    assert np.allclose(codec.decode(rows).numpy().reshape(-1, group), back, rtol=0, atol=1e-6)


def test_a_group_without_spread_decodes_to_its_value():
    codec = IntCodec(Place(0, 1, 8), 2, 8)
    x = torch.full((1, 1, 1, 8), 0.75)
    assert torch.equal(codec.decode(codec.encode(x, torch.float16)), x)


def test_bytes_by_hand():
    """3 bits of 2 heads of 16: 96 bits a token, 3 words; min and step of two bytes for each head."""
    layer = find("int:bits=3").layer(Place(0, 2, 16))
    x = torch.randn(2, 2, 7, 16)
    layer.update(x, x)
    assert layer.nbytes == 2 * 7 * 2 * (3 * 4 + 2 * 2 * 2)
    layer.update(x[:, :, :1], x[:, :, :1])
    assert layer.nbytes == 2 * (7 + 64) * 2 * (3 * 4 + 2 * 2 * 2), "room for 64 more counts"


def test_a_group_that_does_not_divide_a_head_is_refused():
    with pytest.raises(InputError, match=r"group is 5, and a head of this model has 16 channels.*1, 2, 4, 8, 16"):
        find("int:group=5").layer(Place(0, 2, 16))
