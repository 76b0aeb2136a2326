"""The report opened in headless Chromium: quiet, alone, as wide as the window, legible in light and dark."""

import zlib

import pytest

from kvcalib.report.document import document
from tests.browser import browser, needed
from tests.report.examples import full, hostile

# Texts of a chart that lie on one another by more than two units, as pairs.
OVERLAPS = """
[...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
  const boxes = texts.map(t => t.getBoundingClientRect());
  const found = [];
  for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
    const a = boxes[i], b = boxes[j];
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1.5 && high > 3.5)
      found.push([svg.getAttribute('aria-label'), texts[i].textContent, texts[j].textContent]);
  }
  return found;
})
"""
# Texts that a chart cuts off at its edge.
CUT = """
[...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(t => {
    const b = t.getBoundingClientRect();
    return b.left < frame.left - 1 || b.right > frame.right + 1 || b.top < frame.top - 3 || b.bottom > frame.bottom + 3;
  }).map(t => [svg.getAttribute('aria-label'), t.textContent]);
})
"""
EMPTY = """
[...document.querySelectorAll('svg')].filter(s => {
  const b = s.getBoundingClientRect();
  return s.checkVisibility() && !(b.width > 4 && b.height > 4);
}).length
"""
# Contrast of texts with what they are written on, by the formula of WCAG 2.
CONTRAST = """
(() => {
  const canvas = document.createElement('canvas'), pen = canvas.getContext('2d', {willReadFrequently: true});
  const rgb = colour => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = c => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const lum = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c[3] > 250) return c;
    }
    return [255, 255, 255];
  };
  let least = [99, ''];
  const pairs = [...document.querySelectorAll('h1, h2, h3, p, td, th, dt, dd, a, code, figcaption, li, .tile strong')]
    .map(e => [e, getComputedStyle(e).color, ground(e)]);
  for (const t of document.querySelectorAll('svg.chart text')) {
    const under = t.classList.contains('on-dark') || t.classList.contains('on-light');
    const cell = t.previousElementSibling;
    pairs.push([t, getComputedStyle(t).fill, under ? rgb(getComputedStyle(cell).fill) : ground(t.closest('figure'))]);
  }
  for (const [e, colour, behind] of pairs) {
    const [a, b] = [lum(rgb(colour)), lum(behind)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least[0]) least = [ratio, e.textContent.slice(0, 40) + ' ' + colour + ' on ' + behind];
  }
  return least;
})()
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(needed(), tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    kinds = {
        "full": full(), "hostile": hostile(), "deep": full(layers=48),
        "long": full(model="a-very-long-organisation-name/" + "Model" * 30, artifact="nuq" * 40),
    }  # fmt: skip
    for name, report in kinds.items():
        (folder / f"{name}.html").write_text(document(report, "0"))
    return folder


@pytest.mark.parametrize("name", ["full", "hostile", "deep", "long"])
def test_it_is_quiet_and_asks_for_nothing(tab, pages, name):
    page = pages / f"{name}.html"
    tab.open(page)
    assert tab.messages == []
    assert [r for r in tab.requests if not r.startswith("data:")] == [page.as_uri()]


def test_requests_and_messages_would_be_seen(tab, tmp_path):
    """The two lists above are not empty for want of looking."""
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('x'); y</script><img src='http://example.invalid/a.png'>")
    tab.open(bad)
    assert "http://example.invalid/a.png" in tab.requests
    assert any("console.error" in m for m in tab.messages)
    assert any("exception" in m for m in tab.messages)


def test_the_pages_policy_lets_no_script_run(tab, tmp_path):
    page = tmp_path / "script.html"
    page.write_text(document(full(), "0").replace("<main>", "<main><script>document.title = 'ran'</script>"))
    tab.open(page)
    assert tab.ask("document.title") != "ran"
    assert any("Content Security Policy" in m for m in tab.messages)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("name", ["full", "hostile", "deep", "long"])
def test_it_is_no_wider_than_the_window(tab, pages, name, width):
    tab.open(pages / f"{name}.html", width, 800)
    assert tab.ask("window.innerWidth") == width
    assert tab.ask("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)") <= width
    beyond = (
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && e.getClientRects().length && "
    )
    assert (
        tab.ask(beyond + f"e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 80))") == []
    )


def test_wide_tables_scroll_within_their_box(tab, pages):
    tab.open(pages / "full.html", 390, 800)
    box = "document.querySelector('#comparison .scroll')"
    assert tab.ask(f"{box}.scrollWidth > {box}.clientWidth")
    tab.ask(f"{box}.scrollLeft = 300")
    assert tab.ask(f"{box}.scrollLeft") == 300
    # The names stay in sight.
    assert (
        tab.ask(f"{box}.querySelector('tbody th').getBoundingClientRect().left - {box}.getBoundingClientRect().left")
        < 3
    )


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["full", "deep"])
def test_charts_have_a_size_and_their_texts_do_not_collide(tab, pages, name, width):
    tab.open(pages / f"{name}.html", width, 800)
    assert tab.ask("document.querySelectorAll('svg.chart').length") > 20
    assert tab.ask(EMPTY) == 0
    assert tab.ask(OVERLAPS) == []
    assert tab.ask(CUT) == []


def test_texts_of_charts_can_be_read_on_a_phone(tab, pages):
    tab.open(pages / "full.html", 390, 800)
    # A line's box is a fifth higher than its letters; a rotated one is as wide as a line is high.
    least = """Math.min(...[...document.querySelectorAll('svg.chart text')].map(t => {
      const b = t.getBoundingClientRect();
      return t.hasAttribute('transform') ? b.width : b.height;
    }))"""
    assert tab.ask(least) > 9.5


@pytest.mark.parametrize("dark", [False, True])
def test_letters_stand_out_in_light_and_dark(tab, pages, dark):
    tab.open(pages / "full.html", 1280, 900, dark)
    ratio, where = tab.ask(CONTRAST)
    assert ratio >= 4.5, where


def test_light_and_dark_follow_the_system_and_the_switch(tab, pages):
    page = pages / "full.html"
    ground = "getComputedStyle(document.body).backgroundColor"
    tab.open(page, 1280, 900, dark=False)
    light, bright = tab.ask(ground), tab.picture((0, 0, 240, 120))
    tab.open(page, 1280, 900, dark=True)
    dark, dim = tab.ask(ground), tab.picture((0, 0, 240, 120))
    assert light != dark
    assert mean_brightness(bright) > 200
    assert mean_brightness(dim) < 60
    tab.ask("document.getElementById('theme-light').click()")
    assert tab.ask(ground) == light
    tab.ask("document.getElementById('theme-dark').click()")
    tab.window(1280, 900, dark=False)
    assert tab.ask(ground) == dark
    tab.ask("document.getElementById('theme-auto').click()")
    assert tab.ask(ground) == light


def mean_brightness(png):
    """Mean of all bytes of a PNG's unfiltered rows, 0 to 255; 8 bits, RGB or RGBA, alpha left out."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
    channels = {2: 3, 6: 4}[png[25]]
    at, data = 8, b""
    while at < len(png):
        length, kind = int.from_bytes(png[at : at + 4]), png[at + 4 : at + 8]
        data += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    raw, stride = zlib.decompress(data), width * channels
    before, total, count = bytes(stride), 0, 0
    for y in range(height):
        row = unfilter(
            raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)]), before, channels
        )
        total += sum(sum(row[c::channels]) for c in range(3))
        count += 3 * width
        before = bytes(row)
    return total / count


def unfilter(kind, row, before, step):
    """One row of a PNG (ISO 15948, section 9)."""
    for i in range(len(row)):
        left, up = row[i - step] if i >= step else 0, before[i]
        corner = before[i - step] if i >= step else 0
        if kind == 4:
            guess = left + up - corner
            near = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))[2]
        else:
            near = (0, left, up, (left + up) // 2)[kind]
        row[i] = (row[i] + near) & 255
    return row
