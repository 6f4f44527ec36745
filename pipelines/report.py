"""A picture of a training run: its loss terms, and its matching accuracy on held-out views."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samfeat.pipelines.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.15  # of the run, the window of the running mean


def forget_after(path: Path, step: int) -> None:
    """Leave out what a ``metrics.jsonl`` says of steps after ``step``, and a line that was cut off."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in _rows(path) if row["step"] <= step]
        write_bytes(path, "".join(kept).encode())


def draw_curves(folder: str | Path) -> Path:
    """Draw ``metrics.jsonl`` of a run folder into ``curves.png``.

    Lines of the file that are cut off (a run killed while writing) are left out.
    """
    from matplotlib.figure import Figure

    folder = Path(folder)
    rows = _rows(folder / "metrics.jsonl")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sorted({name for row in rows for name in row if name.startswith("loss/")})
    for number, name in enumerate(names):
        color = f"C{number}"
        _plot(left, rows, name, "", color=color, linewidth=0.7, alpha=0.35)
        _plot(left, _smoothed(rows, name), name, name.removeprefix("loss/"), color=color, linewidth=2)
    left.set(title="loss terms", xlabel="step", ylabel="loss", yscale="log")
    for threshold in (1, 3, 5):
        _plot(right, rows, f"validation/mma@{threshold}", f"within {threshold} px", marker="o", markersize=4)
    right.set(title="mean matching accuracy on held-out views", xlabel="step", ylabel="share of matches", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if names:
        left.legend(
            loc="upper left", bbox_to_anchor=(0, -0.12), ncols=6, frameon=False, columnspacing=1, handlelength=1
        )
    if right.has_data():
        right.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=140)
    return write_bytes(folder / "curves.png", buffer.getvalue())


def _rows(path: Path) -> list[dict[str, float]]:
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _smoothed(rows: list[dict[str, float]], name: str) -> list[dict[str, float]]:
    """Running means over ``SMOOTHING`` of all logged values: single batches differ more than learning changes."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    width = max(1, round(SMOOTHING * len(points)))
    means = np.convolve([value for _, value in points], np.ones(width) / width, mode="valid")
    steps = [step for step, _ in points[(width - 1) // 2 :]]
    return [{"step": step, name: mean} for step, mean in zip(steps, means)]


def _plot(axes: Axes, rows: list[dict[str, float]], name: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
