"""Pictures of images, features, matches and targets: pure functions from arrays to uint8 [H, W, 3] in RGB.

Points are (x, y) in pixels, (0, 0) is the centre of the top-left pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import cv2
import numpy as np

from samfeat.files import write_bytes

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

GREEN, RED, YELLOW = (60, 200, 90), (225, 65, 60), (255, 210, 60)
INK, PAPER = (30, 30, 30), (255, 255, 255)
WORST = 5.0  # pixels; matches with at least this error are plain red
MOST = 100  # matches per picture; more lines would hide the images
OPACITY = 0.6  # of the line of a match
LEAST = 320  # pixels, minimum side of an image before anything is drawn over it
_SHIFT = 4  # OpenCV draws in fixed point: coordinates in 1 / 2**_SHIFT pixels


def draw_matches(
    image0: np.ndarray,
    image1: np.ndarray,
    points0: np.ndarray,
    points1: np.ndarray,
    *,
    colors: np.ndarray | None = None,
) -> np.ndarray:
    """Two images side by side with a thin, translucent line for every match.

    Args:
        image0: left image, uint8 [H0, W0, 3].
        image1: right image, uint8 [H1, W1, 3]; the shorter of the two is padded below.
        points0: [M, 2] in the left image.
        points1: [M, 2] in the right image, row by row the matches of ``points0``.
        colors: uint8 [M, 3], such as :func:`inlier_colors` or :func:`error_colors` give; green by default. Later rows
            are drawn on top.
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
    lines, width = canvas.copy(), _line_width(canvas[:, :offset])
    for start, end, color in zip(starts, ends, colors.tolist(), strict=True):
        cv2.line(lines, start, end, color, width, cv2.LINE_AA, _SHIFT)
    canvas = cv2.addWeighted(lines, OPACITY, canvas, 1 - OPACITY, 0)
    for start, end, color in zip(starts, ends, colors.tolist(), strict=True):
        for point in (start, end):
            cv2.circle(canvas, point, 2 * width << _SHIFT, color, -1, cv2.LINE_AA, _SHIFT)
    return canvas


def draw_verified(
    image0: np.ndarray,
    image1: np.ndarray,
    points0: np.ndarray,
    points1: np.ndarray,
    inliers: np.ndarray | None,
    *,
    most: int = MOST,
) -> tuple[np.ndarray, list[tuple[str, tuple[int, int, int]]]]:
    """:func:`draw_matches` coloured by inlier: ``most`` of them, chosen once and for all, inliers in green on top.

    Args:
        image0: see :func:`draw_matches`.
        image1: see :func:`draw_matches`.
        points0: see :func:`draw_matches`.
        points1: see :func:`draw_matches`.
        inliers: bool [M]; None if nothing was verified, and all are green.
        most: number of matches to draw, at random, so that right and wrong ones have their fair share.

    Returns:
        the picture, and its legend for :func:`captioned`.
    """
    order = np.random.default_rng(0).permutation(len(points0))[:most]
    if inliers is None:
        drawn = draw_matches(image0, image1, points0[order], points1[order])
        return drawn, [(f"{len(order)} mutual matches drawn", GREEN)]
    order = order[np.argsort(inliers[order], kind="stable")]
    drawn = draw_matches(image0, image1, points0[order], points1[order], colors=inlier_colors(inliers[order]))
    agree = int(inliers[order].sum())
    return drawn, [(f"{agree} drawn that agree", GREEN), (f"{len(order) - agree} drawn that do not", RED)]


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
    """:func:`draw_matches` coloured by error: a fixed random choice of ``most`` matches, the best on top.

    Args:
        image0: see :func:`draw_matches`.
        image1: see :func:`draw_matches`.
        points0: see :func:`draw_matches`.
        points1: see :func:`draw_matches`.
        errors: [M], see :func:`error_colors`.
        worst: see :func:`error_colors`.
        most: maximum number of matches to draw, chosen at random so that right and wrong ones are fairly represented.
    """
    chosen = np.random.default_rng(0).permutation(len(errors))[:most]
    chosen = chosen[np.argsort(-errors[chosen], kind="stable")]
    colors = error_colors(errors[chosen], worst=worst)
    return draw_matches(image0, image1, points0[chosen], points1[chosen], colors=colors)


def draw_keypoints(
    image: np.ndarray, keypoints: np.ndarray, scores: np.ndarray | None = None, *, radius: int = 4
) -> np.ndarray:
    """Circles around keypoints [K, 2]; with scores [K], coloured by rank, from blue to yellow, best on top.

    ``radius`` is in widths of a line, which grows with the image.
    """
    canvas = image.copy()
    if scores is None or len(keypoints) == 0:
        colors = np.tile(np.array(GREEN, np.uint8), (len(keypoints), 1))
    else:
        order = np.argsort(scores)
        keypoints, colors = np.asarray(keypoints)[order], color_map(np.arange(len(order))[None], "plasma")[0]
    width = _line_width(image)
    for point, color in zip(_fixed(keypoints), colors.tolist(), strict=True):
        cv2.circle(canvas, point, radius * width << _SHIFT, INK, 3 * width, cv2.LINE_AA, _SHIFT)
        cv2.circle(canvas, point, radius * width << _SHIFT, color, width, cv2.LINE_AA, _SHIFT)
    return canvas


def draw_tracks(image: np.ndarray, tails: np.ndarray, *, most: int = MOST) -> np.ndarray:
    """The last positions of tracked points as lines over their image, from blue (new) to yellow (long).

    Args:
        image: uint8 [H, W, 3].
        tails: float [K, T, 2], positions of every point, latest first, NaN before its track began.
        most: number of tracks to draw, the longest ones.
    """
    canvas, width = image.copy(), _line_width(image)
    lengths = np.isfinite(tails[:, :, 0]).sum(1)
    colors = color_map(lengths[None], "plasma", low=1, high=tails.shape[1])[0]
    for number in np.argsort(lengths, kind="stable")[-most:]:
        color, points = colors[number].tolist(), _fixed(tails[number, : lengths[number]])
        cv2.polylines(canvas, [np.array(points, np.int32)], False, color, width, cv2.LINE_AA, _SHIFT)
        cv2.circle(canvas, points[0], 2 * width << _SHIFT, color, -1, cv2.LINE_AA, _SHIFT)
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
        groups: integer [H, W]; a label has the same colour in every picture; 0 (no group) is black.
        image: uint8 [H, W, 3] to blend with the colours; pixels without a group then show the darkened image.
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


def pca_rgb(embeddings: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The first three principal components of embeddings as red, green and blue, shared by all of them.

    Each component runs from its 1st to its 99th percentile; missing and constant ones are zero.

    Args:
        embeddings: [C, h, w], all with the same C.

    Returns:
        uint8 [h, w, 3] for each.
    """
    flat = [embedding.reshape(len(embedding), -1).astype(np.float64).T for embedding in embeddings]
    vectors = np.concatenate(flat)
    vectors -= vectors.mean(0)
    strength, axes = np.linalg.eigh(vectors.T @ vectors)
    axes = axes[:, ::-1][:, :3]
    axes = axes * np.where(axes.sum(0) < 0, -1, 1)  # eigenvectors have no sign of their own
    axes = axes * (strength[::-1][:3] > 1e-9 * max(strength[-1], 1e-12))
    parts = np.zeros((len(vectors), 3))
    parts[:, : axes.shape[1]] = vectors @ axes
    low, high = np.percentile(parts, (1, 99), axis=0)
    span = np.where(high > low, high - low, np.inf)
    colors = (255 * np.clip((parts - low) / span, 0, 1)).round().astype(np.uint8)
    ends = np.cumsum([len(values) for values in flat])[:-1]
    return [part.reshape(*e.shape[1:], 3) for part, e in zip(np.split(colors, ends), embeddings, strict=True)]


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
    """Integer factor that makes small images [H, W, 3] large enough for circles and lines."""
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
        rows: rows of (title, uint8 [H, W, 3]); pictures of a row may differ in size.
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
    """Write uint8 [H, W, 3] in RGB as PNG, atomically; returns the path."""
    _, data = cv2.imencode(".png", image[..., ::-1])
    return write_bytes(path, data.tobytes())


def _line_width(image: np.ndarray) -> int:
    """Line width in pixels that stays visible when an image of this size is shown in a window."""
    return max(1, round(min(image.shape[:2]) / 480))


def _fixed(points: np.ndarray) -> list[tuple[int, int]]:
    fixed = np.clip(np.asarray(points, float).reshape(-1, 2), -1e5, 1e5) * 2**_SHIFT
    return [(int(x), int(y)) for x, y in fixed.round()]


def _scaled(image: np.ndarray, height: int) -> np.ndarray:
    scale = height / len(image)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return cv2.resize(image, (max(1, round(image.shape[1] * scale)), height), interpolation=method)


def captioned(picture: np.ndarray, title: str, legend: Sequence[tuple[str, tuple[int, int, int]]] = ()) -> np.ndarray:
    """A picture with a title above it, and a legend below the title.

    Args:
        picture: uint8 [H, W, 3].
        title: one line, shortened if the picture is too narrow.
        legend: (meaning, colour); empty for no legend.
    """
    from PIL import Image, ImageDraw

    size = int(np.clip(picture.shape[1] / 62, 11, 36))
    line = round(1.5 * size)
    bar = line * (2 if legend else 1) + size // 2
    sheet = Image.new("RGB", (picture.shape[1], len(picture) + bar), PAPER)
    sheet.paste(Image.fromarray(picture), (0, bar))
    pen, font = ImageDraw.Draw(sheet), _font(size)
    pen.text((size // 2, size // 4), _shortened(title, font, picture.shape[1] - size), INK, font)
    across = size // 2
    for meaning, color in legend:
        top = line + size // 2
        pen.rectangle((across, top, across + 2 * size, top + size // 2), color)
        pen.text((across + 2.5 * size, line + size // 8), meaning, INK, font)
        across += round(3.5 * size + font.getlength(meaning))
    return np.asarray(sheet)


def with_scale(picture: np.ndarray, cmap: str, low: str, high: str) -> np.ndarray:
    """A picture with the scale of its colours on the right, labelled at both ends.

    Args:
        picture: uint8 [H, W, 3].
        cmap: matplotlib's name of the colours.
        low: what the darkest end means.
        high: what the brightest end means.
    """
    from PIL import Image, ImageDraw

    height, width = picture.shape[:2]
    size = max(10, height // 22)
    font = _font(size)
    gap, bar = size // 2, size
    room = round(max(font.getlength(low), font.getlength(high))) + 2 * gap
    sheet = Image.new("RGB", (width + gap + bar + room, height), PAPER)
    sheet.paste(Image.fromarray(picture), (0, 0))
    ramp = color_map(np.linspace(1, 0, height)[:, None], cmap, low=0, high=1).repeat(bar, axis=1)
    sheet.paste(Image.fromarray(ramp), (width + gap, 0))
    pen, left = ImageDraw.Draw(sheet), width + gap + bar + gap // 2
    pen.text((left, 0), high, INK, font)
    pen.text((left, height - round(1.3 * size)), low, INK, font)
    return np.asarray(sheet)


def _font(size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return cast("FreeTypeFont", ImageFont.load_default(size=size))


def _shortened(text: str, font: FreeTypeFont, width: int) -> str:
    """As much of a text as fits, with an ellipsis if it is cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _titled(title: str, image: np.ndarray) -> np.ndarray:
    from PIL import Image, ImageDraw

    bar, margin = 24, 6
    sheet = Image.new("RGB", (image.shape[1] + 2 * margin, len(image) + bar + margin), PAPER)
    sheet.paste(Image.fromarray(image), (margin, bar))
    font = _font(14)
    ImageDraw.Draw(sheet).text((margin, 4), _shortened(title, font, image.shape[1]), INK, font)
    return np.asarray(sheet)
