"""Report of a training run: ``report.html``, ``curves.png`` and pictures in TensorBoard.

The page plots losses, speed and accuracy, draws a few validation pairs with the current student's output, and lists
where everything came from: configuration, teacher, versions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np

from samfeat.files import write_bytes
from samfeat.pipelines.config import Config, changes
from samfeat.pipelines.pictures.charts import LinePlot, line_chart, line_sheet, png, svg
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
from samfeat.pipelines.pictures.pages import Picture, photograph, plot, render
from samfeat.pipelines.training.validation import THRESHOLDS, PairView
from samfeat.teacher_cache.schema import flatten
from samfeat.teacher_cache.store import TeacherCache

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

DRAWN = 150  # matches drawn in a small picture
MAP_SIDE, PAIR_SIDE = 400, 1000  # pixels, maximum size of pictures on the page
SCALE = f"linear-gradient(90deg,rgb{GREEN},rgb{YELLOW},rgb{RED})"

Row = dict[str, float]


class RunReport:
    """The pictures of one training run.

    Args:
        folder: folder of the run; the curves are drawn from its ``metrics.jsonl``.
        stores: training data of the run.
        config: configuration of the run.
        versions: versions of the packages used.

    Raises:
        ValueError: the configuration's preset is a file that is no longer there.
    """

    def __init__(
        self, folder: Path, stores: Sequence[TeacherCache], config: Config, *, versions: Mapping[str, str]
    ) -> None:
        self.folder = folder
        changed = changes(config)
        self._origins: dict[str, Any] = {
            "teachers": ", ".join(dict.fromkeys(store.provenance.teacher["name"] for store in stores)),
            "preset": config.preset,
            "changed": [(key, *map(_plain, pair)) for key, pair in changed.items()],
            "stores": [_store(store) for store in stores],
            "versions": _versions(stores, versions),
        }

    def write(self, step: int, steps: int, views: Sequence[PairView], writer: SummaryWriter | None = None) -> Path:
        """Redraw everything.

        Args:
            step: current step of the run.
            steps: total steps of the run.
            views: the pairs of the latest validation.
            writer: receives the pictures of the pairs for TensorBoard.

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
            pairs.append(
                {
                    "name": view.name,
                    "matches": _picture(matches, PAIR_SIDE, f"Matches of {view.name}"),
                    "maps": [_picture(tile, MAP_SIDE, f"{tile[0]} of {view.name}") for tile in maps],
                }
            )
        page = render(
            "run",
            title=f"Training run {'/'.join(self.folder.resolve().parts[-2:])}",
            state=_state(rows, step, steps),
            charts=_charts(rows),
            values=_validations(rows),
            validated=validated(rows),
            scale=SCALE,
            worst=f"{WORST:.0f}",
            pairs=pairs,
            **self._origins,
        )
        return write_bytes(self.folder / "report.html", page)


def _picture(tile: tuple[str, np.ndarray], side: int, alt: str) -> Picture:
    title, picture = tile
    return photograph(title, thumbnail(picture, side), alt=alt)


def tiles(view: PairView) -> list[tuple[str, np.ndarray]]:
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
            (f"{title}: {v.min():.3g} to {v.max():.3g}", cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST))
            for title, (v, picture) in maps.items()
        ),
    ]


def draw_curves(path: Path, rows: Sequence[Row]) -> Path:
    """Matching accuracy and loss terms as a picture, for use without a browser."""
    return write_bytes(path, png(line_sheet(_plots(rows)[:2])))


def read_metrics(path: Path) -> list[Row]:
    """The rows of a ``metrics.jsonl``, each with its ``step``; truncated lines are skipped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def validated(rows: Sequence[Row]) -> str:
    """Description of the images used for validation."""
    if any(entry.get("validation/held_out") == 0 for entry in rows):
        return "training images"
    if any(entry.get("validation/initialised") for entry in rows):
        return "images held out of this run, which its initial weights may have seen"
    return "held-out images"


def forget_after(path: Path, step: int) -> None:
    """Remove rows after ``step``, and a truncated line, from a ``metrics.jsonl``."""
    if path.exists():
        kept = [json.dumps(entry) + "\n" for entry in read_metrics(path) if entry["step"] <= step]
        write_bytes(path, "".join(kept).encode())


def series(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """(step, value) of one quantity, for all rows where it is present and finite."""
    return [(entry["step"], entry[name]) for entry in rows if math.isfinite(entry.get(name, math.nan))]


def _show(writer: SummaryWriter, tag: str, picture: np.ndarray, step: int) -> None:
    """Like ``SummaryWriter.add_image``, whose PNG would take most of a report's time, and megabytes."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=len(picture), width=picture.shape[1], colorspace=3, encoded_image_string=jpeg(picture))
    cast(Any, writer.file_writer).add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _terms(rows: Sequence[Row]) -> list[str]:
    return sorted({name.removeprefix("loss/") for entry in rows for name in entry if name.startswith("loss/")})


def _plots(rows: Sequence[Row]) -> list[LinePlot]:
    """All plots over the steps: accuracy first, then the losses."""
    accuracy = {f"within {t} px": series(rows, f"validation/mma@{t}") for t in THRESHOLDS}
    counts = {name: series(rows, f"validation/{name}") for name in ("keypoints", "matches")}
    terms = {name: series(rows, f"loss/{name}") for name in _terms(rows)}
    gradient = {"": series(rows, "gradient_norm")}
    return [
        LinePlot(f"matching accuracy (MMA) on {validated(rows)}", accuracy, shares=True),
        LinePlot("loss terms", terms, logarithmic=True, running_mean=True),
        LinePlot("keypoints per image, matches per pair", counts),
        LinePlot("learning rate", {"": series(rows, "learning_rate")}),
        LinePlot("norm of the gradient", gradient, logarithmic=True, running_mean=True),
        LinePlot("images per second", {"": series(rows, "images_per_second")}),
        LinePlot("share of the step spent waiting for data", {"": series(rows, "waiting")}, shares=True),
    ]


def _charts(rows: Sequence[Row]) -> list[Picture]:
    """The plots that are not empty."""
    return [
        plot(chart.title, svg(line_chart(chart)), alt=f"Chart over the training steps: {chart.title}")
        for chart in _plots(rows)
        if chart.drawable()
    ]


def _validations(rows: Sequence[Row]) -> dict[str, Any]:
    """The results of every validation as a table."""
    names = [*(f"mma@{t}" for t in THRESHOLDS), "keypoints", "matches"]
    measured = [entry for entry in rows if any(f"validation/{name}" in entry for name in names)]
    cells = [
        (f"{entry['step']:.0f}", *(_figure(entry.get(f"validation/{name}", math.nan)) for name in names))
        for entry in measured
    ]
    return {"header": ["step", *names], "rows": cells}


def _figure(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _state(rows: Sequence[Row], step: int, steps: int) -> str:
    """Status of the run in one line."""
    state = f"Step {step} of {steps}."
    accuracy = series(rows, "validation/mma@3")
    if accuracy:
        (first, before), (_, now) = accuracy[0], accuracy[-1]
        best, at = max((value, -at) for at, value in accuracy)
        state += f" MMA@3 {now:.3f} now, {before:.3f} at step {first:.0f}, best {best:.3f} at step {-at:.0f}."
    left_out = series(rows, "left_out")
    return state + (f" Steps left out, as their loss was not finite: {left_out[-1][1]:.0f}." if left_out else "")


def _store(store: TeacherCache) -> dict[str, Any]:
    spec, (height, width) = store.spec, store.spec.image_size
    pairs = f", {spec.pairs} pairs" if spec.paired else ""
    identity = flatten(store.provenance.identity)
    return {
        "name": store.path.name,
        "images": f"{spec.images} images of {height} x {width}{pairs}",
        "facts": [(key, _plain(value)) for key, value in identity.items()],
    }


def _versions(stores: Sequence[TeacherCache], versions: Mapping[str, str]) -> dict[str, Any]:
    columns = [versions, *(store.provenance.versions for store in stores)]
    packages = dict.fromkeys(package for column in columns for package in column)
    rows = [(package, *(column.get(package, "") for column in columns)) for package in packages]
    return {"header": ("", "training", *(store.path.name for store in stores)), "rows": rows}


def _plain(value: Any) -> str:
    """A configured value in command-line syntax."""
    return value if isinstance(value, str) else json.dumps(value)
