"""What a head's attention says of its tokens: how far they reach, how much is drawn from them, what they change.

A uniform sample of tokens stands for all. Shapes: n sampled tokens, H kv heads, D = head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcalib.errors import InputError
from kvcalib.quant.outliers import shortest_window

AGAIN = "run `kvcalib fisher` again"


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """The kv heads of one layer.

    Attributes:
        key_range: `[n, H]`, highest minus lowest element of a token's key. value_range: `[n, H]`, of its value.
        attention: `[n, H]` in 0..1, the largest weight that a query of the window pays to the token.
        value_distance: `[n, H]`, root mean square over the components j of `V_tj - X_j`, X the head's output.
        squared_query_norm: `[H]`, |q|^2: its mean, or the 90 % quantile if a bound should hold for 90 % of queries. In
            a GQA group the largest of its query heads.
        tokens: T, the tokens that attention is spread over.
        head_dim: D.
        scaling: what a score q.k is multiplied by, mostly `D ** -0.5`.

    Raises:
        InputError: a field holds NaN, infinities or negative numbers, or its shape is another than the rest's.
    """

    key_range: Tensor
    value_range: Tensor
    attention: Tensor
    value_distance: Tensor
    squared_query_norm: Tensor
    tokens: int
    head_dim: int
    scaling: float

    def __post_init__(self) -> None:
        shape = self.key_range.shape
        if len(shape) != 2 or not shape[0]:
            raise InputError(f"key_range has shape {list(shape)}, expected [tokens, kv heads], at least one token")
        expected = {"value_range": shape, "attention": shape, "value_distance": shape, "squared_query_norm": shape[1:]}
        for name, size in expected.items():
            if (found := getattr(self, name).shape) != size:
                raise InputError(f"{name} has shape {list(found)}, key_range {list(shape)}; expected {list(size)}")
        for name in ("key_range", *expected):
            finite(name, getattr(self, name))
        if bool((self.attention > 1.001).any()):
            raise InputError(f"attention is {float(self.attention.max()):g}, expected weights in 0..1; {AGAIN}")


def finite(name: str, x: Tensor) -> Tensor:
    """`x` in float64.

    Raises:
        InputError: it holds NaN, infinities or negative numbers.
    """
    wrong = ~(torch.isfinite(x) & (x >= 0))
    if bool(wrong.any()):
        raise InputError(f"{name} holds {x[wrong][0]:g}, expected finite numbers of at least 0; {AGAIN}")
    return x.double()


def head_statistics(
    key: Tensor,
    value: Tensor,
    attention_sum: Tensor,
    attention_peak: Tensor,
    squared_query_norm: Tensor,
    tokens: int,
    scaling: float,
    outliers: int = 0,
    key_mean: Tensor | None = None,
) -> HeadStatistics:
    """Statistics of one layer from its token sample.

    Args:
        key: `[n, H, D]`. value: `[n, H, D]`.
        attention_sum: `[n, H]`, attention drawn from all queries. attention_peak: `[n, H]`, its windowed maximum.
        outliers: elements of a token's head that are kept exact and do not count to its range.
        key_mean: `[H, D]`, taken off the keys before their range is: a codebook per channel carries each channel's
            offset for free.
    """
    centred = key.double() if key_mean is None else key.double() - key_mean
    return HeadStatistics(
        key_range=element_range(centred, outliers),
        value_range=element_range(value, outliers),
        attention=attention_peak.double(),
        value_distance=value_distance(value, attention_sum),
        squared_query_norm=squared_query_norm.double(),
        tokens=tokens,
        head_dim=key.shape[2],
        scaling=scaling,
    )


def relative(heads: HeadStatistics) -> HeadStatistics:
    """The same heads with values in units of their layer's spread, the root mean square of `V_t - X`.

    An error of X then counts relative to what the layer's outputs differ by at all: values twice as large, halved again
    by the output projection, are the same model and get the same bits. Unchanged where all values are one.
    """
    spread = float(heads.value_distance.double().square().mean().sqrt()) or 1.0
    return replace(heads, value_range=heads.value_range / spread, value_distance=heads.value_distance / spread)


def element_range(x: Tensor, outliers: int = 0) -> Tensor:
    """Highest minus lowest element of each token and head, but for `outliers` of them: `[n, H, D] -> [n, H]`."""
    lower, upper, _ = shortest_window(x.double(), outliers)
    return upper - lower


def value_distance(value: Tensor, attention_sum: Tensor) -> Tensor:
    """Root mean square over components of `V_t - X`: `value [n, H, D]`, `attention_sum [n, H] -> [n, H]`.

    X is the mean output of the head over all queries: as `sum_i X_i = sum_t (sum_i S_it) V_t`, the mean of the values
    weighted by the attention they drew. What single outputs differ from it is left out. With no attention at all X is
    the plain mean.
    """
    drawn = attention_sum.double()[..., None]
    total = drawn.sum(0, keepdim=True)
    weight = torch.where(total > 0, drawn / torch.where(total > 0, total, 1.0), 1 / len(drawn))
    wide = value.double()
    return (wide - (weight * wide).sum(0, keepdim=True)).square().mean(-1).sqrt()
