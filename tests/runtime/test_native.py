"""The compiled CPU attention against attention in float64 over what the rows decode to."""

import copy
import ctypes
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvcalib.model.angles import Angles
from kvcalib.runtime import native, paths, team
from kvcalib.runtime.kernels.view import PackedView
from kvcalib.runtime.storage import Rows
from tests.runtime.test_encode import quantizer

DIM = 16


def turning(dim=DIM, interleaved=False, turned=None, scale=1.0):
    half = dim // 2
    first = torch.arange(0, dim, 2) if interleaved else torch.arange(half)
    second = first + 1 if interleaved else first + half
    frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    if turned is not None:
        frequency[turned:] = 0
    return Angles(first, second, frequency, torch.where(frequency != 0, scale, 1.0).float())


def make_view(
    length, widths, batch=2, heads=2, share=0.05, scope="token", sinks=0, recent=0, start=0, spare=5, seed=0,
    relative=True,
):  # fmt: skip
    """A view of random tokens in storage with spare room, and its exact keys and values in slot order."""
    generator = torch.Generator().manual_seed(seed)
    view, decoded = {}, {}
    for role in ("key", "value"):
        q = quantizer(role == "value" and relative, scope, share, widths, heads, DIM, seed)
        x = torch.randn(batch, length, heads, DIM, generator=generator)
        rows = q.encode(x.flatten(0, 1), torch.float16)
        decoded[role] = q.decode(rows).view(batch, length, heads, DIM)
        for name, t in rows.items():
            room = t.new_zeros(batch, length + spare, *t.shape[1:])
            room[:, :length] = t.view(batch, length, *t.shape[1:])
            view[f"{role}.{name}"] = room[:, :length]
        decoded[f"{role}_quantizer"] = q
    exact = {n: torch.randn(batch, recent, heads, DIM, generator=generator) for n in ("key", "value")}
    sink = {n: torch.randn(batch, sinks, heads, DIM, generator=generator) for n in ("key", "value")}
    slot = torch.full((batch, sinks), -1, dtype=torch.int32)
    for b in range(batch):
        for s in range(sinks):
            if b + s < length and not (b == 1 and s == sinks - 1):
                slot[b, s] = b + s
                for n in sink:
                    decoded[n][b, b + s] = sink[n][b, s]
    total = length + recent
    made = PackedView(
        key=decoded["key_quantizer"], value=decoded["value_quantizer"], rows=view, length=length,
        sink_key=sink["key"] if sinks else None, sink_value=sink["value"] if sinks else None,
        sink_slot=slot if sinks else None,
        recent_key=exact["key"] if recent else None, recent_value=exact["value"] if recent else None,
        positions=(torch.arange(total) + start)[None].int(),
    )  # fmt: skip
    return made, *(torch.cat([decoded[n], exact[n]], 1) for n in ("key", "value"))


def rotated(x, angles, positions):
    """`x [B, T, H, D]` turned in float64 at `positions [B or 1, T]`, or `[B or 1, H, T]`."""
    each = positions[:, None] if positions.dim() == 2 else positions
    angle = each.double().transpose(1, 2)[..., None] * angles.frequency
    a, b = x[..., angles.first].double(), x[..., angles.second].double()
    out = torch.empty(x.shape, dtype=torch.float64)
    out[..., angles.first] = angles.scale * (a * angle.cos() - b * angle.sin())
    out[..., angles.second] = angles.scale * (b * angle.cos() + a * angle.sin())
    return out


def reference(query, key, value, angles, positions, allowed, scaling, softcap=None, sink_logits=None, bias=0.0):
    """Attention in float64, and its weights: `query [B, Hq, Q, D]`, `allowed [B or 1, 1, Q, T]`."""
    group = query.shape[1] // key.shape[2]
    k = rotated(key, angles, positions).repeat_interleave(group, 2).transpose(1, 2)
    v = value.double().repeat_interleave(group, 2).transpose(1, 2)
    scores = query.double() @ k.transpose(2, 3) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + bias).masked_fill(~allowed, -np.inf)
    if sink_logits is not None:
        extra = sink_logits.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : key.shape[1]]
    return (weights @ v).transpose(1, 2), weights


def check(view, key, value, angles, queries=1, group=2, mask=None, tolerance=3e-6, **options):
    batch, total, heads, _ = key.shape
    generator = torch.Generator().manual_seed(5)
    plain = torch.randn(batch, queries, heads * group, DIM, generator=generator)
    at = view.positions[..., total - queries : total]
    at = at if at.dim() == 2 else at.repeat_interleave(group, 1)
    query = rotated(plain, angles, at).transpose(1, 2).float()
    allowed = torch.arange(total)[None] <= torch.arange(total - queries, total)[:, None]
    allowed, bias = allowed[None, None], 0.0
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask
    elif mask is not None:
        allowed, bias = mask > -1e30, mask.double()
    found = native.native_attention(query, view, angles, mask, 0.3, **options)
    turned = native.native_attention(plain.transpose(1, 2), view, angles, mask, 0.3, rotate=True, **options)
    assert (found - turned).abs().max() < tolerance * max(1.0, float(value.abs().max()))
    expected, weights = reference(
        query, key, value, angles, view.positions[..., :total], allowed, 0.3, bias=bias, **options
    )
    assert found.shape == (batch, queries, heads * group, DIM)
    assert (found - expected).abs().max() < tolerance * max(1.0, float(value.abs().max()))
    age = 0.7 ** torch.arange(queries - 1, -1, -1, dtype=torch.float64)
    drew = (weights.unflatten(1, (heads, group)) * age[:, None]).sum((2, 3))
    drawn = torch.full((batch, heads, total), torch.nan)
    same = native.native_attention(query, view, angles, mask, 0.3, drawn=drawn, decay=0.7, **options)
    assert torch.equal(same, found)
    assert (drawn - drew).abs().max() < tolerance * group
    assert bool((drawn[drew == 0] == 0).all())
    return found


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("widths", [0, 1, 2, 3, 4, 5, 6, 7, 8, "mixed"])
def test_every_width_and_length(widths, length):
    check(*make_view(length, widths), turning())


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("scope", ["token", "head"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.4])
def test_groups_queries_and_outliers(group, queries, scope, share):
    check(*make_view(130, 3, share=share, scope=scope), turning(), queries=queries, group=group)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("recent", [0, 1, 70])
@pytest.mark.parametrize("length", [1, 5, 140])
@pytest.mark.parametrize("relative", [True, False])
def test_sinks_and_recent_window(sinks, recent, length, relative):
    check(*make_view(length, 2, sinks=sinks, recent=recent, relative=relative), turning())


@pytest.mark.parametrize("scope", ["token", "head"])
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_whose_codebook_is_not_relative(scope, share, dtype):
    view, key, value = make_view(130, "mixed", share=share, scope=scope, relative=False)
    assert not {"value.zero", "value.scale"} & set(view.rows)
    for name in ("key", "value"):
        exact = f"{name}.outlier_value"
        if exact in view.rows:
            view.rows[exact] = view.rows[exact].to(dtype)
    for role, x in (("key", key), ("value", value)):
        mine = {n.split(".")[1]: t.flatten(0, 1) for n, t in view.rows.items() if n.startswith(role)}
        x.copy_(getattr(view, role).decode(mine).view_as(x))
    check(view, key, value, turning(), queries=2)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("queries", [1, 4])
def test_padded_rows(kind, queries):
    view, key, value = make_view(150, 3, batch=3, sinks=2, recent=3)
    total = key.shape[1]
    allowed = (torch.arange(total)[None] <= torch.arange(total - queries, total)[:, None]).expand(3, 1, -1, -1).clone()
    allowed[1, ..., :70] = False
    allowed[2] = False
    view.positions = torch.arange(total).repeat(3, 1).int()
    view.positions[1] = (view.positions[1] - 70).clamp(min=0)
    mask = allowed if kind == torch.bool else torch.where(allowed, 0.25, torch.finfo(kind).min)
    found = check(view, key, value, turning(), queries=queries, mask=mask)
    assert bool((found[2] == 0).all()) == (kind == torch.bool) or kind == torch.float32


def test_positions_in_any_order():
    view, key, value = make_view(150, 3, batch=2)
    order = torch.stack([torch.randperm(2000, generator=torch.Generator().manual_seed(i))[:150] for i in range(2)])
    view.positions = order.int()
    mask = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    check(view, key, value, turning(), mask=mask)


def test_a_tile_that_begins_with_padding_before_position_zero():
    """Positions -1, 0, 1, ...: one padded token whose position nobody clamped."""
    view, key, value = make_view(100, 3, batch=1, start=-1)
    mask = torch.ones(1, 1, 1, 100, dtype=torch.bool)
    mask[..., 0] = False
    check(view, key, value, turning(), mask=mask)


@pytest.mark.parametrize("start", [5_000, 999_000, 1_000_000])
def test_positions_around_a_million(start):
    """Relative to what matters: the query lies a million positions on, the angles are still exact."""
    check(*make_view(130, 4, start=start), turning(), tolerance=4e-6)


@pytest.mark.parametrize("angles", [turning(interleaved=True), turning(turned=4, scale=1.2), turning(turned=0)])
def test_kinds_of_rotation(angles):
    check(*make_view(100, 3), angles, queries=2)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"sink_logits": torch.tensor([0.5, -1.0, 3.0, 0.0])}])
def test_softcap_and_sink_logits(options):
    check(*make_view(100, 3), turning(), queries=2, **options)


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_do_not_change_the_result(threads, openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(team, "_openmp", lambda: None)
    view, key, value = make_view(1000, 3, batch=1, heads=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        a, b = (check(view, key, value, turning()) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(a, b)


def test_every_thread_of_the_team_is_called():
    seen = []
    loop = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda data: seen.append(data))
    address = ctypes.cast(loop, ctypes.c_void_p).value
    for threads in (1, 3):
        seen.clear()
        team.run(SimpleNamespace(address=address), 77, threads)
        assert seen == [77] * threads


def test_equal_values_keep_their_outlier():
    """A scale of zero: all but the outlier are one number."""
    view, key, _ = make_view(70, 3, batch=1, share=0.01)
    x = torch.full((70, 2, DIM), 0.25)
    x[:, 1, 3] = 9.0
    rows = view.value.encode(x, torch.float16)
    for name, t in rows.items():
        view.rows[f"value.{name}"] = t[None]
    assert bool((rows["scale"] == 0).all())
    check(view, key, view.value.decode(rows)[None], turning())


def test_few_queries_on_a_cpu_are_read_and_written_by_compiled_code(monkeypatch):
    view, _, _ = make_view(70, 3, batch=1)
    query, angles = torch.zeros(1, 4, 1, DIM), turning()
    assert paths.reading(query, view, angles) == "native"
    assert paths.writing(view.key, view.value, query.device) == "native"
    assert paths.reading(query.expand(1, 4, 64, DIM), view, angles) == "torch"
    assert paths.reading(query, view, None) == "torch"
    monkeypatch.setenv("KVCALIB_PATH", "torch")
    assert paths.reading(query, view, angles) == "torch"


def test_a_copied_cache_writes_into_its_own_memory():
    rows = Rows()
    rows.append({"x": torch.zeros(1, 200, 4)})
    rows.append({"x": torch.zeros(1, 1, 4)})
    rows.place("x", 0)
    other = copy.deepcopy(rows)
    for mine, value in ((rows, 1.0), (other, 2.0)):
        address, _, step = mine.place("x", 0)
        assert step == 4
        (ctypes.c_float * (201 * 4)).from_address(address)[:] = [value] * (201 * 4)
    assert bool((rows.read(0, 201)["x"] == 1).all())
    assert bool((other.read(0, 201)["x"] == 2).all())


def scattered(batch, heads, total, most, strided=False, seed=0):
    """Positions `[B, H, T]` below `most`, ascending; the b-th row begins with 3 b unused slots; and which are used."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(most, generator=generator)[:total] for _ in range(batch * heads)])
    positions = drawn.sort(-1).values.view(batch, heads, total).int()
    for b in range(batch):
        positions[b, :, : min(3 * b, total - 1)] = -1
    used = positions[:, 0] >= 0
    if strided:
        room = torch.full((batch, total + 9, heads), 2**31 - 1, dtype=torch.int32)
        room[:, :total] = positions.transpose(1, 2)
        positions = room.transpose(1, 2)
    return positions, used


def hidden(used, queries, kind):
    """A mask that is causal and hides unused slots."""
    total = used.shape[1]
    causal = torch.arange(total)[None] <= torch.arange(total - queries, total)[:, None]
    allowed = (causal & used[:, None])[:, None]
    return allowed if kind == torch.bool else torch.where(allowed, -0.5, torch.finfo(kind).min)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("length", [1, 63, 64, 200])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_positions_of_each_head(length, group, queries, kind):
    view, key, value = make_view(length, 3, sinks=2, recent=6, share=0.05, scope="head")
    for most in (length + 20, 5 * length + 40, 100 * length + 40):  # runs, tiles within 1024, tiles beyond
        view.positions, used = scattered(2, 2, length + 6, most, strided=most == 5 * length + 40)
        mask = hidden(used, queries, kind)
        check(view, key, value, turning(), queries=queries, group=group, mask=mask)
        if most < 1000:
            logits = torch.linspace(-1, 2, 2 * group)
            check(view, key, value, turning(), queries, group, mask=mask, softcap=2.0, sink_logits=logits)


@pytest.mark.parametrize("most", [800, 4000, 90_000])
@pytest.mark.parametrize("queries", [1, 5])
def test_positions_of_each_head_in_several_splits(most, queries, threads):
    threads(8)
    view, key, value = make_view(700, 4, sinks=2, recent=5)
    view.positions, used = scattered(2, 2, 705, most, strided=True)
    check(view, key, value, turning(), queries, group=3, mask=hidden(used, queries, torch.bool))
    view.positions = view.positions[:1]
    check(view, key, value, turning(), queries, group=3)


@pytest.mark.parametrize("dim", [4, 10, 20])
def test_pairs_that_fill_no_register(dim, monkeypatch):
    monkeypatch.setitem(globals(), "DIM", dim)
    view, key, value = make_view(100, 3)
    for most in (400, 30_000):
        view.positions, used = scattered(2, 2, 100, most)
        check(view, key, value, turning(dim), mask=hidden(used, 1, torch.bool))


def test_a_recent_window_longer_than_the_packed_part(threads):
    """The last split has no packed tile left."""
    threads(2)
    check(*make_view(320, 3, batch=1, heads=1, recent=500), turning())


def test_tables_grow_where_a_pass_needs_it():
    view, key, value = make_view(70, 3)
    angles, other = turning(turned=7), turning(turned=3)
    before = native._turns(angles, 0)
    assert native._turns(angles, 0) is before
    assert native._turns(other, 0) is not before
    reach = native.LEAST * 1024
    for last in (reach - 1, reach, 5 * reach):
        view.positions = torch.arange(70)[None].int() + last - 69
        check(view, key, value, angles)
    assert native._turns(angles, 0).numbers[-1] > 5 * native.LEAST > before.numbers[-1]


def test_drawn_has_to_fit():
    view, _, _ = make_view(70, 3, recent=2)
    query = torch.zeros(2, 4, 1, DIM)
    wrong = torch.zeros(2, 4, 72), torch.zeros(2, 2, 72, dtype=torch.float64), torch.zeros(2, 72, 2).transpose(1, 2)
    for drawn in wrong:
        with pytest.raises(ValueError, match=r"drawn is .* expected contiguous float32 \(2, 2, 72\)"):
            native.native_attention(query, view, turning(), None, 1.0, drawn=drawn)


def test_zero_and_scale_of_a_token_kept_for_each_head():
    """Rows from which a head's tokens can be dropped alone: read as scope "head", the tokens' own numbers decide."""
    view, key, value = make_view(130, 3, share=0.0)
    view.value = replace(view.value, scope="head")
    for name in ("value.zero", "value.scale"):
        view.rows[name] = view.rows[name].repeat(1, 1, 2)
    check(view, key, value, turning())
    for name in ("words", "zero", "scale"):
        view.rows[f"value.{name}"] = view.rows[f"value.{name}"].flip(1)
    view.rows["value.zero"][:, :, 1] += 1
    value = value.flip(1).clone()
    value[:, :, 1] += 1
    check(view, key, value, turning(), tolerance=1e-3)  # zero is rounded to a two-byte type once more
