"""The page: sections of figures, tables and sentences in one HTML file that needs nothing but a browser.

The template escapes everything that is text. Only charts are inserted as they are, and they escape their own text. The
page has no script, and a policy in its head that lets none run and nothing be fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kvcalib.report.chart import Shape, glyph


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    colour: str
    name: str
    shape: Shape | None = None
    kind: str = "line"

    def swatch(self) -> Markup:
        """Its mark, or a piece of its line, or of its area."""
        if self.shape:
            inside = glyph(8, 6, self.colour, self.shape)
        elif self.kind == "area":
            inside = f'<path class="area {self.colour}" d="M1 2h14v8h-14z"/>'
        else:
            inside = f'<path class="{self.kind} {self.colour}" d="M0 6h16"/>'
        return Markup(f'<svg class="swatch" viewBox="0 0 16 12" aria-hidden="true">{inside}</svg>')


@dataclass(frozen=True)
class Figure:
    """A chart with its title and a legend."""

    title: str
    svg: str
    legend: Sequence[Key] = ()
    note: str = ""
    wide: bool = False
    small: bool = False

    @property
    def drawing(self) -> Markup:
        """The chart as HTML."""
        return Markup(self.svg)


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it.

    Attributes:
        strong: numbers of the rows that are ours. folded: shown only when asked for, under `title`.
        beside: next to the figures where there is room.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    strong: frozenset[int] = frozenset()
    folded: bool = False
    beside: bool = False


@dataclass(frozen=True)
class Tile:
    """One large number with what it means below."""

    value: str
    meaning: str


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: Sequence[tuple[str, str]]
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page, in this order: sentences, tiles, a legend of all figures, figures, tables, facts, notes.

    Attributes:
        key: its anchor.
    """

    key: str
    title: str
    says: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    legend: Sequence[Key] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    facts: Sequence[Facts] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Missing:
    """A section that is left out, and the command that would give it."""

    title: str
    command: str


@dataclass(frozen=True)
class Page:
    """The whole page; `created` is a date out of the data, or None."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    missing: Sequence[Missing] = field(default_factory=list)
    created: str | None = None
    version: str = ""


def render(page: Page) -> str:
    """The page as HTML; the same page gives the same text."""
    environment = Environment(
        loader=PackageLoader("kvcalib.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    style = files("kvcalib.report").joinpath("templates", "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(page=page, style=Markup(style))
