import pytest
import torch

from kvcalib.quant.codebook import Codebook
from kvcalib.quant.packing import Layout
from kvcalib.quant.quantizer import Quantizer
from tests.quant.test_codebook import ladders
from tests.runtime.simulated import simulate


def quantizer(relative, scope, outliers, seed=0, heads=2, head_dim=16):
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(0, 9, (heads, head_dim), generator=generator).to(torch.uint8)
    table = ladders(heads, head_dim, seed) / (3 if relative else 1)
    weight = torch.rand(heads, head_dim, generator=generator)
    return Quantizer(Codebook.from_ladders(table, widths), Layout.build(widths), relative, scope, outliers, weight)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("scope", ["token", "head"])
@pytest.mark.parametrize("outliers", [0, 1, 3])
def test_rows_decode_to_the_plain_simulation(relative, scope, outliers):
    q = quantizer(relative, scope, outliers)
    x = torch.randn(30, 2, 16, generator=torch.Generator().manual_seed(5))
    rows = q.encode(x, torch.float16)
    groups = 2 if scope == "head" else 1
    assert rows["words"].shape == (30, q.layout.words)
    if outliers:
        assert rows["outlier_index"].dtype == torch.uint8
        assert rows["outlier_value"].shape == (30, groups, outliers)
    assert torch.allclose(q.decode(rows), simulate(x, q), atol=1e-6)


def test_wide_rows_take_two_byte_indices():
    q = quantizer(False, "token", 2, heads=4, head_dim=128)
    rows = q.encode(torch.randn(3, 4, 128), torch.float16)
    assert rows["outlier_index"].dtype == torch.int16
    x = torch.zeros(1, 4, 128)
    x[0, 3, 127] = 1000.0
    assert q.decode(q.encode(x, torch.float16))[0, 3, 127] == 1000.0


def test_constant_tokens_are_exact():
    q = quantizer(True, "token", 0)
    x = torch.full((2, 2, 16), 1.5)
    assert torch.equal(q.decode(q.encode(x, torch.float16)), x)


def test_exact_elements_keep_the_dtype_asked_for():
    rows = quantizer(True, "head", 1).encode(torch.randn(3, 2, 16), torch.bfloat16)
    assert {rows[n].dtype for n in ("zero", "scale", "outlier_value")} == {torch.bfloat16}
