"""The front against every pair of points compared, and what the plot shows."""

import math
import random
import xml.etree.ElementTree as ET

import pytest

from kvcalib.report.pareto import Point, front, pareto_plot


def dominated(point, others):
    """Straight from the definition, pair by pair."""
    return any(
        o.bits <= point.bits and o.loss <= point.loss and (o.bits < point.bits or o.loss < point.loss) for o in others
    )


@pytest.mark.parametrize("seed", range(40))
def test_front_is_what_no_pair_dominates(seed):
    draw = random.Random(seed)
    # Few distinct numbers, so that ties and equal points are common.
    points = [
        Point(str(i), draw.randint(1, 8) / 2, draw.randint(0, 6) / 10, draw.random() < 0.5)
        for i in range(draw.randint(0, 30))
    ]
    found = front(points)
    assert {p.name for p in found} == {p.name for p in points if not dominated(p, points)}
    assert [p.bits for p in found] == sorted(p.bits for p in found)


def test_points_without_a_figure_are_left_out():
    found = front([Point("a", 2, math.nan), Point("b", math.inf, 0), Point("c", 3, 0.5)])
    assert [p.name for p in found] == ["c"]


def circles(svg, kind):
    return [e for e in ET.fromstring(svg).iter() if e.tag.endswith("circle") and e.get("class") == f"{kind}-dot"]


def test_plot_has_a_dot_per_point_and_a_line_through_the_front():
    points = [
        Point("a", 2, 0.3), Point("b", 3, 0.1), Point("c", 3.5, 0.2), Point("d", 4.5, 0.05, False),
        Point("zero", 16, 0.0, False),
    ]  # fmt: skip
    svg = pareto_plot("a < b", "note", points, "KLD, nats per token")
    # One more of each kind in the legend; a loss of 0 has no place on a logarithmic axis.
    assert (len(circles(svg, "first")), len(circles(svg, "second"))) == (3 + 1, 1 + 1)
    (line,) = [
        e for e in ET.fromstring(svg).iter() if e.tag.endswith("path") and e.get("class") == "mark" and e.get("d")
    ]
    assert line.get("d").count("L") == 2  # a, b, d
    said = [e.text for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]
    assert {"a", "b", "d"} < set(said)
    assert "c" not in said
    linear = pareto_plot("h", "n", points, "rise of NLL", log=False)
    assert len(circles(linear, "second")) == 2 + 1
