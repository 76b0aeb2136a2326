"""The page: every section, what is missing, names that are not to be trusted, numbers where the data says."""

import html
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from kvcalib.report.capacity import GPUS, cache_bytes, long_bits, tokens_that_fit, usual_gpu
from kvcalib.report.chart import Axis, Chart
from kvcalib.report.data import CacheLayer, Estimate, Memory, Report, SweepPoint
from kvcalib.report.document import document
from kvcalib.report.sections.summary import perplexity_change
from kvcalib.report.sections.sweep import best
from kvcalib.report.words import many, short, signed, size
from tests.report.examples import full, hostile, measurement

SECTIONS = (
    "summary", "pareto", "comparison", "sweep", "memory", "recall", "bits", "losses", "friendliness", "codebooks",
    "fisher", "outliers", "provenance",
)  # fmt: skip
VOID = {"meta", "link", "br", "input"}


class Outline(HTMLParser):
    """Elements that stand open, all tags seen, and what links and images point to."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.ids = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.links += [given[name] for name in ("href", "src", "action", "srcset", "data") if name in given]
        if "id" in given:
            self.ids.append(given["id"])
        assert not any(name.startswith("on") for name in given)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(text):
    found = Outline()
    found.feed(text)
    assert not found.open
    return found


def charts(text):
    return [ET.fromstring(svg) for svg in re.findall(r'<svg class="chart".*?</svg>', text, re.S)]


def test_every_section_is_there_and_well_formed():
    text = document(full(), "1.2.3")
    found = outline(text)
    assert tuple(i for i in found.ids if not i.startswith("theme")) == SECTIONS
    assert "Not in this report" not in text
    assert "measured 2026-11-23T03:00:00Z" in text
    assert "kvcalib 1.2.3" in text
    assert len(charts(text)) > 20
    for svg in charts(text):
        assert svg.get("aria-label")
        numbers = [float(n) for e in svg.iter() for n in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", e.get("d", ""))]
        assert all(math.isfinite(n) for n in numbers)
        assert "nan" not in ET.tostring(svg, encoding="unicode").lower()


def test_it_points_nowhere_but_into_itself():
    found = outline(document(full(), "0"))
    assert found.links
    assert all(link.startswith("#") or link == "data:," for link in found.links)
    assert {"script", "img", "iframe", "object", "embed", "form"}.isdisjoint(found.tags)
    text = document(full(), "0")
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_hostile_names_come_out_as_text():
    text = document(hostile(), '<script>"1"</script>')
    found = outline(text)  # would not nest if a name were taken for markup
    assert "script" not in found.tags
    assert "<script" not in text
    assert html.escape('<script>alert("x")</script>', quote=False)[:8] in text
    assert tuple(i for i in found.ids if not i.startswith("theme")) == SECTIONS


def test_the_same_numbers_give_the_same_page():
    assert document(full(), "0") == document(full(), "0")


def test_what_is_missing_is_named_with_its_command():
    text = document(Report(model="m", artifact=None), "0")
    found = outline(text)
    assert [i for i in found.ids if not i.startswith("theme")] == ["summary", "missing"]
    missing = re.findall(r"<li><b>(.*?)</b>: <code>(.*?)</code>", text)
    assert len(missing) == len(SECTIONS) - 1
    for _, command in missing:
        assert command.startswith("kvcalib ")


def test_the_summary_says_size_cost_and_context():
    text = html.unescape(document(full(), "0"))
    report = full()
    ours = next(c for c in report.measurements[0].contenders if c.name == "nuq2.5")
    exact, packed = 31 * 4096 + 4096, 31 * 660 + 4096
    assert f"takes {16 * packed / exact:.2f} bits per element in place of 16: {exact / packed:.1f} times" in text
    low, high = (10 * math.exp(d) - 10 for d in (ours.delta_nll.low, ours.delta_nll.high))
    assert f"95 % interval {low:+#.3g} to {high:+#.3g}" in text
    # 24 GiB less a tenth and the weights, over bytes per token, with one layer that stops at 1024 tokens.
    room = 24 * 2**30 * 0.9 - 16.06e9
    before, after = ((room - 4096 * 1024) / (31 * b) for b in (4096, 660))
    assert f"{before / 1000:.3g} k" in text
    assert f"On a 24 GB GPU, {after / 1000:.3g} k tokens of context fit in place of {before / 1000:.3g} k" in text


def test_perplexity_change_follows_the_exponential():
    where = measurement()
    ours = next(c for c in where.contenders if c.ours)
    found = perplexity_change(where, ours)
    assert found.value == pytest.approx(math.exp(where.fp16_nll + ours.delta_nll.value) - math.exp(where.fp16_nll))
    assert found.low == pytest.approx(math.exp(where.fp16_nll + ours.delta_nll.low) - math.exp(where.fp16_nll))


def test_tokens_that_fit_fill_the_memory_and_no_more():
    memory = Memory([CacheLayer(100.0, 20.0), CacheLayer(100.0, 20.0, 500)], 1e9, None)
    for gib in GPUS:
        for packed in (False, True):
            n = tokens_that_fit(memory, gib, packed)
            room = gib * 2**30 * 0.9 - 1e9
            assert cache_bytes(memory.layers, n, packed) <= room < cache_bytes(memory.layers, n + 1, packed)
    assert tokens_that_fit(Memory([CacheLayer(1.0, 1.0)], 1e12), 24, True) == 0
    assert tokens_that_fit(Memory([CacheLayer(100.0, 20.0, 500)], 1e9), 24, True) is None
    assert usual_gpu(Memory([CacheLayer(1.0, 1.0)], 30e9)) == 40
    assert usual_gpu(Memory([CacheLayer(1.0, 1.0)], 800e9)) is None
    assert long_bits(Memory([CacheLayer(32.0, 5.0), CacheLayer(32.0, 7.0)])) == pytest.approx(16 * 12 / 64)


def test_weights_larger_than_any_gpu_leave_the_cache_alone():
    report = Report(**{**full().__dict__, "memory": Memory([CacheLayer(4096.0, 660.0)], 800e9, 4096)})
    text = document(report, "0")
    assert "The weights (800 GB) leave no room on one of these GPUs" in text
    outline(text)


def test_a_comparison_leaves_out_what_nobody_has():
    text = document(full(), "0")
    table = text[text.index('id="comparison"') : text.index('id="sweep"')]
    assert "arc_easy/acc" in table
    assert "peak memory" not in table
    assert "kivi:bits=9 could not be measured: bits is 9, expected 1 to 8" in table
    assert table.count("<tr") == 1 + 41  # header, fp16 and ten methods at four sizes; the failed one has no row
    assert table.count('<tr class="ours"') == 4


def test_points_of_the_pareto_plot_lie_on_its_axes():
    text = document(full(), "0")
    svg = charts(text)[0]
    space = "{http://www.w3.org/2000/svg}"
    ticks = {
        t.text: (float(t.get("x")), float(t.get("y"))) for t in svg.iter(f"{space}text") if t.get("class") == "dim"
    }
    dots = {
        c.find(f"{space}title").text.split(":")[0]: (float(c.get("cx")), float(c.get("cy")))
        for c in svg.iter(f"{space}circle")
        if c.get("class") == "dot first"
    }
    ours = {c.name: c for c in measurement().contenders if c.ours}
    assert set(dots) == set(ours)
    for name, (x, y) in dots.items():
        left, right = ticks["2"][0], ticks["4"][0]
        assert x == pytest.approx(left + (right - left) * (ours[name].bits - 2) / 2, abs=0.2)
        top, bottom = ticks["1e-1"][1] - 4, ticks["1e-3"][1] - 4
        assert y == pytest.approx(top + (bottom - top) * (math.log10(ours[name].kld.value) + 1) / -2, abs=0.2)


def test_a_loss_at_or_below_zero_is_hollow_on_the_edge():
    chart = Chart("c", Axis.over([0, 1], "x"), Axis.over([0.1, 1.0], "y", log=True))
    chart.mark(0.5, -0.1, "first")
    assert chart.py(-0.1) == chart.py(chart.y.marks[0])
    assert 'class="hollow first"' in chart.svg()


def test_labels_keep_clear_of_marks_and_of_one_another():
    chart = Chart("c", Axis.over([0, 1], "x"), Axis.over([0, 1], "y"))
    for k in range(8):
        chart.mark(0.5 + 0.01 * k, 0.5, "first")
    marks = len(chart._boxes)
    named = sum(chart.name(0.5 + 0.01 * k, 0.5, f"label {k}") for k in range(8))
    assert 0 < named < 8
    boxes = chart._boxes
    assert len(boxes) == marks + named
    for i in range(marks, len(boxes)):
        for j in range(i):
            a, b = boxes[i], boxes[j]
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_the_front_of_a_sweep_is_what_no_other_beats():
    points = [
        SweepPoint(str(i), bits, kld, 0.0) for i, (bits, kld) in enumerate([(2, 3), (3, 2), (3, 4), (4, 2), (5, 1)])
    ]
    beaten = {p.name for p in points for q in points if q.bits <= p.bits and q.kld <= p.kld and q is not p}
    assert [p.name for p in best(points)] == [p.name for p in points if p.name not in beaten] == ["0", "1", "4"]


def test_many_layers_heads_and_one_layer_can_be_drawn():
    for layers in (1, 80):
        outline(document(full(layers=layers), "0"))


def test_numbers_in_words():
    assert (size(999), size(1500), size(16.06e9)) == ("999 B", "1.5 kB", "16.1 GB")
    assert (many(512), many(131072), many(1.5e9)) == ("512", "131 k", "1.5 billion")
    assert (short(0.01234), short(1234.5), short(2.5e-4), short(0)) == ("0.0123", "1234", "2.50e-4", "0")
    assert (signed(0.5), signed(-0.5), signed(0), signed(99.99)) == ("+0.500", "-0.500", "0", "+100")
    assert Estimate(1.0).low is None
