import math

import pytest
import torch

import kvcalib
from kvcalib.evaluation.divergence import compare_logits
from kvcalib.evaluation.perplexity import evaluate
from tests.tiny import make_artifact, tiny_llama, tokens


def test_divergence_equals_torchs_own():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(1100, 31, generator=generator).double() for _ in range(2))
    targets = torch.randint(-1, 31, (1100,), generator=generator)
    found = compare_logits(p, q, targets)
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    assert torch.allclose(found["kld"], expected, atol=1e-5)
    assert torch.equal(found["agree"].bool(), p.argmax(-1) == q.argmax(-1))
    nll = torch.nn.functional.cross_entropy(q, targets, ignore_index=-1, reduction="none")
    assert torch.allclose(found["nll"], nll, atol=1e-5)
    assert (found["kld"] > 0).all()
    assert compare_logits(p, p, targets)["kld"].abs().max() < 1e-6


def test_evaluation_equals_attaching_by_hand(tmp_path):
    model = tiny_llama()
    artifact = make_artifact(tmp_path, model, key_bits=2, value_bits=2)
    ids = tokens(5, 30)
    result = evaluate(model, [artifact], ids.numpy(), batch_size=2)[0]
    with torch.no_grad():
        exact = model(ids).logits
        kvcalib.attach(model, artifact)
        packed = model(ids).logits
        kvcalib.detach(model)
    p, q = exact.double().log_softmax(-1), packed.double().log_softmax(-1)
    nll = -q[:, :-1].gather(2, ids[:, 1:, None]).mean().item()
    assert result.nll == pytest.approx(nll, abs=1e-5)
    assert result.fp16_nll == pytest.approx(-p[:, :-1].gather(2, ids[:, 1:, None]).mean().item(), abs=1e-5)
    assert result.ppl == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.delta_nll == pytest.approx(result.nll - result.fp16_nll)
    assert result.kld == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-5)
    assert result.kld > 0.01, "2 bits on a random model cannot be free: did the packed cache run?"
    assert result.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    # 2 bit codes in 32-element rows; 1 of 32 exact at 24 bits; 32 bits of zero and scale per value row.
    assert result.effective_bits == pytest.approx(2 + 24 / 32 + 16 / 32 + 32 / (4 * 32) / 5 * 5 / 2, rel=0.1)
    assert result.fp16_cache_bytes == 2 * 2 * 32 * 30 * 2
    assert result.cache_bytes < result.fp16_cache_bytes / 3


def test_all_tokens_exact_gives_the_unquantized_model(tmp_path):
    model = tiny_llama()
    artifact = make_artifact(tmp_path, model, key_bits=1, value_bits=1)
    ids = tokens(2, 30).numpy()
    assert evaluate(model, [artifact], ids, recent=30)[0].kld == pytest.approx(0, abs=1e-6)
    assert evaluate(model, [artifact], ids, sinks=30)[0].kld == pytest.approx(0, abs=1e-6)
    assert evaluate(model, [artifact], ids)[0].kld > 0.01


def test_more_bits_are_closer(tmp_path):
    model = tiny_llama()
    artifacts = [make_artifact(tmp_path / str(b), model, key_bits=b, value_bits=b) for b in (8, 4, 2)]
    klds = [r.kld for r in evaluate(model, artifacts, tokens(3, 40).numpy(), batch_size=3)]
    assert klds[0] < klds[1] / 5 < klds[2] / 25
