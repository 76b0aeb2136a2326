"""Numbers as a reader wants them: sizes, counts, losses with their intervals."""

from __future__ import annotations

import math

from kvcalib.report.data import Estimate

GIB = 2**30


def size(count: float) -> str:
    """Bytes in decimal units: `512 B`, `3.4 kB`, `14.2 GB`."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def many(count: float) -> str:
    """A large number: `512`, `131 k`, `1.2 M`."""
    return _scaled(count, ("", "k", "M", "billion", "trillion")).strip()


def _scaled(value: float, units: tuple[str, ...]) -> str:
    place = 0
    while abs(value) >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.3g} {units[place]}"


def short(value: float, digits: int = 3) -> str:
    """`digits` significant digits, small numbers as 2.10e-4."""
    if not math.isfinite(value):
        return "not finite"
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if not value:
        return "0"
    return f"{value:#.{digits}g}".rstrip(".") if abs(value) < 10**digits - 0.5 else f"{value:.0f}"


def signed(value: float, digits: int = 3) -> str:
    """The same with its sign."""
    return ("+" if value > 0 else "") + short(value, digits)


def interval(estimate: Estimate, plus: bool = False) -> str:
    """`0.0123 (0.0119 to 0.0128)`; without an interval the value alone."""
    show = signed if plus else short
    if estimate.low is None or estimate.high is None:
        return show(estimate.value)
    return f"{show(estimate.value)} ({show(estimate.low)} to {show(estimate.high)})"


def two_lines(estimate: Estimate, plus: bool = False, factor: float = 1.0, unit: str = "") -> str:
    """A table's cell: the value times `factor`, and below it the interval."""
    show = signed if plus else short
    value = show(factor * estimate.value) + unit
    if estimate.low is None or estimate.high is None or estimate.low == estimate.high:
        return value
    return f"{value}\n{show(factor * estimate.low)} to {show(factor * estimate.high)}"


def percent(share: float, digits: int = 3) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}g} %"
