"""Plots: well-formed, every point where its numbers say, axes with units, in light and dark."""

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcalib.report.allocation import Layer, allocation_plot
from kvcalib.report.friendliness import LayerPoint, friendliness_plot
from kvcalib.report.svg import Panel, label, log_ticks, page, ticks

NAME = "{http://www.w3.org/2000/svg}"


def circles(svg, kind):
    found = ET.fromstring(svg).iter(f"{NAME}circle")
    # The legend's have the radius 4.
    return [(float(c.get("cx")), float(c.get("cy"))) for c in found if c.get("class") == kind and c.get("r") != "4"]


def positions(svg):
    """Tick labels of the first panel to where they are: `{label: x}` along the bottom, `{label: y}` along the left."""
    texts = [t for t in ET.fromstring(svg).iter(f"{NAME}text") if t.get("class") == "dim"]
    number = [t for t in texts if re.fullmatch(r"[\d.e-]+", t.text)]
    bottom = {float(t.text): float(t.get("x")) for t in number if t.get("text-anchor") == "middle"}
    left = {float(t.text): float(t.get("y")) - 4 for t in number if t.get("text-anchor") == "end"}
    return bottom, left


@pytest.mark.parametrize("log", [False, True])
def test_points_lie_where_the_ticks_say(log):
    panel = Panel("t", "x", "y", log=log)
    panel.add([(1, 0.1), (2, 1), (3, 10)], "first")
    svg = page([panel], "heading", "note")
    bottom, left = positions(svg)
    (x1, y1), (x2, y2), (x3, y3) = circles(svg, "first-dot")
    assert (x1, x2, x3) == pytest.approx((bottom[1], bottom[2], bottom[3]), abs=0.1)
    assert y3 == pytest.approx(left[10], abs=0.2)
    if log:
        assert (y1, y2) == pytest.approx((left[0.1], left[1]), abs=0.2)
        assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    else:
        assert y1 - y2 == pytest.approx((y2 - y3) / 10, abs=0.2)


def test_an_allocation_shows_units_layers_and_the_chosen_point():
    layers = [Layer(0, 2, 3, 1e-4, 2e-4), Layer(1, 2.5, 4, 3e-4, 4e-4)]
    svg = allocation_plot("by kl & <fisher>", "3 bits", layers, [(1.0, 0.1), (2.0, 0.01), (4.0, 0.0)], (2.0, 0.01))
    text = " ".join(t.text for t in ET.fromstring(svg).iter(f"{NAME}text"))
    for shown in ("by kl & <fisher>", "mean code width, bits per element", "nats per token", "layer", "keys", "values"):
        assert shown in text
    assert len(circles(svg, "first-dot")) == len(circles(svg, "second-dot")) == 4
    assert len(circles(svg, "mark-dot")) == 1
    assert "prefers-color-scheme:dark" in svg
    assert "NaN" not in svg


def test_friendliness_shows_what_is_known():
    known = [
        LayerPoint(0, 0.2, 0.1, {2: 0.3, 3: 0.2, 4: 0.1, 8: 0.0}, 1.0, 1.5),
        LayerPoint(1, 0.2, 0.1, {2: 0.3}, 0.5, 0.5),
    ]
    svg = friendliness_plot("of <m>", "3 bit", known)
    text = " ".join(t.text for t in ET.fromstring(svg).iter(f"{NAME}text"))
    for shown in (
        "of <m>",
        "keys",
        "values",
        "2 bit",
        "3 bit",
        "4 bit",
        "alpha",
        "share (mean 1)",
        "mean of |x - x^| / |x|",
    ):
        assert shown in text
    # Errors, missed at 2, 3 and 4 bit, alpha and share: by layer.
    assert [len(circles(svg, f"{kind}-dot")) for kind in ("first", "second", "mark")] == [2 + 2 + 2, 2 + 1 + 2, 1]
    old = friendliness_plot("m", "3 bit", [LayerPoint(0, 0.2, 0.1, {}, None, None)])
    assert "alpha" not in old
    assert "Heavy" not in old
    assert int(ET.fromstring(old).get("width")) < int(ET.fromstring(svg).get("width"))


def test_empty_and_flat_series_can_be_drawn():
    for points in ([], [(0, 0)], [(3, 2), (4, 2)]):
        for log in (False, True):
            panel = Panel("t", "x", "y", log=log)
            panel.add(points, "first")
            ET.fromstring(page([panel], "h", "n"))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.integers(3, 9), st.booleans())
def test_ticks_cover_the_values_and_are_few(values, most, whole):
    found = ticks(values, most, whole)
    spread = max(values) - min(values)
    assert found[0] <= min(values) + 1e-6 * max(1, spread)
    assert found[-1] >= max(values) - 1e-6 * max(1, spread)
    assert 1 < len(found) <= most + 1
    if whole:
        assert all(t == round(t) for t in found)


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=5))
def test_log_ticks_cover_the_values(values):
    found = log_ticks(values)
    assert found[0] <= min(values) * 1.0001
    assert found[-1] >= max(values) * 0.9999
    assert len(found) <= 10


def test_labels_of_one_axis_look_alike():
    assert [label(x, [0, 2e-4, 4e-4]) for x in (0, 2e-4, 4e-4)] == ["0", "2e-4", "4e-4"]
    assert [label(x, [1e-4, 0.1]) for x in (1e-4, 0.1)] == ["1e-4", "1e-1"]
    assert [label(x, [1.5, 2]) for x in (1.5, 2)] == ["1.5", "2"]
    assert label(2.5e-4, [2.5e-4]) == "2.5e-4"
