"""How layers share the tokens that eviction keeps: so that together they lose least.

A layer's curve is its predicted loss at every share of the mean budget. The sum over layers is least where each layer's
next token saves as much as any other's: water-filling, exact for convex curves. Curves are made convex first (greatest
convex minorant).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvcalib.allocation.contexts import Contexts
from kvcalib.allocation.hitters import HEAVY
from kvcalib.allocation.stakes import Stakes

SHARES = tuple(j / 20 for j in range(10, 61))
"""0.5 to 3 times the mean budget, in steps of 0.05: what a layer may get."""


def loss_curve(contexts: Contexts, score: Tensor, stakes: Stakes, keep: float = HEAVY) -> Tensor:
    """Predicted loss, mean over contexts, with `keep * share` of the tokens kept, for every one of `SHARES`: float64.

    Args:
        score: `[S, H, M]`; the best stay.
    """
    kept = (contexts.best(score, min(1.0, keep * share)) for share in SHARES)
    return torch.stack([stakes.loss(contexts, k).mean() for k in kept])


def shares(curves: Sequence[Tensor], grid: Sequence[float] = SHARES) -> list[float]:
    """Each layer's budget over the mean budget: mean 1, each one of `grid`.

    Args:
        curves: one per layer, its loss at every point of `grid`, in one unit. All layers' tokens cost alike.
        grid: evenly spaced from the least share on; 1 is one of its points.
    """
    saved = np.stack([-np.diff(minorant(curve.double().numpy())) for curve in curves])
    step, layer = np.meshgrid(np.arange(saved.shape[1]), np.arange(len(curves)))
    # Of equal savings the earlier step of any layer, so that equal curves get equal shares.
    order = np.lexsort((layer.ravel(), step.ravel(), -saved.ravel()))
    steps = list(grid).index(1.0) * len(curves)
    taken = np.bincount(layer.ravel()[order[:steps]], minlength=len(curves))
    return [float(grid[n]) for n in taken]


def minorant(curve: np.ndarray) -> np.ndarray:
    """The greatest convex function that is nowhere above `curve [P]`, at the same points."""
    hull: list[int] = []
    for i in range(len(curve)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (curve[b] - curve[a]) * (i - a) < (curve[i] - curve[a]) * (b - a):
                break
            hull.pop()
        hull.append(i)
    return np.interp(np.arange(len(curve)), hull, curve[hull])
