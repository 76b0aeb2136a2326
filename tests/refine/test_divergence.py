import torch

from kvcalib.refine.divergence import ForwardKL


def test_equals_torchs_own_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    expected, found = (3 * torch.randn(1100, 31, generator=generator) for _ in range(2))
    found.requires_grad_()
    loss = ForwardKL.apply(expected, found)
    (2 * loss).backward()
    other = found.detach().double().requires_grad_()
    p, q = expected.double().log_softmax(-1), other.log_softmax(-1)
    reference = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    (2 * reference).backward()
    assert torch.allclose(loss.detach(), reference.detach(), rtol=1e-6)
    assert torch.allclose(found.grad, other.grad.float(), atol=1e-6)


def test_without_a_gradient():
    logits = torch.randn(3, 5)
    assert ForwardKL.apply(logits, logits).abs() < 1e-6
