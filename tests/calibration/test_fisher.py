from functools import partial

import numpy as np
import pytest
import torch

from kvcalib.calibration.attention import drawn_attention
from kvcalib.calibration.fisher import PassSettings, run_pass
from kvcalib.calibration.sample import bottom_k, choose, sequence_id, token_hash
from kvcalib.calibration.statistics import norm_histogram, norm_quantile
from kvcalib.errors import NonFiniteActivations
from kvcalib.model.identity import identify
from kvcalib.model.selftest import full_attention_layers
from kvcalib.runtime.loader import prove
from tests.tiny import calibrate, tiny_family, tiny_llama, tokens


def settings(keep=4096, batch=2, **changes):
    return PassSettings(**({"data": "test", "seed": 0, "keep_tokens": keep, "window": 5, "batch_size": batch,
                            "fingerprint": "0" * 64} | changes))  # fmt: skip


def collect(model, ids, **changes):
    return run_pass(
        model, prove(model, full_attention_layers(model)), ids.numpy(), identify(model), settings(**changes)
    )


def _keep(outputs, key, _module, _args, out):
    out.retain_grad()
    outputs[key] = out


def independent_gradients(model, ids):
    """Gradients through forward hooks on k_proj and v_proj, weights not frozen, one sequence at a time."""
    modules = {
        (i, n): getattr(layer.self_attn, f"{n}_proj") for i, layer in enumerate(model.model.layers) for n in "kv"
    }
    found = {key: [] for key in modules}
    for row in ids:
        outputs = {}

        handles = [m.register_forward_hook(partial(_keep, outputs, key)) for key, m in modules.items()]
        logits = model(row[None]).logits.float()
        torch.nn.functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for key, out in outputs.items():
            found[key].append(out.grad[0].double())
        model.zero_grad()
    return {key: torch.stack(parts) for key, parts in found.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fisher_equals_an_independent_autograd_computation(llama, checkpointing):
    ids = tokens(4, 24)
    record = collect(llama, ids, checkpointing=checkpointing)
    expected = independent_gradients(llama, ids)
    names = {"k": "key", "v": "value"}
    for (layer, role), gradient in expected.items():
        fisher = gradient**2
        total = fisher.sum((0, 1)).view(2, 16)
        found = record.tensors[f"layers.{layer}.{names[role]}.fisher_sum"]
        assert torch.allclose(found, total, rtol=1e-5, atol=1e-5 * total.max().item())
        sample = record.tensors[f"layers.{layer}.sample.{names[role]}_fisher"].double()
        assert sample.sum(0).sub(total).abs().max() < 1e-4 * total.max()
        by_head = gradient.flatten(0, 1).view(-1, 2, 16)
        outer = torch.einsum("nhi,nhj->hij", by_head, by_head) / len(by_head)
        assert torch.allclose(record.curvature(layer, names[role]), outer, atol=1e-5 * outer.abs().max().item())
    assert all(p.requires_grad for p in llama.parameters())


def test_fisher_agrees_with_finite_differences_of_the_loss(llama):
    """Independent of autograd: move one key channel's bias and watch the summed NLL."""
    ids = tokens(1, 12)
    record = collect(llama, ids)
    order = record.tensors["sample.position"].argsort()
    attention = llama.model.layers[1].self_attn

    def loss(shift):
        def bump(_m, _a, out):
            out = out.clone()
            out[0, 4, 3] += shift
            return out

        handle = attention.k_proj.register_forward_hook(bump)
        with torch.no_grad():
            logits = llama.double()(ids).logits
        handle.remove()
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))

    gradient = (loss(3e-3) - loss(-3e-3)) / 6e-3
    llama.float()
    found = record.tensors["layers.1.sample.key_fisher"][order][4].flatten()[3]
    assert found.item() == pytest.approx(gradient**2, rel=1e-2)


def test_sums_moments_and_attention_of_the_sample(llama):
    ids = tokens(3, 30)
    record = collect(llama, ids)
    layer = record.layer(0)
    assert torch.allclose(layer["sample.key"].double().sum(0), layer["key.sum"], atol=1e-4)
    assert torch.allclose(layer["sample.value"].double().square().sum(0), layer["value.square_sum"], rtol=1e-6)
    # Every query spends attention 1 per query head; two query heads share a kv head.
    assert layer["sample.attention_sum"].sum().item() == pytest.approx(4 * 3 * 30, rel=1e-5)
    assert (layer["query.norm_histogram"].sum(1) == 90).all()
    eager = tiny_llama()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(ids, output_attentions=True).attentions[0]
    total = weights.view(3, 2, 2, 30, 30).sum((2, 3))
    by_token = torch.zeros(3, 30, 2)
    rows = [[sequence_id(i.numpy()) for i in ids].index(s) for s in record.tensors["sample.sequence"].tolist()]
    by_token[rows, record.tensors["sample.position"]] = layer["sample.attention_sum"]
    assert torch.allclose(by_token.transpose(1, 2), total, atol=1e-4)


def test_windowed_maximum_and_late_attention_equal_a_loop():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 300, 8, generator=generator), torch.randn(1, 2, 300, 8, generator=generator)
    drawn = drawn_attention(q, k, 0.4, 5)
    peak, late = drawn.peak, drawn.late
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 0.4
    causal = torch.arange(300)[None] > torch.arange(300)[:, None]
    weights = scores.masked_fill(causal, -torch.inf).softmax(-1)[0].view(2, 2, 300, 300)
    for t in (0, 1, 100, 254, 255, 256, 257, 297, 299):
        assert torch.allclose(peak[0, :, t], weights[:, :, t : t + 5, t].amax((1, 2)), atol=1e-6)
        expected = weights[:, :, t + 2 : t + 5, t].mean(1).sum(1) / 3
        assert torch.allclose(late[0, :, t], expected, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("length", [9, 150, 513])
def test_early_attention_and_its_slope_equal_autograd(length, softcap):
    """Each token's early attention is differentiated by its own key; lengths whose middle lies within a block."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, length, 8, generator=generator), torch.randn(2, 2, length, 8, generator=generator)
    drawn = drawn_attention(q, k, 0.7, 5, softcap)
    half = length // 2
    for t in {0, 1, half // 2, half - 1, half, length - 1}:
        own = k[:, :, t].clone().requires_grad_(True)
        keys = torch.cat([k[:, :, :t], own[:, :, None], k[:, :, t + 1 :]], 2).repeat_interleave(2, 1)
        scores = q @ keys.mT * 0.7
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        early = scores.masked_fill(causal, -torch.inf).softmax(-1)[:, :, :half, t].unflatten(1, (2, 2)).sum((2, 3))
        assert torch.allclose(drawn.early[:, :, t], early, atol=1e-5)
        early.sum().backward()
        assert torch.allclose(drawn.slope[:, :, t], own.grad, atol=1e-5), t


@pytest.mark.parametrize("family", ["llama", "glm", "gemma2"])
def test_the_kept_slope_is_the_gradient_by_the_key_before_rope(family):
    """One key of one layer moved before RoPE, in whatever frame the family turns it; attention read off the model."""
    model = tiny_family(family)
    model.set_attn_implementation("eager")
    ids = tokens(1, 20)
    record = collect(model, ids)
    layer = max(s.index for s in record.info.layers)
    place = int((record.tensors["sample.position"] == 4).nonzero())
    kept = record.layer(layer)
    attention = model.model.layers[layer].self_attn

    def drawn(shift):
        def bump(_module, _args, out):
            out = out.clone()
            out[0, 4, : len(shift)] += shift
            return out

        handle = attention.k_proj.register_forward_hook(bump)
        with torch.no_grad():
            weights = model(ids, output_attentions=True, use_cache=False).attentions[layer][0]
        handle.remove()
        return weights[:2, :10, 4].double().sum()

    model.double()
    step = 1e-4
    steps = [torch.eye(16, dtype=torch.float64)[c] * step for c in range(16)]
    gradient = torch.stack([(drawn(s) - drawn(-s)) / (2 * step) for s in steps])
    assert drawn(torch.zeros(16)).item() == pytest.approx(kept["sample.attention_early"][place, 0].item(), rel=1e-4)
    slope = kept["sample.attention_slope"][place, 0].double()
    assert torch.allclose(slope, gradient, rtol=1e-2, atol=5e-3 * gradient.abs().max().item())


def test_sums_do_not_depend_on_the_batch_size(llama):
    ids = tokens(6, 20)
    a, b = collect(llama, ids, batch=1, keep=50), collect(llama, ids, batch=4, keep=50)
    assert torch.equal(a.tensors["sample.hash"], b.tensors["sample.hash"])
    for name, tensor in a.tensors.items():
        assert torch.allclose(tensor.double(), b.tensors[name].double(), rtol=1e-4, atol=1e-6), name


def test_nan_weights_are_named_by_layer_and_stage(llama):
    with torch.no_grad():
        llama.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    rotations = prove(tiny_llama(), [0, 1])
    with pytest.raises(NonFiniteActivations, match=r"layer 1: the value of the forward pass has NaN"):
        run_pass(llama, rotations, tokens(2, 10).numpy(), identify(llama), settings())


def test_sample_is_the_smallest_hashes_and_uniform():
    ids = tokens(20, 100).numpy()
    chosen = choose(ids, 0, 200)
    hashes = np.stack([token_hash(0, sequence_id(row), np.arange(100)) for row in ids])
    threshold = np.sort(hashes.ravel())[199]
    row, position = np.nonzero(hashes <= threshold)
    for found in (chosen, choose(ids, 0, 200, at_once=300)):
        assert found.row.tolist() == row.tolist()
        assert found.position.tolist() == position.tolist()
        assert found.hash.tolist() == hashes[row, position].tolist()
    assert chosen.within(5, 9) == slice((row < 5).sum(), (row < 9).sum())
    other = choose(ids, 1, 200)
    assert len(other.row) == 200
    assert other.row.tolist() != row.tolist()
    counts = np.histogram(
        np.concatenate([token_hash(0, s, np.arange(1000)) for s in range(50)]), 10, (0, float(2**63))
    )[0]
    assert abs(counts / 5000 - 1).max() < 0.1
    assert bottom_k(np.array([5, 3, 3, 9]), 2).tolist() == [1, 0]


def test_norm_quantile_is_within_a_bin():
    squared = torch.rand(2, 5000, generator=torch.Generator().manual_seed(0)) * 50 + 0.1
    counts = norm_histogram(squared)
    expected = squared.quantile(0.9, dim=1).numpy()
    assert np.allclose(norm_quantile(counts, 0.9), expected, rtol=0.09)


def test_moe_and_shared_heads_are_covered():
    record = calibrate(tiny_family("qwen3_moe"), samples=2, seq_len=16)
    assert [s.kv_heads for s in record.info.layers] == [2, 2, 2, 2]
    qwen = calibrate(tiny_family("qwen2"), samples=2, seq_len=16)
    assert qwen.info.layers[0].key_bias_norm > 0


def test_memory_does_not_grow_with_the_text(llama):
    """Kept tokens bound the record: 16 and 64 sequences end in tensors of the same size, but for their ids."""
    records = [collect(llama, tokens(n, 16), keep=100) for n in (16, 64)]
    sizes = [{name: t.nbytes for name, t in record.stored.items()} for record in records]
    assert [size.pop("sequences") for size in sizes] == [16 * 8, 64 * 8]
    assert sizes[0] == sizes[1]
