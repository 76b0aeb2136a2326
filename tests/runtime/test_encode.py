"""The compiled encoder gives the bits of `Quantizer.encode`."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvcalib.quant.codebook import LADDER
from kvcalib.quant.feedback import Feedback
from kvcalib.quant.fitting import make_quantizer
from kvcalib.runtime.encode import MOST_TOKENS, store
from kvcalib.runtime.storage import Rows
from tests.quant.test_feedback import curvature


def quantizer(relative, scope, share, widths, heads=3, dim=16, seed=0, feedback=False):
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
    made = make_quantizer(ladders, chosen.to(torch.uint8), relative, scope, share, weight)
    if feedback:
        made.feedback = Feedback.from_curvature(curvature(heads, dim, seed), made.layout.widths)
    return made


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("scope", ["token", "head"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("widths", [0, 1, 3, 8, "mixed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("feedback", [False, True])
def test_same_bits(relative, scope, share, widths, dtype, feedback):
    q = quantizer(relative, scope, share, widths, feedback=feedback)
    x = torch.randn(7, 3, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[2] = 0.5
    x[3, :, :9] = x[3, :, 0, None]
    x[4] *= 100
    expected, found = q.encode(x, dtype), stored(q, x, dtype)
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


def stored(q, x, dtype):
    """What `store` writes into a cache that already holds tokens, two rows of a batch at once."""
    rows, batch = Rows(), 2
    spec = {
        n: (torch.Size((batch, len(x) + 3, *shape)), kind, x.device) for n, (shape, kind) in q.row_spec(dtype).items()
    }
    rows.extend(spec)
    for t in rows.tensors().values():
        t.fill_(77)
    both = torch.stack([x.flip(0), x])
    store(q, both, dtype, rows.read(3, len(x) + 3))
    found = rows.read(0, len(x) + 3)
    for t in found.values():
        assert bool((t[:, :3] == 77).all()), "earlier tokens were overwritten"
        assert t.shape[1] == len(x) + 3
    bits = {n: t[1, 3:].clone() for n, t in found.items()}
    # Asked for the error too, the same bits, and what is left after decoding them.
    residue = torch.full((batch, *x.shape[:2], 2), torch.nan)
    store(q, both, dtype, rows.read(3, len(x) + 3), residue=residue)
    assert all(torch.equal(bits[n], t[1, 3:]) for n, t in rows.read(0, len(x) + 3).items())
    for b in range(batch):
        read = q.decode({n: t[b, 3:] for n, t in rows.read(0, len(x) + 3).items()}).double()
        wide = both[b].double()
        expected = torch.stack([(wide - read).square().sum(-1), wide.square().sum(-1)], -1)
        # Decoding rounds once more: relative to the token, an element is off by a few units of the last place.
        assert bool(((residue[b] - expected).abs() <= 1e-5 * expected + 1e-6 * expected[..., 1:]).all())
    return bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_torch_s(dtype):
    from kvcalib.quant.quantizer import saturate
    from kvcalib.runtime.encode import _narrow, _widen

    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,), generator=generator, dtype=torch.int64).int()
    special = torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e38, -3.4e38, 6e-8, 3e-8, 2.9e-8, 6.1e-5, 1.0])
    x = torch.cat([bits.view(torch.float32), special, torch.randn(20000, generator=generator)])
    x = x[x.isfinite()]
    expected = saturate(x, dtype)
    found = np.array([_narrow(np.float32(v), dtype == torch.bfloat16) for v in x.numpy()], dtype=np.uint16)
    assert np.array_equal(found, expected.view(torch.int16).numpy().view(np.uint16))
    wide = np.array([_widen(b, dtype == torch.bfloat16) for b in found], dtype=np.float32)
    assert np.array_equal(wide, expected.float().numpy())


def test_a_step_takes_the_compiled_path_and_a_prompt_the_tensors(tmp_path, monkeypatch):
    from kvcalib.runtime import layers
    from tests.tiny import make_artifact, tiny_llama

    artifact = make_artifact(tmp_path, tiny_llama())
    called = []
    monkeypatch.setattr(layers, "store", lambda *_: called.append("compiled"))
    layer = artifact.new_cache(tiny_llama()).layers[0]
    for count in (MOST_TOKENS, MOST_TOKENS + 1):
        layer.update(torch.ones(1, 2, count, 16), torch.ones(1, 2, count, 16))
        called.append(count)
    assert called == ["compiled", "compiled", MOST_TOKENS, MOST_TOKENS + 1]


@pytest.mark.parametrize("widths", [3, "mixed"])
@pytest.mark.parametrize("prefix", ["", "value."])
def test_zero_and_scale_of_a_token_for_every_head(widths, prefix):
    q = quantizer(True, "token", 0.0, widths)
    x = torch.randn(2, 7, 3, 16, generator=torch.Generator().manual_seed(1))
    x[:, 2] = 0.5
    spec = replace(q, scope="head").row_spec(torch.float16)
    rows = {prefix + n: torch.full((2, 7, *shape), 77).to(kind) for n, (shape, kind) in spec.items()}
    residue = torch.empty(2, 7, 3, 2)
    store(q, x, torch.float16, rows, prefix, residue)
    expected = q.encode(x.flatten(0, 1), torch.float16)
    for name in ("zero", "scale"):
        assert torch.equal(rows[prefix + name].flatten(0, 1), expected[name].expand(-1, 3)), name
    assert torch.equal(rows[f"{prefix}words"].flatten(0, 1), expected["words"])
    read = replace(q, scope="head").decode({n.removeprefix(prefix): t.flatten(0, 1) for n, t in rows.items()})
    assert torch.equal(read, q.decode(expected))
    assert torch.allclose(residue[..., 0], (x - read.view_as(x)).square().sum(-1), rtol=1e-4, atol=1e-6)


def test_rows_and_residue_have_to_fit():
    x = torch.zeros(1, 2, 3, 16)
    for scope, share, groups in (("token", 0.05, 3), ("token", 0.0, 2), ("head", 0.0, 1)):
        q = quantizer(True, scope, share, 3)
        rows = {n: torch.zeros(1, 2, *shape, dtype=kind) for n, (shape, kind) in q.row_spec(torch.float16).items()}
        rows["zero"] = rows["scale"] = torch.zeros(1, 2, groups, dtype=torch.float16)
        with pytest.raises(ValueError, match=f"rows have {groups} zeros and scales .* scope '{scope}'"):
            store(q, x, torch.float16, rows)
    q = quantizer(False, "token", 0.0, 3)
    rows = {"words": torch.zeros(1, 2, q.layout.words, dtype=torch.int32)}
    wrong = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, 2).double(), torch.zeros(1, 2, 2, 3).transpose(2, 3)
    for residue in wrong:
        with pytest.raises(ValueError, match=r"residue is .* float32 \(1, 2, 3, 2\)"):
            store(q, x, torch.float16, rows, residue=residue)
