"""Keypoints and matches as images that notebooks display."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from samfeat.pipelines.pictures.draw import draw_keypoints, draw_matches
from samfeat.student.pixels import as_rgb


def show_keypoints(image: Any, features: Mapping[str, Any]) -> Image.Image:
    """Keypoints over their image, coloured by score from blue to yellow (without scores, all green).

    Args:
        image: anything that :meth:`samfeat.SAMFeat.extract` takes.
        features: what it returned for the image.

    Raises:
        ValueError: something else than an accepted image, or features without keypoints.
    """
    keypoints, scores = _field(features, "keypoints"), _numpy(features["scores"]) if "scores" in features else None
    return Image.fromarray(draw_keypoints(_pixels(image), keypoints, scores))


def show_matches(
    image0: Any, image1: Any, features0: Mapping[str, Any], features1: Mapping[str, Any], matches: Any
) -> Image.Image:
    """Two images side by side with a line for every match.

    Args:
        image0, image1: anything that :meth:`samfeat.SAMFeat.extract` takes.
        features0, features1: what it returned for the images.
        matches: int [M, 2], or what :func:`samfeat.match` returned.

    Raises:
        ValueError: something else than an accepted image, features without keypoints, or matches that are not rows of
            ``features0`` and ``features1``.
    """
    points0, points1 = _field(features0, "keypoints"), _field(features1, "keypoints")
    pairs = _field(matches, "matches") if isinstance(matches, Mapping) else _numpy(matches)
    if pairs.shape == (0,):  # an empty list
        pairs = np.zeros((0, 2), np.int64)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        raise ValueError(f"matches must be whole numbers [M, 2], got {pairs.dtype} {list(pairs.shape)}")
    if ((pairs < 0) | (pairs >= (len(points0), len(points1)))).any():
        raise ValueError(f"matches must be rows of {len(points0)} and {len(points1)} keypoints; some lie outside")
    points0, points1 = points0[pairs[:, 0]], points1[pairs[:, 1]]
    return Image.fromarray(draw_matches(_pixels(image0), _pixels(image1), points0, points1))


def _field(found: Mapping[str, Any], name: str) -> np.ndarray:
    if name not in found:
        raise ValueError(f"no {name!r} among {', '.join(map(repr, found)) or 'nothing'}: give what samfeat returned")
    return _numpy(found[name])


def _numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _pixels(image: Any) -> np.ndarray:
    pixels = as_rgb(image)
    return pixels if pixels.dtype == np.uint8 else np.rint(pixels).astype(np.uint8)
