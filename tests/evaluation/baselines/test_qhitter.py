import numpy as np
import pytest
import torch

from kvcalib.errors import InputError
from kvcalib.evaluation.baselines import find
from kvcalib.evaluation.baselines.baseline import Place
from kvcalib.evaluation.baselines.qhitter import ClampedQuantizer
from tests.tiny import tiny_llama, tokens


def published(row: np.ndarray, bits: int) -> tuple[list[int], list[float]]:
    """`Quantization_simulated` of one head's row, its scale in two bytes."""
    most = 2**bits - 1
    s = np.float32(np.float16(max(np.float32(row.max() - row.min()), np.float32(1e-5)) / np.float32(most)))
    z = float(np.clip(-np.round(row.min() / s), 0, most))
    codes = [int(np.clip(np.round(x / s) + z, 0, most)) for x in row]
    return codes, [float(np.float32(q - z) * s) for q in codes]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_those_of_the_published_code(bits):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(9, 2, 16, generator=generator) * 2
    x[3] += 5  # all positive: the unsigned zero point cannot follow
    x[4] -= 6
    quantizer = ClampedQuantizer.of(Place(0, 2, 16), bits)
    rows = quantizer.encode(x, torch.float16)
    codes, back = quantizer.layout.unpack(rows["words"]).numpy(), quantizer.decode(rows).numpy()
    for t, h in np.ndindex(9, 2):
        expected, values = published(x[t, h].numpy(), bits)
        assert codes[t, h].tolist() == expected
        assert back[t, h].tolist() == pytest.approx(values, abs=1e-5)


def test_a_row_that_is_all_positive_is_clipped_as_published():
    """Facts of the code: a row of 5 to 6 at 4 bits has an error of 5."""
    x = torch.linspace(5, 6, 16).view(1, 1, 16)
    quantizer = ClampedQuantizer.of(Place(0, 1, 16), 4)
    assert float((quantizer.decode(quantizer.encode(x, torch.float16)) - x).abs().max()) == pytest.approx(5, abs=0.01)


def by_loops(weights: torch.Tensor, error: torch.Tensor, alpha: float) -> set[int]:
    """Part B2 of the published cache for one head of one layer: `weights [T, T]` post softmax, `error [2, T]`."""
    tokens = weights.shape[0]
    default, heavy, recent = int(0.07 * tokens + 1e-9), int(0.08 * tokens + 1e-9), int(0.05 * tokens + 1e-9)
    h = [float(weights[:, t].sum()) for t in range(tokens)]

    def unit(x):
        return [(v - min(x)) / (max(x) - min(x)) for v in x]

    e = [unit(part.tolist()) for part in error]
    q = [(2 - e[0][t] - e[1][t]) / 2 for t in range(tokens)]
    c = [alpha * a + (1 - alpha) * b for a, b in zip(unit(h), q, strict=True)]
    kept = set(range(tokens - recent, tokens))
    rest = [t for t in range(tokens) if t not in kept]
    kept |= set(sorted(rest, key=lambda t: -h[t])[:default])
    rest = [t for t in rest if t not in kept]
    return kept | set(sorted(rest, key=lambda t: -c[t])[:heavy])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_tokens_that_stay_are_those_of_the_published_cache(alpha):
    """One layer, one KV head: the stored keys' attention and errors, recomputed, choose the same tokens."""
    model = tiny_llama(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    ids = tokens(1, 100)
    exact = {}
    rotary = model.model.layers[0].self_attn

    def keep(module, args, kwargs, output):
        exact["hidden"], exact["turn"] = kwargs["hidden_states"], kwargs["position_embeddings"]

    handle = rotary.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(ids)
    handle.remove()
    with find(f"qhitter-published:bits=4:alpha={alpha}").run(model) as session:
        cache, _ = session.read(ids)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.no_grad():
        q, k, v = (p(exact["hidden"]).view(1, 100, 1, 16).transpose(1, 2) for p in
                   (rotary.q_proj, rotary.k_proj, rotary.v_proj))  # fmt: skip
        q, k = apply_rotary_pos_emb(q, k, *exact["turn"])
    stored = [torch.tensor(np.array([published(row, 4)[1] for row in x[0, 0].numpy()])).float() for x in (k, v)]
    scores = q[0, 0] @ stored[0].T / 4
    weights = scores.masked_fill(torch.ones(100, 100).bool().triu(1), -torch.inf).softmax(-1)
    error = torch.stack([(stored[0] - k[0, 0]).norm(dim=-1), (stored[1] - v[0, 0]).norm(dim=-1)])
    assert set(cache.survivors()[0].flatten().tolist()) == by_loops(weights, error, alpha)


def test_one_pass_holds_all_tokens_and_a_prompt_a_fifth():
    model, chosen = tiny_llama(), find("qhitter-published:bits=4")
    with chosen.run(model) as session:
        whole = session.new_cache()
        with torch.no_grad():
            model(tokens(1, 200), past_key_values=whole)
        cache, _ = session.read(tokens(1, 200))
        assert cache.survivors()[0].shape[-1] == 40
        assert whole.survivors()[0].shape[-1] == 200
        assert chosen.nbytes(cache) < 0.35 * chosen.nbytes(whole)


def test_bytes_by_hand():
    """10 tokens, 2 layers of 2 heads of 16 at 4 bits: 8 bytes of codes, z and s, position, attention, two errors."""
    chosen = find("qhitter-published:bits=4:keep=1")
    with chosen.run(tiny_llama()) as session:
        cache, _ = session.read(tokens(1, 10))
    assert chosen.nbytes(cache) == 10 * 2 * 2 * (2 * (8 + 4) + 4 + 4 + 2 * 4)


def test_a_share_that_leaves_no_room_for_the_recent_tokens_is_refused():
    with pytest.raises(InputError, match=r"recent is 0\.3, expected at most keep, which is 0\.2"):
        find("qhitter-published:recent=0.3")
