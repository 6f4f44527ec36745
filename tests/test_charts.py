"""Charts: the drawn data against what was given, the files they become."""

import math
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest

from samfeat.pipelines.pictures.charts import (
    PALETTE,
    LinePlot,
    bar_chart,
    error_chart,
    line_chart,
    line_sheet,
    mma_chart,
    png,
    save_figure,
    smoothed,
    svg,
)


def drawn(figure, plot=0):
    """(steps, values) of the lines of a plot by label."""
    return {line.get_label(): list(zip(*line.get_data())) for line in figure.axes[plot].lines}


def test_lines_hold_what_was_given():
    points = [(0, 0.0), (10, 30.0), (40, 12.5)]
    figure = line_chart(LinePlot("", {"a": points, "b": [(20, 7.0)]}))
    assert drawn(figure) == {"a": points, "b": [(20, 7.0)]}
    assert [line.get_color() for line in figure.axes[0].lines] == list(PALETTE[:2])
    assert figure.axes[0].get_ylim()[0] == 0
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b"]


def test_shares_run_to_a_hundred_percent():
    axes = line_chart(LinePlot("", {"a": [(0, 0.25), (100, 0.75)]}, shares=True)).axes[0]
    assert axes.get_ylim() == (0, 1)
    assert axes.yaxis.get_major_formatter()(0.25) == "25%"


def test_what_cannot_be_drawn_is_left_out():
    assert LinePlot("", {}).drawable() == LinePlot("", {"a": []}).drawable() == {}
    assert LinePlot("", {"a": [(1, 0.0), (2, math.inf)]}, logarithmic=True).drawable() == {}
    some = LinePlot("", {"a": [(1, math.nan), (2, 5.0)], "b": [(1, math.inf)]})
    assert drawn(line_chart(some)) == {"a": [(2, 5.0)]}
    axes = line_chart(LinePlot("", {"a": [(1, 0.5), (2, 20.0)]}, logarithmic=True)).axes[0]
    assert axes.get_yscale() == "log"


def test_running_means():
    points = [(step, float(step**2)) for step in range(40)]
    means = smoothed(points)  # over windows of 6 points
    assert means[0] == (2, pytest.approx(np.mean([k**2 for k in range(6)])))
    assert len(means) == 35
    assert smoothed(points[:5]) == points[:5]
    mean, single = line_chart(LinePlot("", {"a": points}, running_mean=True)).axes[0].lines
    assert list(zip(*mean.get_data())) == means
    assert list(zip(*single.get_data())) == points


def test_a_figure_is_written_for_documents_and_for_pages(tmp_path):
    figure = line_chart(LinePlot("", {"a": [(0, 1.0), (5, 2.0)]}))
    save_figure(tmp_path / "new" / "loss", figure)
    assert cv2.imread(str(tmp_path / "new" / "loss.png")).shape[1] > 500
    source = (tmp_path / "new" / "loss.svg").read_bytes()
    assert source == svg(figure)  # no date, no random names
    root = ET.fromstring(source)
    assert root.tag.endswith("svg")
    backgrounds = [part for part in root.iter() if part.get("id") in ("patch_1", "patch_2")]
    styles = [path.get("style") for part in backgrounds for path in part]
    assert styles
    assert all("fill: none" in style or "opacity: 0" in style for style in styles)


def test_accuracies_have_one_plot_a_subset():
    curves = {"one": {"all": [0.1] * 10, "viewpoint": [0.2] * 10}, "two": {"all": [0.3] * 10}}
    figure = mma_chart(curves)
    assert [axes.get_title() for axes in figure.axes] == ["All", "Viewpoint"]
    assert set(drawn(figure)) == {"one", "two"}
    assert set(drawn(figure, 1)) == {"one"}
    picture = cv2.imdecode(np.frombuffer(png(figure), np.uint8), cv2.IMREAD_COLOR)
    assert (
        np.abs(picture[..., ::-1].astype(int) - [int(PALETTE[1][i : i + 2], 16) for i in (1, 3, 5)]).sum(-1).min() < 10
    )


def test_recall_rises_at_every_error():
    figure = error_chart({"m": [1.0, 3.0, math.inf]}, {"m": [0.2, 0.4]}, thresholds=(2, 4), xlabel="px")
    assert drawn(figure)["m"] == [(0, 0), (1, 1 / 3), (3, 2 / 3), (4, 2 / 3)]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [0.2, 0.4]


def test_quantities_that_nobody_has_get_no_plot():
    figure = bar_chart({"points": {"a": {"m": 3.0, "n": None}}, "dense": {"a": {"m": None, "n": None}}})
    assert [axes.get_title() for axes in figure.axes] == ["points"]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [3.0, 0.0]
    assert bar_chart({}).axes == []


def test_a_sheet_has_a_title_for_every_plot_even_an_empty_one():
    figure = line_sheet([LinePlot("accuracy", {"a": [(0, 0.5)]}, shares=True), LinePlot("loss", {}, logarithmic=True)])
    assert [axes.get_title() for axes in figure.axes] == ["accuracy", "loss"]
    assert png(figure)
