"""Two images, one picture of their matches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from samfeat.pipelines.draw import draw_matches, inlier_colors, save_png
from samfeat.pipelines.extract import Method
from samfeat.teacher_cache.images import read_image

VERIFICATIONS = ("none", "fundamental", "homography")
THRESHOLDS = {"fundamental": 1.0, "homography": 3.0}  # pixels: distance to the epipolar line, distance to the point
CONFIDENCE, TRIALS = 0.9999, 10_000
DRAWN = 300  # more lines than that hide the images


def match_images(
    path0: str | Path,
    path1: str | Path,
    output: str | Path | None = None,
    *,
    method: Method,
    verify: Literal["none", "fundamental", "homography"] = "fundamental",
    ratio: float | None = None,
) -> dict[str, Any]:
    """Matches two images by mutual nearest neighbours, verifies the matches and draws them.

    Args:
        path0: first image, on the left.
        path1: second image, on the right.
        output: PNG of the matches, inliers in green over outliers in red; None draws nothing.
        method: what computes the features.
        verify: model that inliers agree with, estimated by MAGSAC++: ``fundamental`` for any two views of a rigid
            scene, ``homography`` for planes and turning cameras, ``none`` verifies nothing.
        ratio: also demand that the best match is better than the second by this ratio of distances, in (0, 1].

    Returns:
        JSON values: ``image0``, ``image1``, ``method``, ``keypoints0``, ``keypoints1``, ``matches``, ``inliers``
        (None without verification), ``model`` (3 x 3, None where there is none), ``drawn`` (matches in the picture, at
        most ``DRAWN`` of them, chosen at random) and ``picture`` (path or None).

    Raises:
        ValueError: unknown model, or a file that is not an image.
        OSError: an image cannot be opened.
    """
    if verify not in VERIFICATIONS:
        raise ValueError(f"unknown verification {verify!r}: choose one of {', '.join(VERIFICATIONS)}")
    image0, image1 = read_image(path0), read_image(path1)
    features0, features1 = method(image0), method(image1)
    matches = mutual_matches(features0, features1, ratio=ratio)
    points0, points1 = features0["keypoints"][matches[:, 0]], features1["keypoints"][matches[:, 1]]
    model, inliers = (None, None) if verify == "none" else estimate(points0, points1, model=verify)
    if output is not None:
        order = np.random.default_rng(0).permutation(len(matches))[:DRAWN]  # a fair sample of right and wrong ones
        colors = None
        if inliers is not None:
            order = order[np.argsort(inliers[order], kind="stable")]
            colors = inlier_colors(inliers[order])
        save_png(output, draw_matches(image0, image1, points0[order], points1[order], colors=colors))
    return {
        "image0": str(path0),
        "image1": str(path1),
        "method": method.name,
        "keypoints0": len(features0["keypoints"]),
        "keypoints1": len(features1["keypoints"]),
        "matches": len(matches),
        "inliers": None if inliers is None else int(inliers.sum()),
        "model": None if model is None else model.tolist(),
        "drawn": 0 if output is None else min(len(matches), DRAWN),
        "picture": None if output is None else str(output),
    }


def mutual_matches(
    features0: Mapping[str, Any], features1: Mapping[str, Any], *, ratio: float | None = None
) -> np.ndarray:
    """int64 [M, 2]: indices of mutual nearest neighbours by the dot product of descriptors, arrays or tensors."""
    from samfeat.student.matching import match

    return match(features0, features1, ratio=ratio)["matches"].cpu().numpy()


def matched_points(features0: Mapping[str, Any], features1: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """float64 [M, 2] in image 0 and in image 1: the mutual nearest neighbours, arrays on the CPU from either kind."""
    import torch

    matches = mutual_matches(features0, features1)
    points0, points1 = (torch.as_tensor(f["keypoints"]).cpu().double().numpy() for f in (features0, features1))
    return points0[matches[:, 0]], points1[matches[:, 1]]


def estimate(
    points0: np.ndarray, points1: np.ndarray, *, model: Literal["fundamental", "homography"]
) -> tuple[np.ndarray | None, np.ndarray]:
    """The model (3 x 3) that most matches agree with by MAGSAC++ (Barath et al., CVPR 2020), and bool [M], who does.

    Too few matches for any model give None and no inlier.
    """
    nobody = np.zeros(len(points0), bool)
    if len(points0) < (8 if model == "fundamental" else 4):
        return None, nobody
    points0, points1 = points0.astype(np.float64), points1.astype(np.float64)
    found: np.ndarray | None
    if model == "fundamental":
        found, mask = cv2.findFundamentalMat(points0, points1, cv2.USAC_MAGSAC, THRESHOLDS[model], CONFIDENCE, TRIALS)
    else:
        found, mask = cv2.findHomography(
            points0, points1, cv2.USAC_MAGSAC, THRESHOLDS[model], maxIters=TRIALS, confidence=CONFIDENCE
        )
    return (None, nobody) if found is None else (found, mask.ravel().astype(bool))
