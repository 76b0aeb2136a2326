"""Charts inside a page: SVG without a style of its own, its classes coloured by the page in light and dark.

`svg.Panel` draws whole files; a `Chart` is one picture of a page: the same ticks and labels, and marks of several
shapes, intervals, rules and labels that do not overlap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from kvcalib.report.svg import Point, label, log_ticks, text, ticks

Shape = Literal["circle", "square", "triangle", "diamond", "cross"]
SHAPES: tuple[Shape, ...] = ("square", "triangle", "diamond", "cross", "circle")
Box = tuple[float, float, float, float]
LETTER, PIECE = 7.0, 6.0
"""Width of a character at 12 px, about; how long the pieces of a line are that labels keep clear of."""


@dataclass(frozen=True)
class Axis:
    """One axis: its range, its scale and what it says.

    Attributes:
        marks: where ticks are. log: logarithmic; what is 0 or less then lies at the lower end. names: of the ticks.
        ends: the range; the first and the last tick if None.
    """

    name: str
    marks: tuple[float, ...]
    log: bool = False
    names: tuple[str, ...] | None = None
    ends: Point | None = None

    @classmethod
    def over(
        cls,
        values: Sequence[float],
        name: str,
        log: bool = False,
        whole: bool = False,
        zero: bool = False,
        most: int = 7,
    ) -> Axis:
        """The axis that covers `values`; with `zero` it begins (or ends) at 0."""
        usable = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        if log:
            marks = log_ticks(usable or [1.0])
            while usable and len(marks) > 2 and marks[1] <= min(usable):
                marks.pop(0)
            while usable and len(marks) > 2 and marks[-2] >= max(usable):
                marks.pop()
            return cls(name, tuple(marks), True)
        return cls(name, tuple(ticks([*([0.0] if zero else []), *usable] or [0.0], most, whole)))

    def place(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 1."""
        low, high = self.ends or (self.marks[0], self.marks[-1])
        if self.log:
            if value <= low:
                return 0.0
            low, high, value = math.log(low), math.log(high), math.log(value)
        return min(1.0, max(0.0, (value - low) / ((high - low) or 1)))

    def tick(self, number: int) -> str:
        """The text of one tick."""
        return self.names[number] if self.names else label(self.marks[number], self.marks)


@dataclass
class Chart:
    """One picture.

    Attributes:
        about: what a reader who cannot see it is told.
        width, height: of the picture in its own units; the page scales it.
    """

    about: str
    x: Axis
    y: Axis
    width: int = 420
    height: int = 280
    left: int = 60
    right: int = 14
    _parts: list[str] = field(default_factory=list)
    _boxes: list[Box] = field(default_factory=list)
    _pieces: list[Point] = field(default_factory=list)

    TOP, BOTTOM = 12, 44

    def px(self, value: float) -> float:
        """Horizontal place of a value."""
        return self.left + (self.width - self.left - self.right) * self.x.place(value)

    def py(self, value: float) -> float:
        """Vertical place of a value."""
        return self.TOP + (self.height - self.TOP - self.BOTTOM) * (1 - self.y.place(value))

    def line(self, points: Sequence[Point], colour: str, more: str = "") -> None:
        """Points joined by a line."""
        if len(points) > 1:
            path = "L".join(f"{self.px(x):.1f} {self.py(y):.1f}" for x, y in points)
            self._parts.append(f'<path class="line {colour}{more and " " + more}" d="M{path}"/>')
            for (x, y), (x2, y2) in itertools.pairwise((self.px(x), self.py(y)) for x, y in points):
                count = max(1, int(math.hypot(x2 - x, y2 - y) / PIECE))
                self._pieces += [(x + (x2 - x) * k / count, y + (y2 - y) * k / count) for k in range(1, count)]

    def steps(self, edges: Sequence[float], heights: Sequence[float], colour: str, filled: bool = False) -> None:
        """A histogram's outline, or its area."""
        path = f"M{self.px(edges[0]):.1f} {self.py(0):.1f}"
        for right, height in zip(edges[1:], heights, strict=True):
            path += f"V{self.py(height):.1f}H{self.px(right):.1f}"
        path += f"V{self.py(0):.1f}"
        self._parts.append(f'<path class="{"area" if filled else "line thin"} {colour}" d="{path}"/>')

    def mark(
        self, x: float, y: float, colour: str, shape: Shape = "circle", title: str = "", big: bool = False
    ) -> None:
        """One point; its title is what a pointer shows. Hollow where a logarithmic axis cannot show it."""
        at, hollow = (self.px(x), self.py(y)), self.y.log and y <= 0
        size = 5.5 if big else 4.0
        self._parts.append(glyph(*at, colour, shape, size, title, hollow))
        self._boxes.append((at[0] - size, at[1] - size, at[0] + size, at[1] + size))

    def spread(self, x: float, low: float, high: float, colour: str) -> None:
        """A vertical interval."""
        at = self.px(x)
        self._parts.append(f'<path class="line thin {colour}" d="M{at:.1f} {self.py(low):.1f}V{self.py(high):.1f}"/>')

    def rule(self, y: float, words: str) -> None:
        """A horizontal line across, with its name to the right of it."""
        at, right = self.py(y), self.width - self.right
        self._parts.append(f'<path class="rule" d="M{self.left} {at:.1f}H{right}"/>')
        self._parts.append(text(right + 5, at + 4, words, "dim"))

    def ticks_below(self, values: Sequence[float], colour: str) -> None:
        """Short strokes on the lower edge."""
        base = self.height - self.BOTTOM
        for value in values:
            self._parts.append(f'<path class="line {colour}" d="M{self.px(value):.1f} {base}v-9"/>')

    def name(self, x: float, y: float, words: str, crossing: int = 2, left: bool = False) -> bool:
        """A label beside a point, clear of marks and other labels; False if there is no such place.

        Args:
            crossing: how much of a line it may lie on at most, in pieces of `PIECE`. left: try the point's left first.
        """
        at, wide = (self.px(x), self.py(y)), LETTER * len(words)
        places = [(8, 4), (-8 - wide, 4), (7, -7), (7, 15), (-wide / 2, -9), (-wide / 2, 18)]
        if left:
            places[:2] = places[1], places[0]
        found: list[tuple[int, int, Box]] = []
        for order, (dx, dy) in enumerate(places):
            box = (at[0] + dx, at[1] + dy - 10, at[0] + dx + wide, at[1] + dy + 2)
            inside = box[0] > self.left + 2 and box[2] < self.width - 2 and box[1] > 0
            inside = inside and box[3] < self.height - self.BOTTOM - 2
            if inside and not any(_meet(box, other) for other in self._boxes):
                found.append((sum(_meet(box, (*p, *p)) for p in self._pieces), order, box))
        if not found or min(found)[0] > crossing:
            return False
        box = min(found)[2]
        self._boxes.append(box)
        self._parts.append(text(box[0], box[3] - 2, words, "name"))
        return True

    def svg(self) -> str:
        """The picture."""
        bottom, right = self.height - self.BOTTOM, self.width - self.right
        out = [
            f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'role="img" aria-label={quoteattr(self.about)}>'
        ]
        for number, mark in enumerate(self.y.marks):
            out.append(f'<path class="grid" d="M{self.left} {self.py(mark):.1f}H{right}"/>')
            out.append(text(self.left - 6, self.py(mark) + 4, self.y.tick(number), "dim", "end"))
        shown = self._room_for_x()
        for number, mark in enumerate(self.x.marks):
            out.append(f'<path class="axis" d="M{self.px(mark):.1f} {bottom}v4"/>')
            if number in shown:
                out.append(text(shown[number], bottom + 17, self.x.tick(number), "dim", "middle"))
        out.append(f'<path class="axis" d="M{self.left} {bottom}H{right}"/>')
        out.append(text((self.left + right) / 2, self.height - 8, self.x.name, "dim", "middle"))
        middle = (self.TOP + bottom) / 2
        if self.y.name:
            out.append(text(13, middle, self.y.name, "dim", "middle", f' transform="rotate(-90 13 {middle:g})"'))
        return "".join([*out, *self._parts, "</svg>"])

    def _room_for_x(self) -> dict[int, float]:
        """Which ticks of the horizontal axis have room for their text, and where its middle is."""
        shown, end = {}, -1e9
        for number, mark in enumerate(self.x.marks):
            half = LETTER * len(self.x.tick(number)) / 2
            middle = min(self.px(mark), self.width - half - 2)
            if middle - half > end + 4:
                shown[number] = middle
                end = middle + half
        return shown


def glyph(
    x: float, y: float, colour: str, shape: Shape, size: float = 4.0, title: str = "", hollow: bool = False
) -> str:
    """A mark as an SVG element."""
    kind, s, d = f"{'hollow' if hollow else 'dot'} {colour}", size, 1.3 * size
    inside = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{s:g}">{inside}</circle>'
    steps = {
        "square": f"M{x - s:.1f} {y - s:.1f}h{2 * s:g}v{2 * s:g}h{-2 * s:g}z",
        "triangle": f"M{x:.1f} {y - s * 1.2:.1f}l{s * 1.2:g} {s * 2.1:g}h{-s * 2.4:g}z",
        "diamond": f"M{x:.1f} {y - d:.1f}l{d:g} {d:g}l{-d:g} {d:g}l{-d:g} {-d:g}z",
        "cross": f"M{x - s:.1f} {y - s:.1f}l{2 * s:g} {2 * s:g}m0 {-2 * s:g}l{-2 * s:g} {2 * s:g}",
    }
    return f'<path class="{kind}{" open" * (shape == "cross")}" d="{steps[shape]}">{inside}</path>'


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
