"""Pictures of images, features, matches and targets: pure functions from arrays to uint8 [H, W, 3] in RGB.

Points are (x, y) in pixels, (0, 0) is the centre of the top-left pixel.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from samfeat.pipelines.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREEN, RED, YELLOW = (60, 200, 90), (225, 65, 60), (255, 210, 60)
INK, PAPER = (30, 30, 30), (255, 255, 255)
WORST = 5.0  # pixels, the error from which on a match is plain red
MOST = 300  # matches of a picture; more lines than that hide the images
LEAST = 320  # pixels, the least side of an image before anything is drawn over it
_SHIFT = 4  # OpenCV draws in fixed point: coordinates in 1 / 2**_SHIFT pixels


def draw_matches(
    image0: np.ndarray,
    image1: np.ndarray,
    points0: np.ndarray,
    points1: np.ndarray,
    *,
    colors: np.ndarray | None = None,
) -> np.ndarray:
    """Two images side by side with a thin line for every match.

    Args:
        image0: left image, uint8 [H0, W0, 3].
        image1: right image, uint8 [H1, W1, 3]; the shorter of the two is padded below.
        points0: [M, 2] in the left image.
        points1: [M, 2] in the right image, row by row the matches of ``points0``.
        colors: uint8 [M, 3], such as :func:`inlier_colors` or :func:`error_colors` give; green where left out. Later
            rows are drawn over earlier ones.
    """
    gap = 8
    height = max(len(image0), len(image1))
    canvas = np.full((height, image0.shape[1] + gap + image1.shape[1], 3), PAPER, np.uint8)
    offset = image0.shape[1] + gap
    canvas[: len(image0), : image0.shape[1]] = image0
    canvas[: len(image1), offset:] = image1
    if colors is None:
        colors = np.tile(np.array(GREEN, np.uint8), (len(points0), 1))
    starts, ends = _fixed(points0), _fixed(np.asarray(points1) + (offset, 0))
    for start, end, color in zip(starts, ends, colors.tolist(), strict=True):
        cv2.line(canvas, start, end, color, 1, cv2.LINE_AA, _SHIFT)
        for point in (start, end):
            cv2.circle(canvas, point, 2 << _SHIFT, color, -1, cv2.LINE_AA, _SHIFT)
    return canvas


def draw_errors(
    image0: np.ndarray,
    image1: np.ndarray,
    points0: np.ndarray,
    points1: np.ndarray,
    errors: np.ndarray,
    *,
    worst: float = WORST,
    most: int = MOST,
) -> np.ndarray:
    """:func:`draw_matches` coloured by error: ``most`` of them, chosen once and for all, the best ones on top.

    Args:
        image0: see :func:`draw_matches`.
        image1: see :func:`draw_matches`.
        points0: see :func:`draw_matches`.
        points1: see :func:`draw_matches`.
        errors: [M], see :func:`error_colors`.
        worst: see :func:`error_colors`.
        most: number of matches to draw, at random, so that right and wrong ones have their fair share.
    """
    chosen = np.random.default_rng(0).permutation(len(errors))[:most]
    chosen = chosen[np.argsort(-errors[chosen], kind="stable")]
    colors = error_colors(errors[chosen], worst=worst)
    return draw_matches(image0, image1, points0[chosen], points1[chosen], colors=colors)


def draw_keypoints(image: np.ndarray, keypoints: np.ndarray, scores: np.ndarray | None = None) -> np.ndarray:
    """Circles about keypoints [K, 2]; with scores [K], coloured by rank, from blue to yellow, best on top."""
    canvas = image.copy()
    if scores is None or len(keypoints) == 0:
        colors = np.tile(np.array(GREEN, np.uint8), (len(keypoints), 1))
    else:
        order = np.argsort(scores)
        keypoints, colors = np.asarray(keypoints)[order], color_map(np.arange(len(order))[None], "plasma")[0]
    for point, color in zip(_fixed(keypoints), colors.tolist(), strict=True):
        cv2.circle(canvas, point, 4 << _SHIFT, INK, 3, cv2.LINE_AA, _SHIFT)
        cv2.circle(canvas, point, 4 << _SHIFT, color, 1, cv2.LINE_AA, _SHIFT)
    return canvas


def inlier_colors(inliers: np.ndarray) -> np.ndarray:
    """uint8 [M, 3]: green for true, red for false of bool [M]."""
    return np.where(np.asarray(inliers, bool)[:, None], np.array(GREEN, np.uint8), np.array(RED, np.uint8))


def error_colors(errors: np.ndarray, *, worst: float = WORST) -> np.ndarray:
    """uint8 [M, 3]: green at error 0 over yellow to red at ``worst`` pixels and beyond."""
    share = np.clip(np.nan_to_num(np.asarray(errors, float), nan=np.inf) / worst, 0, 1)
    stops = np.array([GREEN, YELLOW, RED], float)
    return np.stack([np.interp(share, (0, 0.5, 1), stops[:, channel]) for channel in range(3)], -1).astype(np.uint8)


def color_groups(groups: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
    """A label map in distinct colours, outlined.

    Args:
        groups: integer [H, W]; equal labels have equal colours in every picture, 0 (no group) is black.
        image: uint8 [H, W, 3] to blend the colours with; pixels of no group then show the image darkened.
    """
    labels, index = np.unique(groups, return_inverse=True)
    hue = labels * 0.61803398875 % 1.0  # the golden ratio spreads consecutive labels over the circle
    value = np.where(labels == 0, 0, 150 + 105 * (labels * 0.754877666 % 1.0))
    palette = np.stack([hue * 180, np.full(len(labels), 190), value], -1).astype(np.uint8)
    picture = cv2.cvtColor(palette[None], cv2.COLOR_HSV2RGB)[0][index.reshape(groups.shape)]
    if image is not None:
        picture = cv2.addWeighted(image, 0.45, picture, 0.55, 0)
    padded = np.pad(groups, ((0, 1), (0, 1)), mode="edge")
    outline = (padded[1:, :-1] != groups) | (padded[:-1, 1:] != groups)
    picture[outline] = PAPER
    return picture


def pca_rgb(embedding: np.ndarray) -> np.ndarray:
    """The three strongest principal components of an embedding [C, h, w] as red, green and blue, uint8 [h, w, 3].

    Each component runs from its 1st to its 99th percentile; missing and constant ones are zero.
    """
    channels, height, width = embedding.shape
    vectors = embedding.reshape(channels, -1).astype(np.float64).T
    vectors -= vectors.mean(0)
    strength, axes = np.linalg.eigh(vectors.T @ vectors)
    axes = axes[:, ::-1][:, :3]
    axes = axes * np.where(axes.sum(0) < 0, -1, 1)  # eigenvectors have no sign of their own
    axes = axes * (strength[::-1][:3] > 1e-9 * max(strength[-1], 1e-12))
    parts = np.zeros((height * width, 3))
    parts[:, : axes.shape[1]] = vectors @ axes
    low, high = np.percentile(parts, (1, 99), axis=0)
    span = np.where(high > low, high - low, np.inf)
    return (255 * np.clip((parts - low) / span, 0, 1)).round().astype(np.uint8).reshape(height, width, 3)


def color_map(
    values: np.ndarray, cmap: str = "magma", *, low: float | None = None, high: float | None = None
) -> np.ndarray:
    """Values [H, W] through a matplotlib colour map, from ``low`` to ``high`` (default: the extremes); NaN is black."""
    from matplotlib import colormaps

    values = np.asarray(values, float)
    low = np.nanmin(values, initial=np.inf) if low is None else low
    high = np.nanmax(values, initial=-np.inf) if high is None else high
    share = (values - low) / (high - low) if high > low else np.zeros_like(values)
    picture = colormaps[cmap](np.nan_to_num(share), bytes=True)[..., :3]
    picture[np.isnan(values)] = 0
    return picture


def enlargement(image: np.ndarray) -> int:
    """Whole factor that makes room for circles and lines on small images [H, W, 3]."""
    return -(-LEAST // min(image.shape[:2]))


def enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    """An image ``factor`` times as large; its point (x, y) is then at (p + 0.5) * factor - 0.5."""
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)


def thumbnail(picture: np.ndarray, side: int = 320) -> np.ndarray:
    """A picture whose longer side has at most ``side`` pixels."""
    scale = side / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA) if scale < 1 else picture


def panel(rows: Sequence[Sequence[tuple[str, np.ndarray]]], *, height: int = 240) -> np.ndarray:
    """One sheet of titled pictures.

    Args:
        rows: rows of (title, uint8 [H, W, 3]); pictures of one row need not agree in size.
        height: every picture is scaled to this height in pixels.
    """
    strips = []
    for row in rows:
        tiles = [_titled(title, _scaled(image, height)) for title, image in row]
        strips.append(np.concatenate(tiles, axis=1))
    width = max(strip.shape[1] for strip in strips)
    padded = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips]
    return np.concatenate(padded, axis=0)


def jpeg(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] in RGB as a JPEG file of good quality."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    return data.tobytes()


def save_png(path: str | Path, image: np.ndarray) -> Path:
    """Writes uint8 [H, W, 3] in RGB as PNG, whole or not at all; returns the path."""
    _, data = cv2.imencode(".png", image[..., ::-1])
    return write_bytes(path, data.tobytes())


def mma_figure(path: str | Path, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Path:
    """Mean matching accuracy over the threshold, one plot for every subset, one line for every method.

    Args:
        path: PNG to write.
        curves: accuracies in [0, 1] at 1, 2, ... pixels, by method and then by subset, such as
            ``{"sift": {"all": [...], "viewpoint": [...]}}``.
    """
    from matplotlib.figure import Figure

    subsets = list(dict.fromkeys(subset for values in curves.values() for subset in values))
    figure = Figure(figsize=(1.2 + 3.6 * len(subsets), 4.2), layout="constrained")
    axes = figure.subplots(1, len(subsets), sharey=True, squeeze=False)[0]
    for axis, subset in zip(axes, subsets):
        for method, values in curves.items():
            if subset in values:
                accuracies = values[subset]
                axis.plot(range(1, len(accuracies) + 1), accuracies, marker="o", markersize=3, label=method)
        axis.set(title=subset.capitalize(), xlabel="Threshold [px]", ylim=(0, 1), xticks=range(1, 11))
        axis.grid(alpha=0.35)
    axes[0].set_ylabel("MMA")
    axes[0].legend(loc="lower right")
    return save_figure(path, figure)


def error_figure(
    path: str | Path,
    errors: Mapping[str, Sequence[float]],
    areas: Mapping[str, Sequence[float]],
    *,
    thresholds: Sequence[float],
    xlabel: str,
) -> Path:
    """Share of pairs whose error is below a limit, over the limit; and the area under that curve, as bars.

    Args:
        path: PNG to write.
        errors: by method, one error a pair, infinity for a failure.
        areas: by method, the area up to each threshold, in [0, 1].
        thresholds: ascending; the last one ends the curve.
        xlabel: what the error is, with its unit.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    curve, bars = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    width = 0.8 / max(1, len(errors))
    for place, (method, values) in enumerate(errors.items()):
        inside = sorted(value for value in values if value <= thresholds[-1])
        share = np.arange(len(inside) + 1) / len(values)
        curve.step([0, *inside, thresholds[-1]], [*share, share[-1]], where="post", label=method)
        offset = (place - (len(errors) - 1) / 2) * width
        bars.bar(np.arange(len(thresholds)) + offset, areas[method], width, label=method)
    curve.set(xlabel=xlabel, ylabel="Share of pairs", xlim=(0, thresholds[-1]), ylim=(0, 1))
    bars.set(title="Area under the curve", xticks=range(len(thresholds)), xticklabels=[f"@{t:g}" for t in thresholds])
    curve.legend(loc="upper left")
    for axis in (curve, bars):
        axis.grid(alpha=0.35)
    return save_figure(path, figure)


def precision_recall_figure(
    path: str | Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float], Mapping[str, float]]]
) -> Path:
    """Precision over recall, one line a method with a mark at its best F, over lines of equal F.

    Args:
        path: PNG to write.
        curves: by method, recalls, precisions, and the best point: ``recall``, ``precision``, ``f``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axis = figure.subplots()
    for f in np.arange(0.1, 1, 0.1):
        recall = np.linspace(f / (2 - f) + 1e-9, 1, 100)
        axis.plot(recall, f * recall / (2 * recall - f), color="0.85", linewidth=0.8, zorder=0)
        axis.text(1.01, f / (2 - f), f"{f:.1f}", color="0.6", fontsize=8, va="center")
    for method, (recalls, precisions, best) in curves.items():
        (line,) = axis.plot(recalls, precisions, label=f"{method}, F {best['f']:.2f}")
        axis.plot(best["recall"], best["precision"], "o", color=line.get_color())
    axis.set(xlabel="Recall", ylabel="Precision", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.legend(loc="lower left")
    return save_figure(path, figure)


def save_figure(path: str | Path, figure: Figure) -> Path:
    """Writes a matplotlib figure as PNG, whole or not at all; returns the path."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return write_bytes(path, data.getvalue())


def bar_figure(path: str | Path, panels: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> Path:
    """Bars: one plot for every quantity, in it one group for every scene with one bar for every method.

    Args:
        path: PNG to write.
        panels: values by quantity, scene and method; None has no bar, nor has a quantity that nobody has a plot.
    """
    from matplotlib.figure import Figure

    def known(scenes: Mapping[str, Mapping[str, float | None]]) -> bool:
        return any(value is not None for values in scenes.values() for value in values.values())

    shown = {title: scenes for title, scenes in panels.items() if known(scenes)}
    methods = list(dict.fromkeys(m for scenes in shown.values() for values in scenes.values() for m in values))
    columns = max(1, min(3, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(1 + 4.2 * columns, 0.6 + 2.9 * rows), layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, scenes) in zip(plots, shown.items()):
        width = 0.8 / len(methods)
        for number, method in enumerate(methods):
            places = [k + (number - (len(methods) - 1) / 2) * width for k in range(len(scenes))]
            heights = [values.get(method) or 0.0 for values in scenes.values()]
            axis.bar(places, heights, width, label=method, color=f"C{number}")
        axis.set(title=title, xticks=range(len(scenes)), xticklabels=list(scenes))
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="y", alpha=0.35)
    for axis in plots[len(shown) :]:
        axis.remove()
    if shown:
        figure.legend(*plots[0].get_legend_handles_labels(), loc="outside upper center", ncols=8, fontsize=9)
    return save_figure(path, figure)


def _fixed(points: np.ndarray) -> list[tuple[int, int]]:
    fixed = np.clip(np.asarray(points, float).reshape(-1, 2), -1e5, 1e5) * 2**_SHIFT
    return [(int(x), int(y)) for x, y in fixed.round()]


def _scaled(image: np.ndarray, height: int) -> np.ndarray:
    scale = height / len(image)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return cv2.resize(image, (max(1, round(image.shape[1] * scale)), height), interpolation=method)


def _titled(title: str, image: np.ndarray) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    bar, margin = 24, 6
    sheet = Image.new("RGB", (image.shape[1] + 2 * margin, len(image) + bar + margin), PAPER)
    sheet.paste(Image.fromarray(image), (margin, bar))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    while title and pen.textlength(title, font) > image.shape[1]:
        title = title[:-1]
    pen.text((margin, 4), title, INK, font)
    return np.asarray(sheet)
