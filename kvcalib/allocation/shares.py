"""How layers share the tokens that eviction keeps: to each what keeps most attention, all layers taken together.

A layer's curve says how much later attention it keeps with a fraction x of its tokens. Their sum at one mean fraction
is largest where every layer's next token is worth the same: water-filling, exact for concave curves. Curves are made
concave first (least concave majorant).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvcalib.allocation.contexts import Contexts
from kvcalib.allocation.hitters import HEAVY

POINTS = 200
"""Steps of a curve from no token to all."""
LEAST, MOST = 0.5, 2.0
"""Shares of the mean budget that a layer gets at least and at most."""


def kept_curve(contexts: Contexts, score: Tensor, worth: Tensor) -> Tensor:
    """Worth kept against the fraction of free tokens kept: `[POINTS + 1]` float64, mean over contexts and heads.

    Args:
        score, worth: `[S, H, M]`; tokens go by falling score.
    """
    free = contexts.free[:, None].expand_as(score)
    order = score.masked_fill(~free, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    total = (worth * free).double().gather(-1, order).cumsum(-1)
    total = torch.cat([torch.zeros_like(total[..., :1]), total], -1)
    at = torch.arange(POINTS + 1, dtype=torch.float64) / POINTS * contexts.free.sum(1)[:, None, None]
    low = at.floor().long().expand(*total.shape[:2], -1)
    high = (low + 1).clamp(max=total.shape[-1] - 1)
    start = total.gather(-1, low)
    return (start + (at - low) * (total.gather(-1, high) - start)).mean((0, 1))


def shares(curves: Sequence[Tensor], keep: float = HEAVY, least: float = LEAST, most: float = MOST) -> list[float]:
    """Each layer's budget over the mean budget, mean 1, within `least` and `most`.

    Args:
        curves: one per layer, `[P + 1]`, worth kept with 0, 1/P, ... all of its tokens, in one unit. All layers count
            alike, whatever their heads.
        keep: mean fraction of tokens kept.
    """
    steps = len(curves[0]) - 1
    mean = keep * steps
    low, high = round(least * mean), min(steps, round(most * mean))
    gains = np.stack([np.diff(majorant(curve.double().numpy()))[low:high] for curve in curves])
    step, layer = np.meshgrid(np.arange(gains.shape[1]), np.arange(len(curves)))
    # Of equal gains the earlier step of any layer, so that equal curves get equal shares.
    order = np.lexsort((layer.ravel(), step.ravel(), -gains.ravel()))
    taken = np.bincount(layer.ravel()[order[: round(mean * len(curves)) - low * len(curves)]], minlength=len(curves))
    budget = low + taken
    return [float(b) for b in budget / budget.mean()]


def majorant(curve: np.ndarray) -> np.ndarray:
    """The least concave function that is nowhere below `curve [P + 1]`, at the same points."""
    hull: list[int] = []
    for i in range(len(curve)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (curve[b] - curve[a]) * (i - a) > (curve[i] - curve[a]) * (b - a):
                break
            hull.pop()
        hull.append(i)
    return np.interp(np.arange(len(curve)), hull, curve[hull])
