"""The weight of attention in a layer's eviction score: under which eviction costs least on the calibration text.

    score = alpha * a / max a + (1 - alpha) * f

a: mean attention per query that the token drew until now, from quantized keys; max over the context's tokens, per head.
f: friendliness. Cost: `Stakes.loss` in nats, where friendly tokens earn their place by their smaller errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcalib.allocation.contexts import Contexts
from kvcalib.allocation.hitters import HEAVY
from kvcalib.allocation.stakes import Stakes

ALPHAS = (*(1 - 2.0**-j for j in range(9)), 1.0)
"""0, 1/2, 3/4, ... 255/256, 1: attention has a heavy tail, friendliness has not, so what matters lies near 1."""


def score(contexts: Contexts, attention: Tensor, friendliness: Tensor, alpha: float) -> Tensor:
    """The score of every token, `[S, H, M]`, from its mean `attention` and `friendliness` of that shape."""
    most = attention.masked_fill(~contexts.held[:, None], 0).amax(-1, keepdim=True)
    return alpha * attention / torch.where(most > 0, most, 1.0) + (1 - alpha) * friendliness


def attention_weight(
    contexts: Contexts, attention: Tensor, friendliness: Tensor, stakes: Stakes, keep: float = HEAVY
) -> float:
    """The largest alpha of `ALPHAS` that loses no more than the best one, to within a standard error.

    The loss of keeping the `keep` of tokens that score best is compared with the best alpha's context by context; alpha
    is as good if the mean of the differences is at most one standard error of that mean (with one context: if there is
    no difference).

    Args:
        attention, friendliness: `[S, H, M]`.
    """
    losses = torch.stack(
        [
            stakes.loss(contexts, contexts.best(score(contexts, attention, friendliness, alpha), keep))
            for alpha in ALPHAS
        ]
    )
    more = losses - losses[int(losses.sum(1).argmin())]
    error = more.std(1) / more.shape[1] ** 0.5 if more.shape[1] > 1 else torch.zeros(len(ALPHAS))
    good = (more.mean(1) <= error).nonzero()[:, 0]
    return ALPHAS[int(good.max())]
