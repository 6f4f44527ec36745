"""Charts are read back as XML: places of lines against the chart's own labelled ticks, values under the pointer."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from samfeat.pipelines.pictures.chart import BOTTOM, COLUMNS, PALETTE, line_chart, smoothed
from samfeat.pipelines.pictures.page import STYLE


class Read:
    """A chart, read back."""

    def __init__(self, markup: str) -> None:
        self.svg = ET.fromstring(re.search(r"<svg.*</svg>", markup, re.DOTALL)[0])
        self.lines = [
            np.array([[float(v) for v in place.split(",")] for place in line.get("points").split()])
            for line in self.svg.iter("polyline")
        ]
        labels = [(float(t.get("x")), float(t.get("y")), t.text) for t in self.svg.findall("text")]
        self.x_ticks = {float(text): x for x, y, text in labels if y == BOTTOM + 16}
        self.y_ticks = {
            float(text.rstrip(" %")) / (100 if "%" in text else 1): y - 4 for x, y, text in labels if y != BOTTOM + 16
        }
        self.readouts = ["|".join(t.text for t in g.iter("tspan")) for g in self.svg.iter("g") if g.get("visibility")]

    def values(self, line: int, scale=lambda value: value) -> np.ndarray:
        """(step, value) of a line's points, by the two outermost labels of each axis."""
        (x0, px0), *_, (x1, px1) = self.x_ticks.items()
        (y0, py0), *_, (y1, py1) = self.y_ticks.items()
        x, y = self.lines[line].T
        steps = x0 + (x - px0) / (px1 - px0) * (x1 - x0)
        return np.stack([steps, scale(y0) + (y - py0) / (py1 - py0) * (scale(y1) - scale(y0))], axis=1)


def test_lines_lie_where_the_axes_say():
    points = [(0, 0.0), (10, 30.0), (40, 12.5)]
    chart = Read(line_chart("speed", {"a": points, "b": [(20, 7.0)]}))
    np.testing.assert_allclose(chart.values(0), points, atol=0.2)
    assert [line.get("stroke") for line in chart.svg.iter("polyline")] == list(PALETTE[:2])
    assert len(list(chart.svg.iter("circle"))) == 4


def test_shares_run_to_a_hundred_percent():
    chart = Read(line_chart("share", {"a": [(0, 0.25), (100, 0.75)]}, shares=True))
    assert list(chart.y_ticks) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    np.testing.assert_allclose(chart.values(0)[:, 1], [0.25, 0.75], atol=1e-3)


@pytest.mark.parametrize("values", [(20.0, 0.002, 3.0), (1.5, 1.2, 1.9), (7.0, 7.0, 7.0)])
def test_logarithmic_axis(values):
    chart = Read(line_chart("loss", {"a": list(enumerate(values))}, logarithmic=True))
    assert len(chart.y_ticks) >= 2
    np.testing.assert_allclose(10 ** chart.values(0, math.log10)[:, 1], values, rtol=0.02)


def test_the_values_under_the_pointer():
    chart = Read(line_chart("loss", {"a<b": [(1, 0.5), (2, 0.25)], "c": [(2, 3.0)]}))
    assert chart.readouts == ["step 1|a<b 0.5", "step 2|a<b 0.25|c 3"]
    assert ".column:hover .values { visibility: visible; }" in STYLE


def test_long_lines_are_averaged():
    steps = np.arange(1, 8 * COLUMNS + 1)
    values = np.random.default_rng(0).random(len(steps))
    chart = Read(line_chart("loss", {"a": list(zip(steps.tolist(), values.tolist()))}))
    assert len(chart.readouts) == len(chart.lines[0]) == COLUMNS
    assert chart.readouts[1] == f"step 9 to 16|a {values[8:16].mean():.4g}"
    np.testing.assert_allclose(chart.values(0)[:, 1], values.reshape(-1, 8).mean(axis=1), atol=3e-3)


def test_what_cannot_be_drawn_is_left_out():
    assert line_chart("loss", {}) == line_chart("loss", {"a": []}) == ""
    assert line_chart("loss", {"a": [(1, 0.0), (2, math.inf)]}, logarithmic=True) == ""
    chart = Read(line_chart("loss", {"a": [(1, math.nan), (2, 5.0)], "b": [(1, math.inf)]}))
    assert chart.readouts == ["step 2|a 5"]
    assert Read(line_chart("rate", {"a": [(0, 0.0)]})).readouts == ["step 0|a 0"]


def test_running_means():
    points = [(step, float(step**2)) for step in range(40)]
    means = smoothed(points)  # over windows of 6 points
    assert means[0] == (2, pytest.approx(np.mean([k**2 for k in range(6)])))
    assert len(means) == 35
    assert smoothed(points[:5]) == points[:5]
    assert len(Read(line_chart("loss", {"a": points}, running_mean=True)).lines) == 2
