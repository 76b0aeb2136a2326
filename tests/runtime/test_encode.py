"""The compiled encoder gives the bits of `Quantizer.encode`."""

import pytest
import torch

from kvcalib.quant.codebook import LADDER
from kvcalib.quant.fitting import make_quantizer
from kvcalib.runtime.encode import MOST_TOKENS, encode


def quantizer(relative, scope, share, widths, heads=3, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ladders = torch.randn(heads, dim, LADDER, generator=generator) * (0.5 if relative else 1.0)
    for bits in range(9):
        part = slice((1 << bits) - 1, (1 << (bits + 1)) - 1)
        ladders[..., part] = ladders[..., part].sort(-1).values
    if widths == "mixed":
        chosen = torch.randint(0, 9, (heads, dim), generator=generator)
    else:
        chosen = torch.full((heads, dim), widths)
    weight = torch.rand(heads, dim, generator=generator)
    return make_quantizer(ladders, chosen.to(torch.uint8), relative, scope, share, weight)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("scope", ["token", "head"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("widths", [0, 1, 3, 8, "mixed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_same_bits(relative, scope, share, widths, dtype):
    q = quantizer(relative, scope, share, widths)
    x = torch.randn(7, 3, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[2] = 0.5
    x[3, :, :9] = x[3, :, 0, None]
    x[4] *= 100
    expected, found = q.encode(x, dtype), encode(q, x, dtype)
    assert set(found) == set(expected) == set(q.row_spec(dtype))
    ties = 3 if not relative else 0  # which of several equal errors is largest, topk leaves open
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        keep = torch.ones(7, dtype=torch.bool)
        if ties and name.startswith("outlier"):
            keep[[2, 3]] = False
        assert torch.equal(found[name][keep], tensor[keep]), name
        assert found[name].shape[1:] == q.row_spec(dtype)[name][0]
        assert found[name].dtype == q.row_spec(dtype)[name][1]


def test_many_tokens_take_the_tensor_path(monkeypatch):
    q = quantizer(True, "token", 0.01, 3)
    called = []
    monkeypatch.setattr(type(q), "encode", lambda self, x, dtype: called.append(len(x)) or {})
    encode(q, torch.zeros(MOST_TOKENS, 3, 16), torch.float16)
    encode(q, torch.zeros(MOST_TOKENS + 1, 3, 16), torch.float16)
    assert called == [MOST_TOKENS + 1]
