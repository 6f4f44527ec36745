"""What a training run shows of itself: ``report.html``, ``curves.png`` and pictures in TensorBoard.

The page says how the losses, the speed and the accuracy go, draws a few validation pairs as the student sees them now,
and tells where everything came from: configuration, teacher, versions.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np

from samfeat.pipelines.config import Config, changes
from samfeat.pipelines.files import write_bytes
from samfeat.pipelines.pictures.chart import Points, line_chart, smoothed
from samfeat.pipelines.pictures.draw import (
    GREEN,
    RED,
    WORST,
    YELLOW,
    color_map,
    draw_errors,
    enlarged,
    enlargement,
    jpeg,
    panel,
    thumbnail,
)
from samfeat.pipelines.pictures.page import figure, page, row, table, text
from samfeat.pipelines.training.validation import THRESHOLDS, View
from samfeat.teacher_cache.schema import flatten
from samfeat.teacher_cache.store import TeacherCache

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.utils.tensorboard import SummaryWriter

DRAWN = 150  # matches of a small picture
MAP_SIDE, PAIR_SIDE = 400, 1000  # pixels, the most that a picture of the page has
SCALE = f'<span class="scale" style="background:linear-gradient(90deg,rgb{GREEN},rgb{YELLOW},rgb{RED})"></span>'
LEGEND = (
    "<p>On the left an image held out of training (a training image where there are too few), on the right the same "
    "one through a homography, with light and noise changes. Matches are mutual nearest neighbours, coloured by their "
    f"distance from where the homography has them: 0 px {SCALE} {WORST:.0f} px and more. The heat-map, a probability, "
    "and the teacher's edges are drawn on a scale from 0 to 1, attention and the student's edges from their least to "
    "their largest value.</p>"
)

Row = dict[str, float]


class RunReport:
    """The pictures of one training run.

    Args:
        folder: of the run; ``metrics.jsonl`` in it is what the curves are drawn from.
        stores: what the run is trained on.
        config: of the run.
        versions: of the packages that train it.

    Raises:
        ValueError: the configuration's preset is a file that is no longer there.
    """

    def __init__(
        self, folder: Path, stores: Sequence[TeacherCache], config: Config, *, versions: Mapping[str, str]
    ) -> None:
        self.folder = folder
        teachers = dict.fromkeys(store.provenance.teacher["name"] for store in stores)
        self._taught_by = ", ".join(teachers)
        self._origins = _configuration(config) + _stores(stores) + _versions(stores, versions)

    def write(self, step: int, steps: int, views: Sequence[View], writer: SummaryWriter | None = None) -> Path:
        """Draw everything anew.

        Args:
            step: that the run has come to.
            steps: that the run has in all.
            views: the pairs of the latest validation.
            writer: takes the pictures of the pairs for TensorBoard.

        Returns:
            the path of ``report.html``.
        """
        rows = read_metrics(self.folder / "metrics.jsonl")
        draw_curves(self.folder / "curves.png", rows)
        pairs = []
        for number, view in enumerate(views):
            matches, *maps = tiles(view)
            if writer:
                _show(writer, f"validation/pair {number}", panel([[matches], maps]), step)
            small = [figure(title, thumbnail(picture, MAP_SIDE)) for title, picture in maps]
            large = figure(matches[0], thumbnail(matches[1], PAIR_SIDE), wide=True)
            pairs.append(f"<h3>{text(view.name)}</h3>{row(large)}{row(*small)}")
        body = (
            f"<p>{text(_state(rows, step, steps))}<br>Teacher: {text(self._taught_by)}</p>"
            f"<h2>Curves</h2>{row(*_charts(rows))}"
            f"<h2>Validation pairs</h2>{LEGEND}{''.join(pairs)}{self._origins}"
        )
        return write_bytes(self.folder / "report.html", page(f"Training run {self.folder.name}", body))


def tiles(view: View) -> list[tuple[str, np.ndarray]]:
    """Titled pictures of a validation pair, uint8 [.., .., 3]: matches, image, heat-map, attention, both edge maps.

    Of many matches ``DRAWN`` are drawn (see :func:`samfeat.pipelines.pictures.draw.draw_errors`).
    """
    factor = enlargement(view.left)
    points0, points1 = (view.points + 0.5) * factor - 0.5
    left, right = (enlarged(image, factor) for image in (view.left, view.right))
    size = (left.shape[1], left.shape[0])
    matches = draw_errors(left, right, points0, points1, view.errors, most=DRAWN)
    count = len(view.errors)
    good = "".join(f", {(view.errors <= t).mean():.0%} within {t} px" for t in THRESHOLDS) if count else ""
    cached = view.cached_edges / 255
    maps = {
        "heat-map": (view.heatmap, color_map(view.heatmap, low=0, high=1)),
        "attention": (view.attention, color_map(view.attention, "viridis")),
        "edges, student": (view.edges, color_map(view.edges, "gray")),
        f"edges, teacher {view.teacher}": (cached, color_map(cached, "gray", low=0, high=1)),
    }
    return [
        (f"{count} matches{good}; {min(count, DRAWN)} drawn", matches),
        ("image", left),
        *(
            (f"{title}: {v.min():.2f} to {v.max():.2f}", cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST))
            for title, (v, picture) in maps.items()
        ),
    ]


def draw_curves(path: Path, rows: Sequence[Row]) -> Path:
    """Loss terms and matching accuracy as a picture, for where no browser is."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = sheet.subplots(1, 2)
    names = _terms(rows)
    for number, name in enumerate(names):
        color, points = f"C{number}", series(rows, f"loss/{name}")
        _plot(left, points, "", color=color, linewidth=0.7, alpha=0.35)
        _plot(left, smoothed(points), name, color=color, linewidth=2)
    left.set(title="loss terms", xlabel="step", ylabel="loss", yscale="log")
    for threshold in THRESHOLDS:
        points = series(rows, f"validation/mma@{threshold}")
        _plot(right, points, f"within {threshold} px", marker="o", markersize=4)
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
    sheet.savefig(buffer, dpi=140)
    return write_bytes(path, buffer.getvalue())


def read_metrics(path: Path) -> list[Row]:
    """The rows of a ``metrics.jsonl``, each with its ``step``; lines that were cut off are left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def forget_after(path: Path, step: int) -> None:
    """Leave out what a ``metrics.jsonl`` says of steps after ``step``, and a line that was cut off."""
    if path.exists():
        kept = [json.dumps(entry) + "\n" for entry in read_metrics(path) if entry["step"] <= step]
        write_bytes(path, "".join(kept).encode())


def series(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """(step, value) of one finite figure, wherever the rows have it."""
    return [(entry["step"], entry[name]) for entry in rows if math.isfinite(entry.get(name, math.nan))]


def _show(writer: SummaryWriter, tag: str, picture: np.ndarray, step: int) -> None:
    """As ``SummaryWriter.add_image``, which would take most of a report's time, and megabytes, for its PNG."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=len(picture), width=picture.shape[1], colorspace=3, encoded_image_string=jpeg(picture))
    cast(Any, writer.file_writer).add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _terms(rows: Sequence[Row]) -> list[str]:
    return sorted({name.removeprefix("loss/") for entry in rows for name in entry if name.startswith("loss/")})


def _plot(axes: Axes, points: Points, label: str, **style: Any) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def _charts(rows: Sequence[Row]) -> list[str]:
    accuracy = {f"within {t} px": series(rows, f"validation/mma@{t}") for t in THRESHOLDS}
    counts = {name: series(rows, f"validation/{name}") for name in ("keypoints", "matches")}
    terms = {name: series(rows, f"loss/{name}") for name in _terms(rows)}
    return [
        line_chart("loss terms", terms, logarithmic=True, running_mean=True),
        line_chart("matching accuracy (MMA) on validation pairs", accuracy, shares=True),
        line_chart("keypoints an image, matches a pair", counts),
        line_chart("learning rate", {"learning rate": series(rows, "learning_rate")}),
        line_chart("gradient", {"norm": series(rows, "gradient_norm")}, logarithmic=True, running_mean=True),
        line_chart("throughput", {"images a second": series(rows, "images_per_second")}),
        line_chart("waiting for data", {"share of the step": series(rows, "waiting")}, shares=True),
    ]


def _state(rows: Sequence[Row], step: int, steps: int) -> str:
    """Where the run stands, in a line."""
    state = f"Step {step} of {steps}."
    accuracy = series(rows, "validation/mma@3")
    if accuracy:
        (first, before), (_, now) = accuracy[0], accuracy[-1]
        best, at = max((value, -at) for at, value in accuracy)
        state += f" MMA@3 {now:.3f} now, {before:.3f} at step {first:.0f}, best {best:.3f} at step {-at:.0f}."
    left_out = series(rows, "left_out")
    return state + (f" Steps left out, as their loss was not finite: {left_out[-1][1]:.0f}." if left_out else "")


def _configuration(config: Config) -> str:
    changed = changes(config)
    heading = f"<h2>Configuration</h2><p>Preset {text(config.preset)}"
    if not changed:
        return f"{heading}, unchanged. <code>config.yaml</code> has every value.</p>"
    rows = [(key, *map(_plain, pair)) for key, pair in changed.items()]
    return f"{heading}, but for these. <code>config.yaml</code> has every value.</p>" + table(
        ("", "preset", "this run"), rows
    )


def _stores(stores: Sequence[TeacherCache]) -> str:
    parts = ["<h2>Teacher and data</h2>"]
    for store in stores:
        spec, (height, width) = store.spec, store.spec.image_size
        pairs = f", {spec.pairs} pairs" if spec.paired else ""
        parts.append(f"<h3>{text(store.path.name)}</h3><p>{spec.images} images of {height} x {width}{pairs}</p>")
        identity = flatten(store.provenance.identity)
        parts.append(table(("", ""), [(key, _plain(value)) for key, value in identity.items()]))
    return "".join(parts)


def _versions(stores: Sequence[TeacherCache], versions: Mapping[str, str]) -> str:
    columns = [versions, *(store.provenance.versions for store in stores)]
    packages = dict.fromkeys(package for column in columns for package in column)
    rows = [(package, *(column.get(package, "") for column in columns)) for package in packages]
    header = ("", "training", *(store.path.name for store in stores))
    return f"<h2>Versions</h2>{table(header, rows)}"


def _plain(value: Any) -> str:
    """A configured value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)
