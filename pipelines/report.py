"""A picture of a training run: its loss terms, and its matching accuracy on held-out views."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samfeat.pipelines.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curves(folder: str | Path) -> Path:
    """Draw ``metrics.jsonl`` of a run folder into ``curves.png``.

    Lines of the file that are cut off (a run killed while writing) are left out.
    """
    from matplotlib.figure import Figure

    folder = Path(folder)
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sorted({name for row in rows for name in row if name.startswith("loss/")})
    for name in names:
        _plot(left, rows, name, name.removeprefix("loss/"), linewidth=2.5 if name == "loss/total" else 1.3)
    left.set(title="loss terms", xlabel="step", ylabel="loss", yscale="log")
    for threshold in (1, 3, 5):
        _plot(right, rows, f"validation/mma@{threshold}", f"within {threshold} px", marker="o", markersize=4)
    right.set(title="mean matching accuracy on held-out views", xlabel="step", ylabel="share of matches", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return write_bytes(folder / "curves.png", buffer.getvalue())


def _plot(axes: Axes, rows: list[dict[str, float]], name: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
