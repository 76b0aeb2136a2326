"""Small line plots as SVG text: axes with units, grid, lines, points; light and dark by the reader's own setting.

Nothing is needed to read them but a browser. Not every viewer knows CSS variables, so each class is written twice, the
second time for `prefers-color-scheme: dark`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.sax.saxutils import escape

Point = tuple[float, float]
Colour = Literal["first", "second", "mark"]
LIGHT = {"page": "#ffffff", "ink": "#1f2328", "dim": "#656d76", "grid": "#e4e8ec", "first": "#1f6feb",
         "second": "#c2570c", "mark": "#1a7f37"}  # fmt: skip
DARK = {"page": "#0d1117", "ink": "#e6edf3", "dim": "#8b949e", "grid": "#262c34", "first": "#6cb0ff",
        "second": "#f0a35e", "mark": "#56d364"}  # fmt: skip
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 40, 46


def _style() -> str:
    def rules(c: dict[str, str]) -> str:
        lines = "".join(
            f".{n}{{stroke:{c[n]};fill:none}}.{n}-dot{{fill:{c[n]};stroke:{c['page']}}}.{n}-text{{fill:{c[n]}}}"
            for n in ("first", "second", "mark")
        )
        return (
            f".page{{fill:{c['page']}}}text{{fill:{c['ink']}}}.dim{{fill:{c['dim']}}}.grid{{stroke:{c['grid']}}}"
            f".axis{{stroke:{c['dim']}}}{lines}"
        )

    font = "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;font-size:12px}"
    dark = f"@media(prefers-color-scheme:dark){{{rules(DARK)}}}"
    return f"{font}.title{{font-size:13px;font-weight:600}}{rules(LIGHT)}{dark}"


@dataclass
class Panel:
    """One plot.

    Attributes:
        title: above it. x_label, y_label: what the axes show, with units.
        log: whether the vertical axis is logarithmic; points of 0 or less are then left out.
        whole: whether horizontal ticks are whole numbers.
        width, height: in pixels, labels included.
    """

    title: str
    x_label: str
    y_label: str
    log: bool = False
    whole: bool = False
    width: int = 360
    height: int = 300
    _series: list[tuple[Sequence[Point], Colour, str, bool, bool]] = field(default_factory=list)
    _names: list[tuple[Point, str]] = field(default_factory=list)

    def name(self, point: Point, text: str) -> None:
        """Write `text` beside a point: right and above it, or where there is room."""
        self._names.append((point, text))

    def add(
        self, points: Sequence[Point], colour: Colour, name: str = "", line: bool = True, dots: bool = True
    ) -> None:
        """Add a series; `name` goes into the legend."""
        usable = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not self.log)]
        self._series.append((usable, colour, name, line, dots))

    def draw(self, left: float, top: float) -> str:
        """The panel as SVG elements, its corner at `(left, top)`."""
        points = [p for series in self._series for p in series[0]] or [(0.0, 1.0), (1.0, 1.0)]
        x_ticks = ticks([x for x, _ in points], 8, self.whole)
        y_ticks = log_ticks([y for _, y in points]) if self.log else ticks([0.0, *(y for _, y in points)], 6)
        x_low, x_high = _range([x for x, _ in points], x_ticks)
        y_low, y_high = _range([y for _, y in points], y_ticks)
        inner_w, inner_h = self.width - LEFT - RIGHT, self.height - TOP - BOTTOM
        scale = math.log if self.log else float

        def px(x: float) -> float:
            return LEFT + inner_w * (x - x_low) / ((x_high - x_low) or 1)

        def py(y: float) -> float:
            return TOP + inner_h * (1 - (scale(y) - scale(y_low)) / ((scale(y_high) - scale(y_low)) or 1))

        out = [f'<g transform="translate({left:g} {top:g})">', text(LEFT, 16, self.title, "title")]
        for y in y_ticks:
            out.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{self.width - RIGHT}"/>')
            out.append(text(LEFT - 6, py(y) + 4, label(y, y_ticks), "dim", "end"))
        for x in x_ticks:
            out.append(f'<path class="axis" d="M{px(x):.1f} {TOP + inner_h}v4"/>')
            out.append(text(px(x), TOP + inner_h + 17, label(x, x_ticks), "dim", "middle"))
        out.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{TOP + inner_h}H{self.width - RIGHT}"/>')
        out.append(text(LEFT + inner_w / 2, self.height - 8, self.x_label, "dim", "middle"))
        middle = TOP + inner_h / 2
        out.append(text(14, middle, self.y_label, "dim", "middle", f' transform="rotate(-90 14 {middle:g})"'))
        for series, colour, _, line, dots in self._series:
            places = [(px(x), py(y)) for x, y in series]
            if line and len(places) > 1:
                path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
                out.append(f'<path class="{colour}" stroke-width="2" stroke-linejoin="round" d="M{path}"/>')
            if dots:
                size = 3 if len(places) <= 40 else 2
                size = 6 if not line else size
                out += [f'<circle class="{colour}-dot" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>' for x, y in places]
        for (x, y), said in self._names:
            left_of = px(x) + 8 + 6.6 * len(said) > self.width - RIGHT
            below = 14 if py(y) < TOP + 12 else -6
            out.append(text(px(x) + (-8 if left_of else 8), py(y) + below, said, "dim", "end" if left_of else "start"))
        out.append(self._legend())
        return "".join([*out, "</g>"])

    def _legend(self) -> str:
        named = [(colour, name) for _, colour, name, _, _ in self._series if name]
        out, at = [], float(LEFT)
        for colour, name in named:
            out.append(f'<circle class="{colour}-dot" cx="{at + 4:g}" cy="28" r="4"/>')
            out.append(text(at + 12, 32, name, f"{colour}-text"))
            at += 24 + 6.6 * len(name)
        return "".join(out)


def page(panels: Sequence[Panel], heading: str, note: str) -> str:
    """Panels side by side under `heading` and `note`, as a whole SVG file."""
    width, height = sum(p.width for p in panels) + 8, max(p.height for p in panels) + 56
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(heading, {chr(34): "&quot;"})}">',
        f"<title>{escape(heading)}</title><style>{_style()}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
        text(20, 22, heading, "title"),
        text(20, 40, note, "dim"),
    ]
    left = 4
    for panel in panels:
        out.append(panel.draw(left, 52))
        left += panel.width
    return "".join([*out, "</svg>\n"])


def ticks(values: Sequence[float], most: int, whole: bool = False) -> list[float]:
    """At most `most` round numbers, 1, 2 or 5 times a power of ten apart, that cover `values`."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
        low, high = (low, low + 1) if low > -1e-30 else (low, 0.0)
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    if whole:
        step = max(1.0, step)
    steps = [step * m for m in (1, 2, 5, 10, 20, 50, 100)]
    chosen = next(s for s in steps if math.ceil(high / s - 1e-9) - math.floor(low / s + 1e-9) < most)
    first, last = math.floor(low / chosen + 1e-9), math.ceil(high / chosen - 1e-9)
    return [k * chosen for k in range(first, max(last, first + 1) + 1)]


def log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten that cover `values`; with 2 and 5 between where there are few."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    step = max(1, -(-(high - low) // 7))
    decades = [10.0**k for k in range(low, high + step, step)]
    if len(decades) > 3:
        return decades
    return sorted({d * m for d in decades[:-1] for m in (1, 2, 5)} | {decades[-1]})


def label(value: float, among: Sequence[float]) -> str:
    """A tick's number: all of an axis plain, or all as 2e-4 where some are small or large."""
    sizes = [abs(x) for x in among if x]
    if value and (min(sizes) < 1e-3 or max(sizes) >= 1e5):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{round(value, 10):g}"


def _range(values: Sequence[float], marks: Sequence[float]) -> Point:
    return min(*marks, *values), max(*marks, *values)


def text(x: float, y: float, content: str, kind: str, anchor: str = "start", more: str = "") -> str:
    """`content` at a place, of class `kind`; `more` are further attributes."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(content)}</text>'
