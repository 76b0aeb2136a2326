"""A plain float simulation of the quantizer, of the cache and of attention, written from the artifact's specification.

It shares nothing with the packed path: no packing, no storage, no chunks. Codes are the nearest centroid by absolute
difference. The cache is transformers' own, layer for layer: its cat, crop, reorder, select and sliding window; only
what goes into it is quantized.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import torch
from transformers import DynamicCache

from kvcalib.model.taps import Taps
from kvcalib.runtime.loader import prove


def simulate(x, quantizer, exact=torch.float16):
    """`x [n, H, D]` quantized and dequantized."""
    if quantizer.basis is not None:
        # Turned in float64, and kept in the type of `x`.
        axes = quantizer.basis.matrix.double()
        turned = torch.einsum("nhd,hde->nhe", x.double(), axes).to(x.dtype)
        made = simulate(turned, replace(quantizer, basis=None), exact)
        return torch.einsum("nhe,hde->nhd", made.double(), axes).float()
    x = x.float()
    n, heads, _ = x.shape
    groups = heads if quantizer.scope == "head" else 1
    grouped = x.reshape(n, groups, -1)
    zero, scale = torch.zeros(n, groups, 1), torch.ones(n, groups, 1)
    keep = torch.zeros(grouped.shape, dtype=torch.bool)
    count = quantizer.outliers
    if quantizer.relative:
        ordered, order = grouped.sort(dim=-1, stable=True)
        size = grouped.shape[-1] - count
        spans = torch.stack([ordered[..., i + size - 1] - ordered[..., i] for i in range(count + 1)], -1)
        first = spans.argmin(-1, keepdim=True)
        low, high = ordered.gather(-1, first), ordered.gather(-1, first + size - 1)
        place = torch.arange(grouped.shape[-1])
        keep.scatter_(-1, order, (place < first) | (place >= first + size))
        zero, scale = ((low + high) / 2).to(exact).float(), ((high - low) / 2).to(exact).float()
    levels = quantizer.codebook.centroids
    unused = torch.arange(levels.shape[-1]) >= (1 << quantizer.layout.widths.long())[..., None]

    normal = ((grouped - zero) / torch.where(scale > 0, scale, 1.0)).view(x.shape)
    distance = (normal[..., None] - levels).abs().masked_fill(unused, torch.inf)
    nearest = levels.expand(n, -1, -1, -1).gather(-1, distance.argmin(-1, keepdim=True))[..., 0]
    out = zero + scale * nearest.reshape(grouped.shape)
    if not quantizer.relative and count:
        saved = ((out.view(x.shape) - x) ** 2 * quantizer.weight).reshape(grouped.shape)
        keep.scatter_(-1, saved.argsort(-1, descending=True)[..., :count], True)
    if quantizer.feedback is not None:
        grid = [t.expand(n, groups, 1).expand(n, heads, 1)[..., 0].numpy() for t in (zero, scale)]
        out = out.view(x.shape).contiguous()
        _feed_back(quantizer, x.numpy(), keep.view(x.shape).numpy(), *grid, unused.numpy(), out.numpy())
        out = out.view(grouped.shape)
    return torch.where(keep, grouped.to(exact).float(), out).view(x.shape)


def _feed_back(quantizer, x, kept, zero, scale, unused, out):
    """Round channel after channel, each from where the errors before it have moved it; into `out [n, H, D]`."""
    order, matrix = quantizer.feedback.order.numpy(), quantizer.feedback.matrix.numpy()
    levels, divisor = quantizer.codebook.centroids.numpy(), np.where(scale > 0, scale, np.float32(1))
    for h in range(x.shape[1]):
        target = x[:, h, order[h]]
        for k, d in enumerate(order[h]):
            distance = np.abs((target[:, k] - zero[:, h])[:, None] / divisor[:, h, None] - levels[h, d])
            distance[:, unused[h, d]] = np.inf
            made = zero[:, h] + scale[:, h] * levels[h, d][distance.argmin(-1)]
            out[:, h, d] = np.where(kept[:, h, d], x[:, h, d], made)
            target[:, k + 1 :] -= (out[:, h, d] - x[:, h, d])[:, None] * matrix[h, k, k + 1 :]


class SimulatedCache(DynamicCache):
    """Stock layers; those of `quantizers` hold each token three times over: quantized, exact, and what is known of it.

    `EXTRA` more marks of a token, from `extra`, are for those who simulate more.

    The first `sinks` real tokens of a row are read exactly, and any token until `recent` others have come after it.
    """

    EXTRA = 0

    def __init__(self, config, quantizers, sinks=0, recent=0):
        super().__init__(config=config)
        self.quantizers, self.sinks, self.recent = quantizers, sinks, recent
        self.known, self.shown = {}, {}

    def note(self, layer, positions, mask):
        """Positions `[B, t]` of the tokens that come next, and the mask of their attention."""
        count = positions.shape[1]
        real = torch.ones(positions.shape)
        if mask is not None:
            last = mask[:, 0, -1, -count:]
            real = (last if last.dtype == torch.bool else last == 0).float()
        self.known[layer] = positions, real

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx not in self.quantizers:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        batch, heads, count, _ = key_states.shape
        exact = torch.bfloat16 if key_states.dtype == torch.bfloat16 else torch.float16

        def quantized(x, quantizer):
            rows = x.transpose(1, 2).reshape(batch * count, heads, -1)
            return simulate(rows, quantizer, exact).view(batch, count, heads, -1).transpose(1, 2)

        pair = self.quantizers[layer_idx]
        marks = torch.stack([t.float().expand(batch, -1) for t in self.known.pop(layer_idx)], -1)
        marks = torch.cat([marks, torch.zeros(batch, count, 1)], -1)[:, None].expand(-1, heads, -1, -1)
        extra = [self.extra(layer_idx, key_states, value_states)] if self.EXTRA else []
        keys, values = super().update(
            torch.cat([quantized(key_states, pair["key"]), key_states], -1),
            torch.cat([quantized(value_states, pair["value"]), value_states, *extra, marks], -1),
            layer_idx,
        )
        self.shown[layer_idx] = keys, values
        self.leave(layer_idx)
        return key_states, value_states

    def leave(self, layer):
        """Mark what is not among the recent tokens any more."""
        # In place, in the layer itself: a token that once left the recent window stays quantized.
        values = self.shown[layer][1]
        values[:, :, : max(0, values.shape[2] - self.recent), -1] = 1

    def read(self, layer):
        """Keys and values `[B, H, T, D]` as attention sees them, and their positions `[B, T]`."""
        keys, values = self.shown[layer]
        marks, dim = values[:, :, :, -3:], keys.shape[-1] // 2
        positions, real, left = marks.unbind(-1)
        sinks = 0 if self.is_sliding[layer] else self.sinks
        stored = (left.bool() & ~((real > 0) & (real.cumsum(2) <= sinks)))[..., None]
        values = values[..., : -3 - self.EXTRA]
        size = values.shape[-1] // 2
        key = torch.where(stored, keys[..., :dim], keys[..., dim:])
        return key, torch.where(stored, values[..., :size], values[..., size:]), positions[:, 0].long()


class Reading:
    """Handler that reads a `SimulatedCache`, in one go, with the model's own attention in float32."""

    def __init__(self, exact_prefill=False):
        self.exact_prefill = exact_prefill

    def before(self, tap):
        tap.cache.note(tap.layer, tap.rotary.position_ids, tap.mask)

    def attend(self, call):
        key, value, positions = call.tap.cache.read(call.tap.layer)
        new = call.query.shape[2]
        if self.exact_prefill and new > 1:
            key = torch.cat([key[:, :, :-new], call.key], 2)
            value = torch.cat([value[:, :, :-new], call.value], 2)
        key = call.rotate_at(key.to(call.query.dtype), positions).float()
        out, weights = call.plain(call.rotate_new(call.query).float(), key, value.float())
        return out.to(call.query.dtype), weights


@contextlib.contextmanager
def simulated(model, artifact, rotations=None, sinks=0, recent=0, exact_prefill=False):
    """`model` generates on simulated caches; gives the function that makes one."""
    rotations = rotations or prove(model, list(artifact.quantizers))

    def make():
        return SimulatedCache(model.config, artifact.quantizers, sinks, recent)

    def prepare(config, model_kwargs, *args, **kwargs):
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = make()
            if config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()

    with Taps(model, Reading(exact_prefill), rotations):
        model._prepare_cache_for_generation = prepare
        try:
            yield make
        finally:
            del model._prepare_cache_for_generation
