"""Pictures of a report for the docs: 1280 and 390 pixels wide, light and dark, taken by headless Chromium.

    python bench/report_screenshots.py artifacts/demo/report.html [--out docs/images]

Writes report-summary.png, report-layers.png, report-dark.png and report-phone.png, each below 300 KB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser import Browser, browser, find  # noqa: E402

LARGEST = 300_000
PLACE = "(e => e ? [e.getBoundingClientRect().top + scrollY, e.getBoundingClientRect().bottom + scrollY] : null)"


def span(tab: Browser, first: str, last: str) -> tuple[float, float]:
    """From where on and how far down the sections `first` to `last` reach, a margin included."""
    ends = [tab.ask(f"{PLACE}(document.querySelector({name!r}))") for name in (first, last)]
    if None in ends:
        raise SystemExit(
            f"the report has no {first if ends[0] is None else last}; take one of a run with its artifacts"
        )
    return max(0.0, ends[0][0] - 12), ends[1][1] + 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images")
    given = parser.parse_args()
    program = find()
    if program is None:
        raise SystemExit("no Chromium here; install one (apt-get install chromium)")
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = (
        ("report-summary", 1280, False, "header", "#comparison"),
        ("report-layers", 1280, False, "#bits", "#losses"),
        ("report-codebooks", 1280, True, "#codebooks", "#fisher"),
        ("report-phone", 390, False, "header", "#pareto"),
        ("report-phone-dark", 390, True, "#memory", "#bits"),
    )
    with tempfile.TemporaryDirectory() as profile, browser(program, Path(profile)) as tab:
        for name, width, dark, first, last in wanted:
            tab.open(given.report, width, 900, dark)
            top, bottom = span(tab, first, last)
            png = tab.picture((0, top, width, bottom - top))
            if len(png) > LARGEST:
                raise SystemExit(f"{name}.png has {len(png)} bytes, expected at most {LARGEST}; show less of the page")
            (given.out / f"{name}.png").write_bytes(png)
            print(f"{given.out / name}.png: {width} x {bottom - top:.0f}, {len(png) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
