"""The attention drawn, against plain float64 softmax weights summed up."""

import pytest
import torch

from tests.runtime.kernels.layers import Case, make_layer, reference, weights_of

MIXED = {"key_bits": "mixed", "value_bits": "mixed"}
SMALL = {"dim": 32, "length": 40}
SOFT = {"mask": "float", "softcap": 5.0, "sink_logits": True}
CASES = [
    *[Case(**SMALL, group=g, queries=q, per_head=(g > 1) == (q == 1)) for g in (1, 3) for q in (1, 4)],
    *[Case(**SMALL, mask=m, queries=q, per_head=True) for m, q in (("bool", 1), ("float", 4))],
    Case(**SMALL, sinks=3, recent=5, queries=4),
    Case(**SMALL, sinks=3, recent=20, queries=4, mask="bool", per_head=True, group=3),
    Case(**SMALL, softcap=2.0, sink_logits=True),
    Case(dim=32, length=130, sinks=2, recent=3, queries=4, per_head=True, **SOFT, **MIXED),
    Case(length=0, recent=6, queries=2, batch=1),
    Case(dim=32, length=200, batch=1, outliers=5, scope="token"),
    Case(**SMALL, queries=9, group=4, recent=4, batch=1),
]


def draw(layer, device, splits=None, decay=1.0):
    """Output and attention drawn; what is to be overwritten is not a number before."""
    from kvcalib.runtime.kernels.attention import packed_attention

    x = layer.to(device)
    heads = x.view.value.layout.widths.shape[0]
    drawn = torch.full((len(x.query), heads, x.view.total), torch.nan, device=device)
    out = packed_attention(
        x.query, x.view, x.angles, x.mask, x.scaling, x.softcap, x.sink_logits, splits, drawn=drawn, decay=decay
    )
    return out.cpu(), drawn.cpu()


def expected_of(layer, decay):
    """The definition, one query and one kv head at a time."""
    weights = weights_of(layer)
    batch, query_heads, queries, total = weights.shape
    heads = layer.keys.shape[2]
    found = torch.zeros(batch, heads, total, dtype=torch.float64)
    for head in range(query_heads):
        for q in range(queries):
            found[:, head * heads // query_heads] += decay ** (queries - 1 - q) * weights[:, head, q]
    return found


@pytest.mark.parametrize(("case", "splits"), [(case, 3) for case in CASES] + [(case, 1) for case in CASES[:3]], ids=str)
def test_drawn_equals_float64(case, splits, device):
    layer = make_layer(case)
    out, drawn = draw(layer, device, splits, 0.75)
    expected = expected_of(layer, 0.75)
    assert (drawn - expected).abs().max() < 3e-6 * max(1, case.queries * case.group)
    hidden = ~layer.allowed.any(2).expand_as(drawn)
    assert (drawn[hidden] == 0).all()
    assert (out.double() - reference(layer)).norm() < 3e-6 * reference(layer).norm()
    if case.queries > 1 and case.sinks:
        assert (expected_of(layer, 1.0) - expected).abs().max() > 0.1, "decay makes no difference here"


@pytest.mark.parametrize(("recent", "mask"), [(0, "causal"), (3, "causal"), (12, "causal"), (3, "bool")])
def test_long_prompts_are_taken_in_blocks_of_queries(recent, mask, device, monkeypatch):
    """Raw scores are bounded; blocks of queries give what one pass gives. The exact window ends inside a block."""
    from kvcalib.runtime.kernels import attention

    layer = make_layer(Case(dim=32, length=20, queries=11, mask=mask, recent=recent, sinks=2))
    passes = []
    launches = attention.attention_launches

    def counted(query, *args, **kwargs):
        passes.append(query.shape[2])
        return launches(query, *args, **kwargs)

    monkeypatch.setattr(attention, "attention_launches", counted)
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 4 * 2 * 4 * layer.view.total * 4)
    out, drawn = draw(layer, device, decay=0.9)
    assert passes == [4, 4, 3]
    assert (drawn - expected_of(layer, 0.9)).abs().max() < 1e-5
    assert (out.double() - reference(layer)).norm() < 3e-6 * reference(layer).norm()


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decay_0_counts_the_last_query_alone_and_1_all_alike(decay, device):
    layer = make_layer(Case(**SMALL, queries=3))
    assert torch.allclose(draw(layer, device, decay=decay)[1].double(), expected_of(layer, decay), atol=3e-6)


@pytest.mark.parametrize("kind", ["bool", "float", "lowest"])
def test_rows_that_see_nothing_draw_nothing(kind, device):
    """A row of padding: False throughout, -inf, or the lowest number, as masks of transformers have it."""
    layer = make_layer(Case(**SMALL, mask="bool" if kind == "bool" else "float", queries=2))
    layer.allowed[0, 0, 0] = False
    if kind == "bool":
        layer.mask = layer.allowed
    else:
        low = -torch.inf if kind == "float" else torch.finfo(torch.float32).min
        layer.mask = torch.where(layer.allowed, layer.mask, low)
    _, drawn = draw(layer, device)
    assert torch.allclose(drawn.double(), expected_of(layer, 1.0), atol=6e-6)
    assert (drawn.sum(-1)[0] < 2.01).all()


def test_asking_for_it_changes_no_output_and_every_launch_gives_the_same_bits(device):
    from kvcalib.runtime.kernels.attention import packed_attention

    layer = make_layer(Case(dim=32, length=130, batch=1, dtype=torch.bfloat16, sinks=2, recent=3, queries=2))
    out, drawn = draw(layer, device, 3)
    again = draw(layer, device, 3)
    assert torch.equal(out, again[0])
    assert torch.equal(drawn, again[1])
    x = layer.to(device)
    assert torch.equal(out, packed_attention(x.query, x.view, x.angles, x.mask, x.scaling, splits=3).cpu())


@pytest.mark.parametrize(
    ("drawn", "decay", "message"),
    [
        (torch.empty(2, 2, 39), 1.0, r"drawn is torch.float32 \[2, 2, 39\].* expected float32 \[2, 2, 40\]"),
        (torch.empty(2, 2, 40, dtype=torch.float64), 1.0, r"drawn is torch.float64 \[2, 2, 40\]"),
        (torch.empty(2, 40, 2).transpose(1, 2), 1.0, r"with strides \(80, 1, 2\), expected .*contiguous"),
        (torch.empty(2, 2, 40), 1.5, r"decay is 1.5, expected a factor from 0 to 1"),
    ],
)
def test_what_cannot_be_filled_is_refused(drawn, decay, message, device):
    from kvcalib.runtime.kernels.attention import packed_attention

    layer = make_layer(Case(**SMALL))
    with pytest.raises(ValueError, match=message):
        packed_attention(layer.query, layer.view, layer.angles, None, layer.scaling, drawn=drawn, decay=decay)
