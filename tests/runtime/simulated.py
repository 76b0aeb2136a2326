"""A plain float simulation of the quantizer and of attention, written from the artifact's specification.

It shares nothing with the packed path: no packing, no storage, no chunks, no taps on the cache. Loops over heads and
channels, nearest centroid by absolute difference.
"""

from __future__ import annotations

import torch


def simulate(x, quantizer, exact=torch.float16):
    """`x [n, H, D]` quantized and dequantized."""
    n, heads, head_dim = x.shape
    groups = heads if quantizer.scope == "head" else 1
    out = torch.empty(n, heads, head_dim)
    zero = torch.zeros(n, heads, head_dim)
    scale = torch.ones(n, heads, head_dim)
    keep = torch.zeros(n, heads, head_dim, dtype=torch.bool)
    count = quantizer.outliers
    if quantizer.relative:
        for t in range(n):
            for g in range(groups):
                part = x[t, g] if groups > 1 else x[t].reshape(-1)
                order = part.sort(stable=True)
                size = len(part) - count
                spans = [float(order.values[i + size - 1] - order.values[i]) for i in range(count + 1)]
                first = spans.index(min(spans))
                low, high = order.values[first], order.values[first + size - 1]
                mask = torch.ones(len(part), dtype=torch.bool)
                mask[order.indices[first : first + size]] = False
                z, s = ((low + high) / 2).to(exact).float(), ((high - low) / 2).to(exact).float()
                if groups > 1:
                    zero[t, g], scale[t, g], keep[t, g] = z, s, mask
                else:
                    zero[t], scale[t], keep[t] = z, s, mask.view(heads, head_dim)
    safe = torch.where(scale > 0, scale, 1.0)
    normal = (x - zero) / safe
    for h in range(heads):
        for d in range(head_dim):
            levels = quantizer.codebook.centroids[h, d, : 1 << int(quantizer.layout.widths[h, d])]
            nearest = (normal[:, h, d, None] - levels).abs().argmin(-1)
            out[:, h, d] = zero[:, h, d] + scale[:, h, d] * levels[nearest]
    if not quantizer.relative and count:
        saved = ((out - x) ** 2 * quantizer.weight).reshape(n, groups, -1)
        index = saved.argsort(-1, descending=True)[..., :count]
        keep = torch.zeros(saved.shape, dtype=torch.bool).scatter_(-1, index, True).view(n, heads, head_dim)
    return torch.where(keep, x.to(exact).float(), out)
