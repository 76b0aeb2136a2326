"""Heat maps as SVG: rows and columns of cells, dark where the value is large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape, quoteattr

from kvcalib.report.chart import LETTER
from kvcalib.report.svg import text

SHADES = 10
LEFT, TOP, BOTTOM, RIGHT = 60, 10, 40, 10


def heat_map(
    about: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    low: float,
    high: float,
    show: Callable[[float], str],
    row_name: str,
    column_name: str,
    width: int = 420,
    gap_before: int | None = None,
) -> str:
    """The picture; a value of None leaves its cell empty.

    Args:
        values: by row and column. low, high: what the lightest and the darkest shade stand for.
        show: a value as text, inside cells that have room for it, and in what a pointer shows.
        gap_before: the column that a small gap stands before, between two groups of columns.
    """
    gap = 0 if gap_before is None else 8
    cell_w = (width - LEFT - RIGHT - gap) / max(1, len(columns))
    longest = max((len(show(v)) for row in values for v in row if v is not None), default=1)
    roomy = cell_w >= LETTER * longest + 4
    cell_h = 24.0 if roomy and len(rows) <= 16 else max(7.0, min(18.0, 640 / max(1, len(rows))))
    height = TOP + cell_h * len(rows) + BOTTOM
    out = [
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" role="img" '
        f"aria-label={quoteattr(about)}>"
    ]
    left = [LEFT + cell_w * c + (gap if gap_before is not None and c >= gap_before else 0) for c in range(len(columns))]
    for r, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = TOP + cell_h * r
        if r % max(1, round(13 / cell_h + 0.49)) == 0:
            out.append(text(LEFT - 6, y + cell_h / 2 + 4, name, "dim", "end"))
        for c, value in enumerate(row):
            if value is None:
                continue
            share = 0.0 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
            shade = min(SHADES - 1, int(share * SHADES))
            tip = escape(f"{row_name} {name}, {columns[c]}: {show(value)}")
            out.append(
                f'<rect class="q{shade}" x="{left[c]:.1f}" y="{y:.1f}" width="{cell_w - 1:.1f}" '
                f'height="{cell_h - 1:.1f}"><title>{tip}</title></rect>'
            )
            if roomy and cell_h >= 16:
                kind = "on-dark" if shade >= SHADES // 2 else "on-light"
                out.append(text(left[c] + cell_w / 2, y + cell_h / 2 + 4, show(value), kind, "middle"))
    bottom, end = TOP + cell_h * len(rows), -1e9
    for c, name in enumerate(columns):
        middle, half = left[c] + cell_w / 2, LETTER * len(name) / 2
        if middle - half > end + 4:
            out.append(text(middle, bottom + 14, name, "dim", "middle"))
            end = middle + half
    out.append(text((LEFT + width - RIGHT) / 2, height - 6, column_name, "dim", "middle"))
    middle = TOP + cell_h * len(rows) / 2
    out.append(text(13, middle, row_name, "dim", "middle", f' transform="rotate(-90 13 {middle:g})"'))
    return "".join([*out, "</svg>"])
