"""The weight of attention in a layer's eviction score, out of what survives eviction in the calibration text.

    score = alpha * a / max a + (1 - alpha) * f

a: mean attention per query that the token drew until now, from quantized keys; max over the context's tokens, per head.
f: friendliness. What a token is worth is `gain = (attention that it draws later) * (1 - error^2)`: a token that is kept
with relative error e keeps the share 1 - e^2 of its energy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcalib.allocation.contexts import Contexts
from kvcalib.allocation.hitters import HEAVY

ALPHAS = (*(1 - 2.0**-j for j in range(9)), 1.0)
"""0, 1/2, 3/4, ... 255/256, 1: attention has a heavy tail, friendliness has not, so what matters lies near 1."""


def score(contexts: Contexts, attention: Tensor, friendliness: Tensor, alpha: float) -> Tensor:
    """The score of every token, `[S, H, M]`, from its mean `attention` and `friendliness` of that shape."""
    most = attention.masked_fill(~contexts.held[:, None], 0).amax(-1, keepdim=True)
    return alpha * attention / torch.where(most > 0, most, 1.0) + (1 - alpha) * friendliness


def gain(later: Tensor, key_error: Tensor, value_error: Tensor) -> Tensor:
    """What keeping a token is worth: `later (1 - (e_k^2 + e_v^2) / 2)`, at least 0, any one shape."""
    return later * (1 - (key_error.square() + value_error.square()) / 2).clamp(min=0)


def attention_weight(
    contexts: Contexts, attention: Tensor, friendliness: Tensor, worth: Tensor, share: float = HEAVY
) -> float:
    """The largest alpha of `ALPHAS` whose kept worth is the best one's to within a standard error.

    Kept worth: the sum of `worth` over the `share` of tokens that score best, per context. Its difference from the best
    alpha's is taken context by context; alpha is as good if their mean is at most one standard error of that mean. With
    one context that is: if there is no difference.

    Args:
        attention, friendliness, worth: `[S, H, M]`.
    """
    kept = torch.stack(
        [
            (worth * contexts.best(score(contexts, attention, friendliness, a), share)).double().sum((1, 2))
            for a in ALPHAS
        ]
    )
    short = kept[int(kept.sum(1).argmax())] - kept
    error = short.std(1) / short.shape[1] ** 0.5 if short.shape[1] > 1 else torch.zeros(len(ALPHAS))
    good = (short.mean(1) <= error).nonzero()[:, 0]
    return ALPHAS[int(good.max())]
