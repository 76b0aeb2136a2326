"""Dense-and-sparse: which elements of a token are kept exact, and the range of the rest.

KVQuant (arXiv 2401.18079, section 3.4) keeps the elements beyond a threshold; how many there are is then up to the
data. Here every group (a token, or a token's head) keeps a fixed number, chosen by rank, so their storage is two dense
tensors. Shapes: a group's elements are the last dimension, `[..., E]`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def outlier_count(share: float, elements: int) -> int:
    """Outliers kept among `elements`: `ceil(share * elements)`.

    Raises:
        ValueError: `share` outside 0..0.5.
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"outliers is {share}, expected a share in 0..0.5 (0.01 keeps 1 % exact)")
    return math.ceil(round(share * elements, 9))


def largest(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores `[..., count]`, ascending by index so that storage is canonical."""
    return score.topk(count, dim=-1).indices.sort(dim=-1).values


def shortest_window(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The narrowest range that holds all but `count` elements of `x [..., E]`, and who lies outside it.

    KVQuant drops as many from the top as from the bottom; the narrowest of the `count + 1` windows is never wider.

    Returns:
        `(lower [...], upper [...], outside [..., count])`: the range and the indices of the elements outside.
    """
    size = x.shape[-1] - count
    values, order = x.sort(dim=-1, stable=True)
    start = (values[..., size - 1 :] - values[..., : count + 1]).argmin(dim=-1, keepdim=True)
    lower = values.gather(-1, start).squeeze(-1)
    upper = values.gather(-1, start + size - 1).squeeze(-1)
    rank = torch.arange(count, device=x.device).expand(*x.shape[:-1], count)
    outside = order.gather(-1, torch.where(rank < start, rank, rank + size))
    return lower, upper, outside.sort(dim=-1).values
