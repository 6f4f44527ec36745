"""Line charts for pages: inline SVG, which tells the values under the pointer by the page's style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from samfeat.pipelines.pictures.page import text

if TYPE_CHECKING:
    from matplotlib.ticker import Locator

Points = Sequence[tuple[float, float]]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, for all eyes
SMOOTHING = 0.15  # of a line, the window of the running mean
INK, GRID = "#555", "#e6e6e6"
COLUMNS = 150  # places along the steps; more points than that are averaged
MARKED = 40  # a line of fewer points shows each of them
WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 420, 10, 214  # of the plot, in the units of WIDTH and HEIGHT


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Running means over ``SMOOTHING`` of all points: single batches differ more than learning changes."""
    width = max(1, round(SMOOTHING * len(points)))
    if width == 1:
        return list(points)
    means = np.convolve([value for _, value in points], np.ones(width) / width, mode="valid")
    steps = [step for step, _ in points[(width - 1) // 2 :]]
    return [(step, float(mean)) for step, mean in zip(steps, means)]


def line_chart(
    title: str,
    lines: Mapping[str, Points],
    *,
    logarithmic: bool = False,
    shares: bool = False,
    running_mean: bool = False,
) -> str:
    """A chart of values over steps as a ``<figure>``; an empty string where there is nothing to draw.

    Args:
        title: what the values are.
        lines: points (step, value) by name, steps ascending; values that cannot be drawn are left out.
        logarithmic: whether the axis of the values is; else it starts at 0.
        shares: the values are shares, and the axis runs from 0 to 100 %.
        running_mean: draw :func:`smoothed` values over faint ones.
    """
    least = 0.0 if logarithmic else -math.inf
    drawn = {name: [(s, v) for s, v in points if math.isfinite(v) and v > least] for name, points in lines.items()}
    lines = {name: points for name, points in drawn.items() if points}
    if not lines:
        return ""
    lines, columns = _averaged(lines)
    values = [value for points in lines.values() for _, value in points]
    x = _Axis(0, max(columns[-1].last, 1), LEFT, RIGHT)
    y = _value_axis(min(values), max(values), logarithmic=logarithmic, shares=shares)
    colors = dict(zip(lines, (PALETTE[k % len(PALETTE)] for k in range(len(lines)))))
    label = _percent if shares else _number

    parts = [_grid(x, y, label)]
    for name, points in lines.items():
        if running_mean:
            parts.append(_path(points, x, y, f'stroke="{colors[name]}" opacity=".3"'))
        parts.append(_path(smoothed(points) if running_mean else points, x, y, f'stroke="{colors[name]}"', width=2))
        if len(points) < MARKED and not running_mean:
            circles = (f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"/>' for step, value in points)
            parts.append(f'<g fill="{colors[name]}">{"".join(circles)}</g>')
    parts += _readouts(lines, columns, x, colors, label)
    legend = " ".join(f'<span style="color:{colors[name]}">&#9644; {text(name)}</span>' for name in lines)
    frame = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}"'
    svg = f'<svg {frame} font-family="sans-serif" font-size="11" fill="{INK}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption><b>{text(title)}</b> {legend}</figcaption>{svg}</figure>'


class _Column(NamedTuple):
    """Steps that share a place along the axis: that of the last one."""

    first: float
    last: float


class _Axis(NamedTuple):
    """Values to places in the drawing."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, *, whole: bool = False) -> list[float]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        locators: list[Locator] = [MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole)]
        if self.logarithmic:
            locators = [LogLocator(), LogLocator(subs=(1, 2, 5)), *locators]
        found: list[float] = []
        for locator in locators:
            found = [float(t) for t in locator.tick_values(self.low, self.high) if self.low <= t <= self.high]
            if len(found) >= 3:
                break
        return found


def _averaged(lines: Mapping[str, Points]) -> tuple[dict[str, list[tuple[float, float]]], list[_Column]]:
    """The lines with at most ``COLUMNS`` points, means over neighbouring steps, and the steps of each place."""
    steps = sorted({step for points in lines.values() for step, _ in points})
    parts = np.array_split(np.array(steps), min(COLUMNS, len(steps)))
    columns = [_Column(part[0].item(), part[-1].item()) for part in parts]
    means: dict[str, list[tuple[float, float]]] = {}
    for name, points in lines.items():
        places = np.searchsorted([column.last for column in columns], [step for step, _ in points])
        sums = np.bincount(places, [value for _, value in points], len(columns))
        counts = np.bincount(places, minlength=len(columns))
        means[name] = [(columns[k].last, float(sums[k] / counts[k])) for k in np.flatnonzero(counts)]
    return means, columns


def _value_axis(low: float, high: float, *, logarithmic: bool, shares: bool) -> _Axis:
    if shares:
        return _Axis(0, 1, BOTTOM, TOP)
    if logarithmic:
        margin = max((high / low) ** 0.05, 1.1)
        return _Axis(low / margin, high * margin, BOTTOM, TOP, logarithmic=True)
    return _Axis(min(0, low), 1.05 * high if high > 0 else 1, BOTTOM, TOP)


def _grid(x: _Axis, y: _Axis, label: Callable[[float], str]) -> str:
    down, across = x.ticks(whole=True), y.ticks()
    lines = "".join(f"M{x(tick):.1f} {TOP}V{BOTTOM}" for tick in down)
    lines += "".join(f"M{LEFT} {y(tick):.1f}H{RIGHT}" for tick in across)
    words = "".join(
        f'<text x="{x(tick):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{tick:.0f}</text>' for tick in down
    )
    words += "".join(
        f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{label(tick)}</text>' for tick in across
    )
    return f'<path d="{lines}" stroke="{GRID}"/>{words}'


def _path(points: Points, x: _Axis, y: _Axis, style: str, *, width: float = 1) -> str:
    places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    return f'<polyline points="{places}" fill="none" stroke-width="{width}" {style}/>'


def _readouts(
    lines: Mapping[str, Points],
    columns: Sequence[_Column],
    x: _Axis,
    colors: Mapping[str, str],
    label: Callable[[float], str],
) -> list[str]:
    """For every column a strip that shows its values while the pointer is on it."""
    values = {name: dict(points) for name, points in lines.items()}
    places = [x(column.last) for column in columns]
    borders = [LEFT, *((a + b) / 2 for a, b in itertools.pairwise(places)), RIGHT]
    strips = []
    for column, place, (start, end) in zip(columns, places, itertools.pairwise(borders)):
        inner, anchor = (place + 8, "start") if place < (LEFT + RIGHT) / 2 else (place - 8, "end")
        first, last = (f"{step:.0f}" for step in column)
        spans = [f'<tspan x="{inner:.1f}">step {last if first == last else f"{first} to {last}"}</tspan>']
        for name, at in values.items():
            if column.last in at:
                line = f"{text(name)} {label(at[column.last])}"
                spans.append(f'<tspan x="{inner:.1f}" dy="14" fill="{colors[name]}">{line}</tspan>')
        strips.append(
            f'<g class="column"><path d="M{start:.1f} {TOP}H{end:.1f}V{BOTTOM}H{start:.1f}Z" fill="none"/>'
            f'<g class="values" visibility="hidden"><path d="M{place:.1f} {TOP}V{BOTTOM}" stroke="{INK}"/>'
            f'<text y="{TOP + 14}" text-anchor="{anchor}">{"".join(spans)}</text></g></g>'
        )
    return strips


def _number(value: float) -> str:
    return f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
