"""The compiled CPU attention against attention in float64 over what the rows decode to."""

import copy
import ctypes
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


def make_view(length, widths, batch=2, heads=2, share=0.05, scope="token", sinks=0, recent=0, start=0, spare=5, seed=0):
    """A view of random tokens in storage with spare room, and its exact keys and values in slot order."""
    generator = torch.Generator().manual_seed(seed)
    view, decoded = {}, {}
    for role in ("key", "value"):
        q = quantizer(role == "value", scope, share, widths, heads, DIM, seed)
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
    """`x [B, T, H, D]` turned in float64 at `positions [B or 1, T]`."""
    angle = positions.double()[..., None, None] * angles.frequency
    a, b = x[..., angles.first].double(), x[..., angles.second].double()
    out = torch.empty(x.shape, dtype=torch.float64)
    out[..., angles.first] = angles.scale * (a * angle.cos() - b * angle.sin())
    out[..., angles.second] = angles.scale * (b * angle.cos() + a * angle.sin())
    return out


def reference(query, key, value, angles, positions, allowed, scaling, softcap=None, sink_logits=None, bias=0.0):
    """Attention in float64: `query [B, Hq, Q, D]`, `allowed [B or 1, 1, Q, T]`."""
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
    return (weights @ v).transpose(1, 2)


def check(view, key, value, angles, queries=1, group=2, mask=None, tolerance=3e-6, **options):
    batch, total, heads, _ = key.shape
    generator = torch.Generator().manual_seed(5)
    plain = torch.randn(batch, queries, heads * group, DIM, generator=generator)
    query = rotated(plain, angles, view.positions[:, total - queries :]).transpose(1, 2).float()
    allowed = torch.arange(total)[None] <= torch.arange(total - queries, total)[:, None]
    allowed, bias = allowed[None, None], 0.0
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask
    elif mask is not None:
        allowed, bias = mask > -1e30, mask.double()
    found = native.native_attention(query, view, angles, mask, 0.3, **options)
    turned = native.native_attention(plain.transpose(1, 2), view, angles, mask, 0.3, rotate=True, **options)
    assert (found - turned).abs().max() < tolerance * max(1.0, float(value.abs().max()))
    expected = reference(query, key, value, angles, view.positions, allowed, 0.3, bias=bias, **options)
    assert found.shape == (batch, queries, heads * group, DIM)
    assert (found - expected).abs().max() < tolerance * max(1.0, float(value.abs().max()))
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
def test_sinks_and_recent_window(sinks, recent, length):
    check(*make_view(length, 2, sinks=sinks, recent=recent), turning())


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
