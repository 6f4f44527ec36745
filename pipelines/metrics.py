"""Metrics shared by training and evaluation: matches and their errors, MMA, areas under curves, repeatability.

Points are (x, y) in pixels, (0, 0) is the centre of the top-left pixel. Homographies are [3, 3], from pixels of image 0
to pixels of image 1. Errors are distances in pixels; infinity stands for a failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from samfeat.student.matching import match

MMA_THRESHOLDS = tuple(range(1, 11))  # pixels


def mutual_matches(
    features0: Mapping[str, Any], features1: Mapping[str, Any], *, ratio: float | None = None
) -> np.ndarray:
    """int64 [M, 2]: indices of mutual nearest neighbours by the dot product of descriptors, arrays or tensors.

    With a ratio, descriptors are compared at unit length (see :func:`samfeat.student.matching.match`).
    """
    return match(features0, features1, ratio=ratio, cosine=ratio is not None)["matches"].cpu().numpy()


def matched_points(
    features0: Mapping[str, Any], features1: Mapping[str, Any], *, ratio: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [M, 2] in image 0 and in image 1: the points of :func:`mutual_matches`."""
    matches = mutual_matches(features0, features1, ratio=ratio)
    points0, points1 = (torch.as_tensor(f["keypoints"]).cpu().double().numpy() for f in (features0, features1))
    return points0[matches[:, 0]], points1[matches[:, 1]]


def match_errors(features0: Mapping[str, Any], features1: Mapping[str, Any], homography: np.ndarray) -> np.ndarray:
    """float64 [M]: distance in image 1 of every mutual nearest neighbour from its true position.

    Args:
        features0: ``keypoints`` [K, 2] and ``descriptors`` [K, D], arrays or tensors.
        features1: the same of the other image.
        homography: the true one.
    """
    return transfer_errors(*matched_points(features0, features1), homography)


def transfer_errors(points0: np.ndarray, points1: np.ndarray, homography: np.ndarray) -> np.ndarray:
    """float64 [M]: distance between ``points0`` [M, 2] through a homography and ``points1`` [M, 2]."""
    return _distances(_project(points0, homography), points1)


def mma(errors: Sequence[np.ndarray], thresholds: Sequence[float] = MMA_THRESHOLDS) -> np.ndarray:
    """Mean matching accuracy, float64 [T] in [0, 1] (D2-Net, Dusmanu et al., CVPR 2019).

    Args:
        errors: one array of match errors per pair; a pair without matches counts as 0.
        thresholds: in pixels; an error equal to the threshold counts as correct.

    Raises:
        ValueError: no pair.
    """
    if len(errors) == 0:
        raise ValueError("mean matching accuracy needs at least one pair of images, got none")
    limits = np.asarray(thresholds, np.float64)
    shares = [(np.asarray(e)[:, None] <= limits).mean(0) if len(e) else np.zeros(len(limits)) for e in errors]
    return np.mean(shares, axis=0)


def corner_error(estimated: np.ndarray | None, homography: np.ndarray, image_size: tuple[int, int]) -> float:
    """Mean distance between the four corners of an image as mapped by two homographies.

    Args:
        estimated: [3, 3]; None means that the estimation failed, and its error is infinite.
        homography: [3, 3], the true one.
        image_size: (height, width); the corners are the centres of the outermost pixels.
    """
    if estimated is None:
        return float("inf")
    height, width = image_size
    corners = np.array([(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)], np.float64)
    return float(_distances(_project(corners, estimated), _project(corners, homography)).mean())


def error_auc(errors: Sequence[float] | np.ndarray, thresholds: Sequence[float]) -> list[float]:
    """Area under the recall curve of errors up to each threshold, divided by it: in [0, 1], as SuperGlue computes it.

    Recall rises linearly from one sorted error to the next (Sarlin et al., CVPR 2020).

    Args:
        errors: one per pair, not negative; infinity for a failure.
        thresholds: positive, in the unit of the errors.

    Raises:
        ValueError: no error.
    """
    if len(errors) == 0:
        raise ValueError("the area under a recall curve needs at least one pair, got none")
    limits = np.concatenate([[0.0], np.sort(np.asarray(errors, np.float64))])
    recall = np.arange(len(limits)) / (len(limits) - 1)
    areas = []
    for threshold in thresholds:
        end = max(1, int(np.searchsorted(limits, threshold)))
        x, y = np.append(limits[:end], threshold), np.append(recall[:end], recall[end - 1])
        areas.append(float(np.trapezoid(y, x) / threshold))
    return areas


def repeatability(
    points0: np.ndarray, points1: np.ndarray, homography: np.ndarray, size: tuple[int, int], *, radius: float = 3
) -> float:
    """Repeatability: fraction of the points in the common area of two images that are found in both.

    As in DeTone et al. 2018, appendix A: points outside the other image are left out; a point is repeated if the other
    image has a point within ``radius`` of its mapped position, measured in image 1 for the points of image 0 and in
    image 0 for those of image 1; the fraction is taken over the points of both.

    Args:
        points0: float [K, 2 or more], (x, y, ...) in image 0.
        points1: float [L, 2 or more], in image 1.
        homography: the true one.
        size: (height, width) of both images.
        radius: pixels.

    Returns:
        0 to 1; nan where neither image has a point in the common area.
    """
    from scipy.spatial import KDTree

    backward = np.linalg.inv(homography)
    limit = np.array([size[1], size[0]]) - 0.5

    def shown(points: np.ndarray, onward: np.ndarray) -> np.ndarray:
        mapped = _project(points, onward)
        return points[((mapped >= -0.5) & (mapped < limit)).all(axis=1)]

    common0, common1 = shown(points0[:, :2], homography), shown(points1[:, :2], backward)
    if not len(common0) + len(common1):
        return float("nan")
    if not len(common0) or not len(common1):
        return 0.0
    nearest0, _ = KDTree(common1).query(_project(common0, homography))
    nearest1, _ = KDTree(common0).query(_project(common1, backward))
    return float(np.mean(np.concatenate([nearest0, nearest1]) <= radius))


def _project(points: np.ndarray, homography: np.ndarray) -> np.ndarray:
    projected = np.pad(points, ((0, 0), (0, 1)), constant_values=1) @ np.asarray(homography, np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return projected[:, :2] / projected[:, 2:]


def _distances(points0: np.ndarray, points1: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.linalg.norm(points0 - points1, axis=1), nan=np.inf, posinf=np.inf)
