import torch

from kvcalib.allocation.friendliness import friendliness, relative_error
from tests.quant.test_quantizer import quantizer
from tests.runtime.simulated import simulate


def test_error_is_relative_to_each_tokens_own_norm():
    q = quantizer(True, "head", 1)
    x = torch.randn(20, 2, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 20)[:, None, None]
    expected = (simulate(x, q) - x).norm(dim=-1) / x.norm(dim=-1)
    assert torch.allclose(relative_error(q, x), expected, atol=1e-4)


def test_a_token_of_zeros_has_no_error():
    assert (relative_error(quantizer(True, "token", 0), torch.zeros(3, 2, 16)) == 0).all()


def test_friendliness_is_one_without_error_and_never_negative():
    assert friendliness(0, 0) == 1
    assert friendliness(0.2, 0.4) == 0.7
    assert friendliness(3, 3) == 0
