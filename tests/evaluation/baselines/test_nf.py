import numpy as np
import pytest
import torch
from scipy.stats import norm

from kvcalib.evaluation.baselines import find
from kvcalib.evaluation.baselines.baseline import Place
from kvcalib.evaluation.baselines.nf import NfCodec

NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
"""The table of QLoRA's appendix E."""


def levels(bits: int) -> np.ndarray:
    """Appendix E by its construction: quantiles from the offset to the middle, on both sides, one zero."""
    if bits == 4:
        return np.array(NF4)
    offset, half = 0.9677083, 2 ** (bits - 1)
    positive = [norm.ppf(offset + (0.5 - offset) * i / half) for i in range(half)]
    negative = [-norm.ppf(offset + (0.5 - offset) * i / (half - 1)) for i in range(half - 1)]
    found = np.sort([*positive, 0.0, *negative])
    return found / found.max()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [8, 16])
def test_codes_are_the_nearest_levels(bits, group):
    x = torch.randn(2, 3, 2, 16, generator=torch.Generator().manual_seed(bits)) * 2
    codec = NfCodec(Place(0, 2, 16), bits, group)
    rows = codec.encode(x, torch.float16)
    codes = codec.layout.unpack(rows["words"]).numpy().reshape(-1, group)
    back = codec.decode(rows).numpy().reshape(-1, group)
    table = levels(bits)
    for mine, decoded, block in zip(codes, back, x.numpy().reshape(-1, group), strict=True):
        scale = np.float32(np.float16(np.abs(block).max()))
        expected = [int(np.argmin(np.abs(value / scale - table))) for value in block]
        assert mine.tolist() == expected
        assert np.allclose(decoded, scale * table[expected], atol=1e-5)


def test_bytes_by_hand():
    """4 bits of 2 heads of 16: 4 words a token, and a scale of two bytes for each head."""
    layer = find("nf").layer(Place(0, 2, 16))
    x = torch.randn(3, 2, 7, 16)
    layer.update(x, x)
    assert layer.nbytes == 3 * 7 * 2 * (4 * 4 + 2 * 2)


def test_zeros_stay_zeros():
    codec = NfCodec(Place(0, 1, 8), 2, 8)
    x = torch.zeros(1, 1, 1, 8)
    assert torch.equal(codec.decode(codec.encode(x, torch.float16)), x)
