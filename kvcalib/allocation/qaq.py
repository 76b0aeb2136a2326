"""QAQ (arXiv 2403.04643): how coarse a key or value may be, given the error allowed in what attention makes of it.

One head, one query: scores A_t = scaling q.K_t, weights S = softmax(A), output X = sum_t S_t V_t. Errors of elements
are independent, of standard deviation sigma in all components of one token; the T tokens share the allowed error
equally. That gives a sigma per token, a sigma gives a step, a step and the token's range a width. RoPE only turns q
and K, so all holds for un-rotated ones.

Three ways to bound: "output" limits the error of X through keys and through values; "score" is the paper's, which
limits S for keys, all alike; "published" is the arithmetic of the paper's code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvcalib.allocation.sensitivity import HeadStatistics, finite
from kvcalib.errors import InputError
from kvcalib.quant.packing import MAX_BITS

Bound = Literal["output", "score", "published"]
Per = Literal["head", "layer"]
UNIFORM = math.sqrt(12)
"""Step over standard deviation of an error that is uniform over one step."""
DIAL = 300
"""The target error is sought between 2^-300 and 2^300."""


@dataclass(frozen=True)
class Published:
    """What the paper's code takes as constants.

    Attributes:
        q_norm: stands for |q|^2 in every head.
        lowest, highest: least and greatest width; its experiments take 0 to 2 and 2 to 4.
    """

    q_norm: float = 300.0
    lowest: int = 0
    highest: int = 4


@dataclass(frozen=True, eq=False)
class Allocation:
    """Widths that meet a budget.

    Attributes:
        key, value: for each layer `[H]` uint8.
        target: the allowed standard deviation of an element of X, through keys and again through values; under
            "published" for keys that of a weight S_t.
    """

    key: list[Tensor]
    value: list[Tensor]
    target: float


def value_sigma(target: float, attention: Tensor, tokens: int) -> Tensor:
    """Standard deviation that the elements of a token's value may have: `attention [...] -> [...]`.

    `sigma_V(t) = sigma_X / (sqrt(T) S_t)`, section 3.2, from `var X_j = sum_t S_t^2 sigma_V(t)^2`, which is exact.
    `target` is sigma_X, of each element of X. Infinite where S_t is 0: nobody reads the value.
    """
    return _target(target) / (math.sqrt(_count(tokens)) * finite("attention", attention))


def key_sigma(target: float | Tensor, squared_query_norm: Tensor, tokens: int, scaling: float) -> Tensor:
    """Standard deviation that the elements of every key may have: `squared_query_norm [...] -> [...]`.

    `sigma_K^2 = ln(T^3 / (T - 1) sigma_S^2 + 1) / (|q| scaling)^2`, section 3.2, with the scaling of the scores that
    the paper drops. `target` is sigma_S, of each weight. The paper takes all e^(A_t) for lognormal and of one
    distribution, so this holds for weights near 1/T and errors well below; a weight S_t errs T S_t (1 - S_t) times as
    much or more.
    Infinite for T = 1, where the only weight is 1, and for |q| = 0.
    """
    count = _count(tokens)
    growth = _target(target).square() * (count**3 / (count - 1) if count > 1 else math.inf)
    return (growth.log1p() / (finite("squared_query_norm", squared_query_norm) * scaling**2)).sqrt()


def score_target(target: float, value_distance: Tensor, tokens: int) -> Tensor:
    """The sigma_S of all weights that gives X the error `target`: `value_distance [n, H] -> [H]`.

    Errors of weights sum to 0, so `X' - X = sum_t (S'_t - S_t) (V_t - X)` and
    `sigma_S = sigma_X / sqrt(sum_t (V_tj - X_j)^2)`, the sum T times the sample's mean. The paper leaves the two
    targets apart and its code sets them equal, whatever the values' units.
    """
    spread = finite("value_distance", value_distance).square().mean(0).sqrt()
    return _target(target) / (math.sqrt(_count(tokens)) * spread)


def key_sigma_by_value(
    target: float,
    attention: Tensor,
    squared_query_norm: Tensor,
    value_distance: Tensor,
    tokens: int,
    scaling: float,
) -> Tensor:
    """Standard deviation that the elements of a token's key may have, from what they do to the output.

    `dX_j / dK_t = S_t (V_tj - X_j) scaling q` (insight 1 of the paper), so to first order
    `var X_j = sum_t (S_t (V_tj - X_j) s_t)^2` with `s_t = scaling |q| sigma_K(t)`, the error of a score; equal shares
    give `s_t = sigma_X / (sqrt(T) S_t |V_tj - X_j|)`. Where attention is scarce that s_t is many nats, and
    exponentials of such errors take all attention to themselves. For a normal error d of score,
    `E (e^d - 1)^2 = e^(2 s^2) - 2 e^(s^2 / 2) + 1`, which lies between x and 2 x at `s^2 = ln(1 + 2 x) / 2`. So with x
    the square of the first-order s_t,

        sigma_K(t)^2 = ln(1 + 2 x) / 2 / (|q| scaling)^2,    x = sigma_X^2 / (T S_t^2 (V_tj - X_j)^2).

    What this leaves out is that all exponentials also rise in their mean; measured errors reach twice the target.

    For one component j `value_distance` is |V_tj - X_j| and `target` the sigma of X_j. For the whole head it is the
    root mean square over components, `|V_t - X| / sqrt(D)`, and `target` that of sigma, as in `value_sigma`. Arguments
    broadcast. Infinite where the token has no attention, its value is X, or q is 0.
    """
    pull = finite("attention", attention) * finite("value_distance", value_distance)
    first = (_target(target) / (math.sqrt(_count(tokens)) * pull)).square()
    return ((2 * first).log1p() / 2 / (finite("squared_query_norm", squared_query_norm) * scaling**2)).sqrt()


def bits(span: Tensor, sigma: Tensor) -> Tensor:
    """Width of a uniform quantizer: `span [...]`, `sigma [...] -> [...]` int64 in 0..8.

    2^B segments of the range R, each read as its midpoint, err by at most half a step: sigma = R / 2^B / sqrt(12).
    `B = ceil(log2(R / (sqrt(12) sigma)))`; 0 bits is the middle of the range.
    """
    span = finite("range", span)
    if not bool((sigma > 0).all()):
        raise InputError("sigma is 0, negative or NaN somewhere, expected more than 0")
    # ceil(log2) from the float's own exponent, which no rounding of a logarithm can push over a whole number.
    mantissa, exponent = torch.frexp(span / (UNIFORM * sigma))
    return (exponent.long() - (mantissa == 0.5).long()).clamp(0, MAX_BITS)


def published_key_error(target: float, tokens: int, q_norm: float = Published.q_norm) -> float:
    """E_K of the paper's code: `sqrt(12 / q_norm ln(T^3 / (T - 1) eps^2 + 1))`, one figure for all keys.

    The code divides by zero for T = 1; here E_K is infinite.
    """
    return UNIFORM * key_sigma(target, torch.tensor(q_norm), tokens, 1.0).item()


def published_value_error(target: float, attention: Tensor, tokens: int) -> Tensor:
    """E_V of the paper's code: `sqrt(12 / T) eps / S_t`."""
    return UNIFORM * value_sigma(target, attention, tokens)


def published_bits(span: Tensor, error: Tensor | float, lowest: int, highest: int) -> Tensor:
    """Widths of the paper's code: `clamp(ceil(log2(R / (2 E) + 1)), lowest, highest)`, int64.

    E is a whole step, taken for half a one: up to one bit less than `bits`, but never 0 for a range above 0.
    """
    ratio = finite("range", span) / (2 * error)
    # For a ratio that 1 + ratio would swallow the exact logarithm is above 0 still.
    wanted = torch.where(ratio > 0, (ratio + 1).log2().ceil().clamp(min=1), 0.0)
    return wanted.clamp(lowest, highest).long()


def token_widths(
    heads: HeadStatistics, target: float, bound: Bound = "output", published: Published | None = None
) -> tuple[Tensor, Tensor]:
    """Widths of each token's key and value at one target error: two of `[n, H]` int64, falling as `target` rises."""
    if bound == "published":
        fixed = published or Published()
        key_error = published_key_error(target, heads.tokens, fixed.q_norm)
        value_error = published_value_error(target, heads.attention, heads.tokens)
        return (
            published_bits(heads.key_range, key_error, fixed.lowest, fixed.highest),
            published_bits(heads.value_range, value_error, fixed.lowest, fixed.highest),
        )
    if bound == "score":
        weight_error = score_target(target, heads.value_distance, heads.tokens)
        sigma = key_sigma(weight_error, heads.squared_query_norm, heads.tokens, heads.scaling)
    else:
        sigma = key_sigma_by_value(
            target, heads.attention, heads.squared_query_norm, heads.value_distance, heads.tokens, heads.scaling
        )
    return bits(heads.key_range, sigma), bits(heads.value_range, value_sigma(target, heads.attention, heads.tokens))


def allocate(
    layers: list[HeadStatistics],
    bits: int,
    bound: Bound = "output",
    published: Published | None = None,
    per: Per = "head",
) -> Allocation:
    """One width for the keys and one for the values of every head: the mean of its tokens' widths, rounded.

    The target error, one for all heads, is found by bisection so that the means fit the budget; means are rounded down
    and what is left goes to the largest fractions. Where many tokens change their width at one target, the plan lies
    between those just below and just above it.

    Args:
        bits: sum of the widths of all channels that the plan may have, code bits per token.
        per: what takes one width: a head, or all heads of a layer, whose tokens' widths are then averaged together.

    Raises:
        InputError: `bits` is less than the smallest plan takes, or more than the largest.
    """
    if not layers:
        raise InputError("there are no layers to give bits to")
    units = [heads.key_range.shape[1] if per == "head" else 1 for heads in layers]
    dims = torch.tensor([h.key_range.shape[1] // n * h.head_dim for h, n in zip(layers, units, strict=True)])
    dims = dims.repeat_interleave(2 * torch.tensor(units))

    def means(target: float) -> Tensor:
        found = []
        for heads, count in zip(layers, units, strict=True):
            for role in token_widths(heads, target, bound, published):
                found.append(role.double().mean(0).view(count, -1).mean(1))
        return torch.cat(found)

    # Keys of a wide range keep bits at any target; without a limit only the paper's code gives any.
    limit = (published or Published()).highest if bound == "published" else MAX_BITS
    loosest = 2.0**DIAL if bound == "published" else math.inf
    fine, coarse = means(2.0**-DIAL), means(loosest)
    smallest, largest = float(dims.double() @ coarse), limit * int(dims.sum())
    if not smallest <= bits <= largest:
        raise InputError(f"the budget is {bits} code bits per token, qaq's plans take {smallest:g} to {largest}")
    low, high = -float(DIAL), float(DIAL)
    if dims.double() @ fine <= bits:
        high, coarse = low, fine
    while high - low > 1e-9 and dims.double() @ (fine - coarse) >= 1:
        middle = (low + high) / 2
        found = means(2.0**middle)
        if dims.double() @ found <= bits:
            high, coarse = middle, found
        else:
            low, fine = middle, found
    gap = float(dims.double() @ (fine - coarse))
    share = (bits - float(dims.double() @ coarse)) / gap if gap > 0 else 0.0
    widths = _rounded(coarse + share * (fine - coarse), dims, bits)
    parts = widths.to(torch.uint8).split([n for count in units for n in (count, count)])
    whole = [part.expand(layers[i // 2].key_range.shape[1]).clone() for i, part in enumerate(parts)]
    return Allocation(whole[::2], whole[1::2], 2.0**high if high < DIAL else loosest)


def _rounded(wanted: Tensor, dims: Tensor, bits: int) -> Tensor:
    """Whole widths `[n]` within `bits`: rounded down, then up where the fraction is largest and room is left."""
    # A mean of whole widths that arithmetic left a hair below a whole number is that number.
    widths = (wanted + 1e-9).floor().long()
    fraction = wanted - widths
    room = bits - int(dims @ widths)
    for i in fraction.argsort(descending=True, stable=True).tolist():
        if fraction[i] > 1e-9 and dims[i] <= room:
            widths[i] += 1
            room -= int(dims[i])
    return widths


def _target(target: float | Tensor) -> Tensor:
    wanted = torch.as_tensor(target, dtype=torch.float64)
    if not bool((wanted > 0).all()):
        raise InputError(f"the target error is {target}, expected more than 0 (inf: no limit)")
    return wanted


def _count(tokens: int) -> int:
    if tokens < 1:
        raise InputError(f"tokens is {tokens}, expected at least 1")
    return tokens
