"""Features and matches as OpenCV's classes, for ``cv2.drawMatches``, ``cv2.findHomography`` and the like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import torch


def to_opencv(features: Mapping[str, Any], *, size: float = 1.0) -> list[cv2.KeyPoint]:
    """Keypoints for OpenCV, in the order of the features; ``response`` is the score.

    Args:
        features: what ``SAMFeat.extract`` returned for an image; ``"keypoints"`` [K, 2] and ``"scores"`` [K] are used.
        size: diameter of every keypoint in pixels; SAMFeat's keypoints have neither size nor angle.
    """
    keypoints, scores = (torch.as_tensor(features[key]).tolist() for key in ("keypoints", "scores"))
    return [cv2.KeyPoint(x, y, size, -1, score) for (x, y), score in zip(keypoints, scores, strict=True)]


def to_opencv_matches(found: Mapping[str, Any]) -> list[cv2.DMatch]:
    """Matches for OpenCV: ``queryIdx`` is the first image's, ``trainIdx`` the second's, ``distance`` 1 - score.

    Args:
        found: what ``samfeat.match`` returned; ``"matches"`` [M, 2] and ``"scores"`` [M] are used.
    """
    matches, scores = (torch.as_tensor(found[key]).tolist() for key in ("matches", "scores"))
    return [cv2.DMatch(query, train, 1 - score) for (query, train), score in zip(matches, scores, strict=True)]
