"""A figure of the report as an SVG file of its own, for a README: its style and legend inside, light and dark."""

from __future__ import annotations

import re
from importlib.resources import files

from kvcalib.report.chart import LETTER, glyph
from kvcalib.report.page import Figure
from kvcalib.report.svg import text

HEADING, LINE, MARGIN = 30, 20, 12
_BOX = re.compile(r'viewBox="0 0 (\d+) (\d+)"')


def picture(figure: Figure, note: str = "") -> str:
    """The file's text: title, chart, legend, and `note` below.

    Raises:
        ValueError: the figure's SVG is none of `chart.Chart`.
    """
    found = _BOX.search(figure.svg)
    if found is None:
        raise ValueError("the figure's SVG names no viewBox of whole numbers from 0 0; make it with chart.Chart")
    width, height = int(found[1]), int(found[2])
    style = files("kvcalib.report").joinpath("templates", "report.css").read_text(encoding="utf-8")
    legend, x, y = [], MARGIN + 4, height + 14
    for key in figure.legend:
        wide = 18 + LETTER * len(key.name) + 14
        if x + wide > width and x > MARGIN + 4:
            x, y = MARGIN + 4, y + LINE
        legend += [glyph(x, y, key.colour, key.shape or "square"), text(x + 11, y + 4, key.name, "name")]
        x += round(wide)
    bottom = y + LINE + (LINE if note else 0)
    inner = figure.svg[figure.svg.index(">") + 1 : figure.svg.rindex("</svg>")]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEADING + bottom}" '
            f'width="{2 * width}" role="img">',
            f"<style>{style}</style>",
            text(MARGIN, 19, figure.title, "", "start", ' font-weight="600"'),
            f'<g transform="translate(0 {HEADING})">{inner}{"".join(legend)}',
            text(MARGIN, bottom - 5, note, "dim name") if note else "",
            "</g></svg>\n",
        ]
    )
