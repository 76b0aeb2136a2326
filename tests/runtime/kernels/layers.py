"""Random packed layers, and attention over them in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcalib.model.angles import Angles
from kvcalib.quant.codebook import Codebook
from kvcalib.quant.feedback import Feedback
from kvcalib.quant.packing import Layout
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime.kernels.view import PackedView
from tests.quant.test_feedback import curvature

GROUPED = (8, 4, 3, 2, 1, 0, 5, 6, 7)


def make_angles(dim: int, style: str = "half", base: float = 10000.0) -> Angles:
    """Pairs and frequencies of the usual rotary embeddings; "none" turns nothing, "part" half of the channels."""
    turning = dim // 2 if style == "part" else dim
    p = torch.arange(dim // 2)
    frequency = base ** -(2 * p.double() / turning)
    scale = torch.ones(dim // 2)
    if style == "interleaved":
        return Angles(2 * p, 2 * p + 1, frequency, scale)
    if style == "part":
        t = torch.arange(turning // 2)
        rest = torch.arange(turning, dim)
        first, second = torch.cat([t, rest[::2]]), torch.cat([t + turning // 2, rest[1::2]])
        return Angles(first, second, torch.where(p < turning // 2, frequency, 0.0), scale)
    if style == "none":
        frequency = torch.zeros_like(frequency)
    if style == "scaled":
        scale = scale * 1.25
    return Angles(p, p + dim // 2, frequency, scale)


def order_of(angles: Angles, heads: int) -> Tensor:
    """Pairs side by side, the same for every head."""
    return torch.stack([angles.first, angles.second], 1).flatten().expand(heads, -1)


def widths_of(kind: int | str, heads: int, dim: int, order: Tensor, generator: torch.Generator) -> Tensor:
    """`[H, D]`: one width, "mixed" (by groups of 16 in `order`) or "free" (every channel its own)."""
    if isinstance(kind, int):
        return torch.full((heads, dim), kind)
    if kind == "free":
        return torch.randint(0, 9, (heads, dim), generator=generator)
    widths = torch.empty(heads, dim, dtype=torch.long)
    for h in range(heads):
        groups = [GROUPED[(h + g) % len(GROUPED)] for g in range(dim // 16)]
        widths[h, order[h]] = torch.tensor(groups).repeat_interleave(16)
    return widths


def make_quantizer(
    relative: bool, kind: int | str, heads: int, dim: int, outliers: int, scope: str, order: Tensor, seed: int,
    segment: str | None = None,
) -> Quantizer:  # fmt: skip
    """A quantizer with random ascending codebooks: keys around channel means, values on [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    widths = widths_of(kind, heads, dim, order, generator)
    size = 1 << int(widths.max())
    x = torch.randn(heads, dim, size, generator=generator).sort(-1).values
    x = x / x.abs().amax(-1, keepdim=True) if relative else 2 * x + torch.randn(heads, dim, 1, generator=generator)
    full = Codebook(widths.to(torch.uint8), x)
    codebook = Codebook.from_ragged(full.ragged(), widths)
    weight = torch.rand(heads, dim, generator=generator) + 0.1
    return Quantizer(codebook, Layout.build(widths, segment, order), relative, scope, outliers, weight)


def add_feedback(*quantizers: Quantizer) -> None:
    """Give them error feedback for a curvature of their own."""
    for seed, quantizer in enumerate(quantizers):
        widths = quantizer.layout.widths
        quantizer.feedback = Feedback.from_curvature(curvature(*widths.shape, seed), widths)


@dataclass
class Case:
    """Shape and kind of a packed layer and of the queries that read it."""

    length: int = 65
    heads: int = 2
    group: int = 2
    dim: int = 64
    batch: int = 2
    queries: int = 1
    key_bits: int | str = 3
    value_bits: int | str = 3
    outliers: int = 2
    scope: str = "head"
    segment: str | None = None
    style: str = "half"
    start: int = 0
    stride: int = 1
    sinks: int = 0
    recent: int = 0
    mask: str = "causal"
    softcap: float | None = None
    sink_logits: bool = False
    dtype: torch.dtype = torch.float32
    room: int = 7
    base: float = 10000.0
    per_head: bool = False
    feedback: bool = False
    relative: bool = True

    def __str__(self):
        plain = Case()
        return "-".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(plain, k)) or "default"


@dataclass
class Layer:
    """A made case: what the kernel gets, and the same in float64."""

    query: Tensor
    view: PackedView
    angles: Angles
    mask: Tensor | None
    softcap: float | None
    sink_logits: Tensor | None
    keys: Tensor
    values: Tensor
    allowed: Tensor

    @property
    def scaling(self) -> float:
        return self.query.shape[-1] ** -0.5

    def to(self, device: torch.device) -> Layer:
        """The kernel's inputs on `device`."""
        moved = {n: t.to(device) for n, t in vars(self.view).items() if isinstance(t, Tensor)}
        rows = {n: t.to(device) for n, t in self.view.rows.items()}
        extra = {n: getattr(self, n) for n in ("query", "mask", "sink_logits")}
        extra = {n: t.to(device) for n, t in extra.items() if t is not None}
        return replace(self, view=replace(self.view, rows=rows, **moved), **extra)


def rotated(keys: Tensor, positions: Tensor, angles: Angles) -> Tensor:
    """`keys [B, T, H, D]` turned to `positions [B, T]` or `[B, H, T]`, float64."""
    by_head = positions[:, :, None] if positions.dim() == 2 else positions.transpose(1, 2)
    angle = by_head.double()[..., None] * angles.frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = keys[..., angles.first].double(), keys[..., angles.second].double()
    out = torch.empty(keys.shape, dtype=torch.float64)
    out[..., angles.first] = angles.scale.double() * (a * cos - b * sin)
    out[..., angles.second] = angles.scale.double() * (b * cos + a * sin)
    return out


def positions_per_head(case: Case, first: Tensor, generator: torch.Generator) -> Tensor:
    """`[B, H, T + w]` as eviction leaves them: every head's own tokens, ascending; -1 in slots before `first [B]`."""
    total = case.length + case.recent
    steps = torch.randint(1, 2 * case.stride + 60, (case.batch, total, case.heads), generator=generator)
    positions = torch.full((case.batch, total + case.room, case.heads), 7, dtype=torch.int32)
    positions[:, :total] = (case.start + steps.cumsum(1)).int()
    for b, unused in enumerate(first.tolist()):
        positions[b, :unused] = -1
    return positions.transpose(1, 2)[..., :total]


def make_layer(case: Case, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    c = case
    angles = make_angles(c.dim, c.style, c.base)
    key_order = order_of(angles, c.heads)
    value_order = torch.arange(c.dim).expand(c.heads, -1)
    key = make_quantizer(False, c.key_bits, c.heads, c.dim, c.outliers, c.scope, key_order, seed + 1, c.segment)
    value = make_quantizer(
        c.relative, c.value_bits, c.heads, c.dim, c.outliers, c.scope, value_order, seed + 2, c.segment
    )
    if c.feedback:
        add_feedback(key, value)
    exact = torch.bfloat16 if c.dtype == torch.bfloat16 else torch.float16
    total = c.length + c.recent
    keys = 2 * torch.randn(c.batch, total, c.heads, c.dim, generator=generator)
    values = torch.randn(c.batch, total, c.heads, c.dim, generator=generator)
    keys, values = keys.to(exact), values.to(exact)

    rows, read = {}, {}
    for name, quantizer, x in (("key", key, keys), ("value", value, values)):
        if not c.length:
            read[name] = x.float()
            continue
        mine = quantizer.encode(x[:, : c.length].reshape(-1, c.heads, c.dim), exact)
        decoded = quantizer.decode(mine)
        read[name] = torch.cat([decoded.reshape(c.batch, c.length, c.heads, c.dim), x[:, c.length :].float()], 1)
        for n, t in mine.items():
            buffer = torch.zeros(c.batch, c.length + c.room, *t.shape[1:], dtype=t.dtype)
            buffer[:, : c.length] = t.reshape(c.batch, c.length, *t.shape[1:])
            rows[f"{name}.{n}"] = buffer[:, : c.length]

    first = torch.tensor([3 * b for b in range(c.batch)]) if c.mask != "causal" else torch.zeros(c.batch, dtype=int)
    positions = (torch.arange(total)[None] - first[:, None]).clamp(min=0) * c.stride
    positions = torch.where(torch.arange(total)[None] < first[:, None], 0, positions + c.start).int()
    view = PackedView(key=key, value=value, rows=rows, length=c.length, positions=positions)
    if c.mask == "causal":
        view.positions = positions[:1]
    if c.per_head:
        view.positions = positions_per_head(c, first, generator)
    if c.sinks:
        # One row of the batch has a sink less, the slots are not in order.
        slots = torch.stack([torch.randperm(c.length, generator=generator)[: c.sinks] for _ in range(c.batch)]).int()
        slots[0, -1] = -1
        view.sink_slot = slots
        view.sink_key = torch.zeros(c.batch, c.sinks, c.heads, c.dim, dtype=exact)
        view.sink_value = torch.zeros_like(view.sink_key)
        for b in range(c.batch):
            for j, slot in enumerate(slots[b].tolist()):
                if slot >= 0:
                    view.sink_key[b, j], view.sink_value[b, j] = keys[b, slot], values[b, slot]
                    read["key"][b, slot], read["value"][b, slot] = keys[b, slot].float(), values[b, slot].float()
    if c.recent:
        view.recent_key, view.recent_value = keys[:, c.length :], values[:, c.length :]

    slot = torch.arange(total)
    allowed = (slot <= torch.arange(total - c.queries, total)[:, None]).expand(c.batch, 1, -1, -1).clone()
    mask = None
    if c.mask != "causal":
        allowed &= slot >= first[:, None, None, None]
        allowed[-1, :, -1:] = False
        mask = allowed
    if c.mask == "float":
        mask = torch.where(allowed, torch.randn(total, generator=generator), -torch.inf)
    query = torch.randn(c.batch, c.heads * c.group, c.queries, c.dim, generator=generator).to(c.dtype)
    logits = torch.randn(c.heads * c.group, generator=generator) if c.sink_logits else None
    return Layer(query, view, angles, mask, c.softcap, logits, read["key"], read["value"], allowed)


def weights_of(layer: Layer, keys: Tensor | None = None) -> Tensor:
    """Softmax weights in float64, `[B, Hq, Q, T + w]`; 0 in rows that see nothing."""
    positions = layer.view.positions
    keys = rotated(layer.keys if keys is None else keys, positions.expand(len(layer.query), *positions.shape[1:]),
                   layer.angles)  # fmt: skip
    keys = keys.transpose(1, 2).repeat_interleave(layer.query.shape[1] // keys.shape[2], 1)
    scores = layer.query.double() @ keys.mT * layer.scaling
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    if layer.mask is not None and layer.mask.dtype != torch.bool:
        scores = scores + layer.mask.double()
    scores = scores.masked_fill(~layer.allowed, -torch.inf)
    if layer.sink_logits is not None:
        extra = layer.sink_logits.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], -1)
    return scores.softmax(-1).nan_to_num(0.0)[..., : keys.shape[2]]


def reference(layer: Layer, keys: Tensor | None = None) -> Tensor:
    """Attention in float64, `[B, Q, Hq, D]`."""
    weights = weights_of(layer, keys)
    values = layer.values.double().transpose(1, 2).repeat_interleave(layer.query.shape[1] // layer.values.shape[2], 1)
    return (weights @ values).transpose(1, 2)
