"""Pictures of a method's output: keypoints coloured by score, and dense maps over the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from samfeat.pipelines.pictures.draw import color_map, draw_keypoints, enlarged, enlargement, with_scale

SHOWN = 500  # keypoints; more circles would hide the image
MAPS: dict[str, tuple[str, str, float | None, float | None]] = {
    "heatmap": ("heat-map", "inferno", 0, 1),
    "attention": ("attention", "viridis", None, None),
    "edges": ("edges", "gray", 0, None),
}
"""Title, colour map, lowest and highest value (None: the map's own) of the student's maps."""


def feature_tiles(
    image: np.ndarray, features: Mapping[str, Any], maps: Mapping[str, np.ndarray] | None = None
) -> list[tuple[str, np.ndarray]]:
    """Titled pictures of one height for :func:`samfeat.pipelines.pictures.draw.panel`: keypoints, then every map.

    Every picture has its colour scale beside it.

    Args:
        image: uint8 [H, W, 3].
        features: ``keypoints`` [K, 2] and ``scores`` [K], in any order. The ``SHOWN`` best ones are drawn, coloured by
            rank from blue to yellow; without scores, the first ones in green.
        maps: any of ``MAPS``, float [h, w] of any size.
    """
    factor = enlargement(image)
    large = enlarged(image, factor) if factor > 1 else image
    keypoints, scores = np.asarray(features["keypoints"]), features.get("scores")
    if scores is not None:
        best = np.argsort(-np.asarray(scores), kind="stable")
        keypoints, scores = keypoints[best], np.asarray(scores)[best][:SHOWN]
    shown = min(len(keypoints), SHOWN)
    title = f"{len(keypoints)} keypoints"
    if shown < len(keypoints):
        title += f", the {'first' if scores is None else 'best'} {shown} drawn"
    drawn = draw_keypoints(large, (keypoints[:SHOWN] + 0.5) * factor - 0.5, scores)
    if scores is not None and len(scores):
        title += f", scores {scores.min():.2g} to {scores.max():.2g}"
    if scores is not None and len(scores) > 1:
        drawn = with_scale(drawn, "plasma", f"rank {len(scores)}", "rank 1")
    tiles = [(title, drawn)]
    for key, values in (maps or {}).items():
        title, cmap, low, high = MAPS[key]
        values = np.asarray(values, np.float32)
        bottom, top = (
            float(end) for end in (values.min() if low is None else low, values.max() if high is None else high)
        )
        picture = with_scale(overlay(large, values, cmap, low, high), cmap, f"{bottom:.4g}", f"{top:.4g}")
        tiles.append((f"{title}: {values.min():.4g} to {values.max():.4g}", picture))
    return tiles


def overlay(
    image: np.ndarray, values: np.ndarray, cmap: str, low: float | None = None, high: float | None = None
) -> np.ndarray:
    """A coloured map [h, w] over a grey image [H, W, 3], blended three to one."""
    colors = color_map(cv2.resize(values, image.shape[1::-1], interpolation=cv2.INTER_LINEAR), cmap, low=low, high=high)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(colors, 0.75, grey, 0.25, 0)
