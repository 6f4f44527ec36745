"""Line and bar charts by matplotlib: PNG for documents, SVG for pages. Colours are Okabe and Ito's palette, which is
safe for colour-blind readers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from samfeat.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#777777")
SMOOTHING = 0.15  # of a line, the window of the running mean
MARKED = 40  # shorter lines show every point


def svg(figure: Figure) -> bytes:
    """A figure as an SVG file without a background; reproducible byte for byte."""
    from matplotlib import rc_context

    data = io.BytesIO()
    with rc_context({"svg.hashsalt": "samfeat"}):
        figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    return data.getvalue()


def png(figure: Figure) -> bytes:
    """A figure as a PNG file on a white background."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


def save_figure(stem: str | Path, figure: Figure) -> None:
    """Write ``<stem>.png`` and ``<stem>.svg``."""
    write_bytes(f"{stem}.png", png(figure))
    write_bytes(f"{stem}.svg", svg(figure))


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Running means over a window of ``SMOOTHING`` of all points, since single batches are noisy."""
    width = max(1, round(SMOOTHING * len(points)))
    if width == 1:
        return list(points)
    means = np.convolve([value for _, value in points], np.ones(width) / width, mode="valid")
    steps = [step for step, _ in points[(width - 1) // 2 :]]
    return [(step, float(mean)) for step, mean in zip(steps, means)]


class LinePlot(NamedTuple):
    """Values over training steps.

    Attributes:
        title: what the values are.
        lines: points (step, value) by name, in ascending order; values that cannot be drawn are left out.
        logarithmic: logarithmic value axis; otherwise it starts at 0.
        shares: values are shares, on an axis from 0 to 100 %.
        running_mean: draw :func:`smoothed` values over faint ones.
    """

    title: str
    lines: Mapping[str, Points]
    logarithmic: bool = False
    shares: bool = False
    running_mean: bool = False

    def drawable(self) -> dict[str, list[tuple[float, float]]]:
        """The lines without values that cannot be drawn, and without empty lines."""
        least = 0.0 if self.logarithmic else -math.inf
        finite = {
            name: [(step, value) for step, value in points if math.isfinite(value) and value > least]
            for name, points in self.lines.items()
        }
        return {name: points for name, points in finite.items() if points}


def line_chart(plot: LinePlot) -> Figure:
    """A single plot without a title."""
    figure, (axes,) = _plots(1, 1, (4.5, 2.9))
    _draw_lines(axes, plot)
    return figure


def line_sheet(plots: Sequence[LinePlot]) -> Figure:
    """Plots side by side, each with its title."""
    figure, sheet = _plots(1, len(plots), (5.5 * len(plots), 4.2))
    for axes, plot in zip(sheet, plots):
        axes.set_title(plot.title)
        _draw_lines(axes, plot)
    return figure


def _draw_lines(axes: Axes, plot: LinePlot) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    lines = plot.drawable()
    for name, points in lines.items():
        mean = smoothed(points) if plot.running_mean else points
        (line,) = axes.plot(*zip(*mean), linewidth=1.8, label=name)
        if plot.running_mean:
            axes.plot(*zip(*points), linewidth=0.7, alpha=0.5, color=line.get_color())
        elif len(points) < MARKED:
            line.set(marker="o", markersize=3.5)
    last = max((step for points in lines.values() for step, _ in points), default=0)
    axes.set(xlabel="step", xlim=(0, 1.02 * max(1, last)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if plot.logarithmic and lines:
        axes.set_yscale("log")
    elif plot.shares:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        axes.set_ylim(bottom=min([0.0, *(value for points in lines.values() for _, value in points)]))
    if len(lines) > 1:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            borderaxespad=4.5,  # below the label of the axis
            ncols=min(4, len(lines)),
            frameon=False,
            fontsize=8,
            columnspacing=1,
            handlelength=1,
        )


def mma_chart(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Mean matching accuracy over the threshold: one plot per subset, one line per method.

    Args:
        curves: accuracies in [0, 1] at 1, 2, ... pixels, by method and then by subset, such as
            ``{"sift": {"all": [...], "viewpoint": [...]}}``.
    """
    subsets = list(dict.fromkeys(subset for values in curves.values() for subset in values))
    figure, plots = _plots(1, len(subsets), (1.2 + 3.6 * len(subsets), 4.2), sharey=True)
    for axes, subset in zip(plots, subsets):
        for number, (method, values) in enumerate(curves.items()):
            if subset in values:
                places = range(1, len(values[subset]) + 1)
                axes.plot(places, values[subset], marker="o", markersize=3, label=method, color=_color(number))
        axes.set(title=subset.capitalize(), xlabel="Threshold [px]", ylim=(0, 1), xticks=range(1, 11))
    plots[0].set_ylabel("MMA")
    plots[0].legend(loc="lower right")
    return figure


def error_chart(
    errors: Mapping[str, Sequence[float]],
    areas: Mapping[str, Sequence[float]],
    *,
    thresholds: Sequence[float],
    xlabel: str,
) -> Figure:
    """Share of pairs whose error is below a limit, over the limit; and the area under that curve, as bars.

    Args:
        errors: by method, one error per pair; infinity for a failure.
        areas: by method, the area up to each threshold, in [0, 1].
        thresholds: ascending; the curve ends at the last one.
        xlabel: label of the error, with its unit.
    """
    figure, (curve, bars) = _plots(1, 2, (10, 4.2), sharey=True, width_ratios=(3, 2))
    width = 0.8 / max(1, len(errors))
    for place, (method, values) in enumerate(errors.items()):
        inside = sorted(value for value in values if value <= thresholds[-1])
        share = np.arange(len(inside) + 1) / len(values)
        steps = [0, *inside, thresholds[-1]]
        curve.step(steps, [*share, share[-1]], where="post", label=method, color=_color(place))
        offset = (place - (len(errors) - 1) / 2) * width
        bars.bar(np.arange(len(thresholds)) + offset, areas[method], width, color=_color(place))
    curve.set(xlabel=xlabel, ylabel="Share of pairs", xlim=(0, thresholds[-1]), ylim=(0, 1))
    bars.set(title="Area under the curve", xticks=range(len(thresholds)), xticklabels=[f"@{t:g}" for t in thresholds])
    curve.legend(loc="lower right")
    return figure


def precision_recall_chart(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], tuple[float, float, float]]],
) -> Figure:
    """Precision-recall curves, one per method with its best F marked, over lines of equal F.

    Args:
        curves: by method, recalls, precisions, and the best point: precision, recall, F.
    """
    figure, (axes,) = _plots(1, 1, (5.6, 5.2))
    for f in np.arange(0.1, 1, 0.1):
        recall = np.linspace(f / (2 - f) + 1e-9, 1, 100)
        axes.plot(recall, f * recall / (2 * recall - f), color="0.7", linewidth=0.8, zorder=0)
        axes.text(1.01, f / (2 - f), f"{f:.1f}", color="0.5", fontsize=8, va="center")
    for number, (method, (recalls, precisions, best)) in enumerate(curves.items()):
        axes.plot(recalls, precisions, label=f"{method}, F {best[2]:.2f}", color=_color(number))
        axes.plot(best[1], best[0], "o", color=_color(number))
    axes.set(xlabel="Recall", ylabel="Precision", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="lower left")
    return figure


def bar_chart(panels: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> Figure:
    """Bar charts: one plot per quantity, one group per scene, one bar per method.

    Args:
        panels: values by quantity, scene and method; None has no bar; a quantity without values has no plot.
    """

    def known(scenes: Mapping[str, Mapping[str, float | None]]) -> bool:
        return any(value is not None for values in scenes.values() for value in values.values())

    shown = {title: scenes for title, scenes in panels.items() if known(scenes)}
    methods = list(dict.fromkeys(m for scenes in shown.values() for values in scenes.values() for m in values))
    columns = max(1, min(3, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure, plots = _plots(rows, columns, (1 + 4.2 * columns, 0.6 + 2.9 * rows))
    for axes, (title, scenes) in zip(plots, shown.items()):
        width = 0.8 / len(methods)
        for number, method in enumerate(methods):
            places = [k + (number - (len(methods) - 1) / 2) * width for k in range(len(scenes))]
            heights = [values.get(method) or 0.0 for values in scenes.values()]
            axes.bar(places, heights, width, label=method, color=_color(number))
        axes.set(title=title, xticks=range(len(scenes)), xticklabels=list(scenes))
        axes.tick_params(axis="x", labelsize=8)
    for axes in plots[len(shown) :]:
        axes.remove()
    if shown:
        figure.legend(*plots[0].get_legend_handles_labels(), loc="outside upper center", ncols=8, fontsize=9)
    return figure


def _plots(
    rows: int,
    columns: int,
    size: tuple[float, float],
    *,
    sharey: bool = False,
    width_ratios: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """A sheet of plots, with a grid in each and the colours of ``PALETTE``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False, sharey=sharey, width_ratios=width_ratios).ravel().tolist()
    for axes in plots:
        axes.set_prop_cycle(color=PALETTE)
        axes.grid(alpha=0.35)
    return figure, plots


def _color(number: int) -> str:
    """Colour of a method, the same in every plot; matplotlib's cycle follows the palette."""
    return PALETTE[number] if number < len(PALETTE) else f"C{number}"
