"""Sums of float64 numbers that are the same in any order and grouping, on any number of processes.

The idea is that of reproducible summation (Demmel and Nguyen, "Parallel Reproducible Summation", IEEE Trans. Computers
64(7), 2015): all numbers are cut on one grid that does not depend on them, and the pieces are added exactly.

The grid. Bin j holds the binary digits of weight 2^(40 j) to 2^(40 j + 39). A number x is cut towards zero: its piece
in bin j is an integer, `piece_j = sign(x) (floor(|x| / 2^(40 j)) mod 2^40)`, smaller than 2^40. Its own top is the bin
of its leading digit. Of an element that is summed are kept: `top`, the highest of its contributions' tops, and three
limbs, the int64 sums of all contributions' pieces in the bins top, top - 1 and top - 2. What lies below is dropped.

Why the order does not matter. Claim: after contributions x_1 .. x_n the state is `top = max top(x_i)` and
`limb_j = sum of piece_j(x_i)` for the three bins j below it, whatever the order. It holds of no contribution. Adding x:
the top becomes the larger of both. A bin of the new window that was in the old one has its exact sum, and x's piece is
added. A bin above the old window had no digit of any contribution before, so its sum is 0, which is what the limb
starts from. A bin below the new window leaves; since tops only rise, it is in no later window, so nothing that was
dropped, of a limb or of a contribution, is ever missed. Adding two states is the same step with limbs in the place of
pieces. Integer sums do not depend on order or grouping, nor does a maximum: so the state depends on the multiset of
contributions alone. The limbs are not carried into each other; a carry would depend on when it is done.

Precision. Each contribution loses less than one unit of its lowest kept bin, 2^-80 of a unit of the top bin, which the
largest contribution reaches: n of them lose less than n 2^-80 max |x|, where float64 loses up to n 2^-53 sum |x|.
`value` then rounds once (to within 2^-52 of half a unit in the last place).

Range. A piece is smaller than 2^40 and a limb holds less than 2^63: 2^23 contributions fit, and `MOST` is checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS, LIMBS = 40, 3
LOWEST = -27
"""The bin of the smallest denormal number, 2^-1074: the top of what has no digits yet."""
MOST = 2 ** (63 - BITS)
"""Contributions that can be added without an overflow."""
UNIT = 2.0**BITS


@dataclass
class ExactSum:
    """Exact sums of float64 tensors of one shape, element by element.

    Attributes:
        limbs: `[3, *shape]` int64, sums of pieces in the bins top, top - 1 and top - 2.
        top: `[*shape]` int16.
        count: how many contributions were added to an element, at most `MOST`.
    """

    limbs: Tensor
    top: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, shape: torch.Size | tuple[int, ...], device: torch.device | str = "cpu") -> ExactSum:
        """The sum of nothing."""
        limbs = torch.zeros((LIMBS, *shape), dtype=torch.int64, device=device)
        return cls(limbs, torch.full(shape, LOWEST, dtype=torch.int16, device=device))

    def add(self, x: Tensor) -> None:
        """Add a contribution: `x` float64, of the sum's shape and device.

        Raises:
            ValueError: it holds NaN or infinities. OverflowError: it is one contribution too many.
        """
        if not bool(torch.isfinite(x).all()):
            raise ValueError("an exact sum takes finite numbers only")
        # frexp has its mantissa in [1/2, 1): the leading digit's weight is one below the exponent.
        own = torch.div(torch.frexp(x).exponent - 1, BITS, rounding_mode="floor").to(torch.int16)
        self._rise(torch.where(x == 0, LOWEST, own).to(torch.int16), 1)
        # Exact: a power of two, and what it brings below the denormal numbers is cut off anyway.
        rest = _scaled(x, -BITS * (self.top.to(torch.int64) - (LIMBS - 1)))
        for limb in range(LIMBS):
            unit = UNIT ** (LIMBS - 1 - limb)
            piece = (rest / unit).trunc()
            self.limbs[limb] += piece.to(torch.int64)
            rest = rest - piece * unit

    def merge(self, other: ExactSum) -> None:
        """Add all contributions of `other`.

        Raises:
            OverflowError: they are too many.
        """
        self._rise(other.top, other.count)
        self.limbs += _shifted(other.limbs, self.top - other.top)

    def value(self) -> Tensor:
        """The sums as float64, rounded."""
        high, middle, low = _carried(self.limbs)
        negative = high < 0
        sign = torch.where(negative, -1, 1)
        # Without its sign all digits are positive, and adding them from the top on loses nothing to cancellation.
        high, middle, low = _carried(self.limbs * sign)
        first, second = (high >> BITS).double() * UNIT**3, (high & (2**BITS - 1)).double() * UNIT**2
        total = first + second
        lost = second - (total - first)
        third = middle.double() * UNIT
        sum_ = total + third
        lost = lost + (third - (sum_ - total)) + low.double()
        return _scaled((sum_ + lost) * sign, BITS * (self.top.to(torch.int64) - (LIMBS - 1)))

    def _rise(self, top: Tensor, count: int) -> None:
        """Make room for digits up to the bin `top` and for `count` more contributions."""
        if self.count + count > MOST:
            raise OverflowError(f"an exact sum takes {MOST} contributions, {self.count + count} are given")
        self.count += count
        if bool((top > self.top).any()):
            highest = torch.maximum(top, self.top)
            self.limbs = _shifted(self.limbs, highest - self.top)
            self.top = highest


def _shifted(limbs: Tensor, by: Tensor) -> Tensor:
    """Limbs of the window that is `by` bins higher, `by >= 0`: the upper ones are 0, the lowest leave."""
    moved = torch.zeros_like(limbs)
    for source in range(LIMBS):
        for target in range(source, LIMBS):
            moved[target] += torch.where(by == target - source, limbs[source], 0)
    return moved


def _carried(limbs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same number with its two lower limbs in [0, 2^40)."""
    high, middle, low = limbs
    middle = middle + (low >> BITS)
    return high + (middle >> BITS), middle & (2**BITS - 1), low & (2**BITS - 1)


def _scaled(x: Tensor, exponent: Tensor) -> Tensor:
    """`x 2^exponent`, for exponents beyond those of a float64."""
    # Powers of two come exact out of their bits; torch.ldexp takes them from float32.
    half = torch.div(exponent, 2, rounding_mode="floor")
    first, second = (((e + 1023) << 52).view(torch.float64) for e in (half, exponent - half))
    return x * first * second
