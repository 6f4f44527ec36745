"""Detector labels by homographic adaptation: an image and any detector -> points that survive changes of view.

DeTone et al. 2018 (SuperPoint), section 5: a detector is run on many warped copies of an image; a point counts for as
much as the share of the copies that could see it and found it. Unlike label sets made by keeping the first points in
raster order, the best points of the whole image are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial import cKDTree

from samfeat.teacher_cache.schema import MAX_KEYPOINTS

Detector = Callable[[np.ndarray], np.ndarray]
"""RGB uint8 [H, W, 3] -> float32 [K, 3]: x, y in pixels and a response, higher is better. Any order."""

SHI_TOMASI_POINTS = 2000
SHI_TOMASI_DISTANCE = 4  # pixels
VOTE_SIGMA = 1.0  # pixels; how far apart two detections of one point may lie


@dataclass(frozen=True)
class LabelConfig:
    """How detector labels are made; every field is part of a store's provenance.

    Attributes:
        detector: base detector, one of ``DETECTORS``.
        homographies: random warps besides the unwarped image.
        points: detections that are used of each view, best responses first.
        threshold: least share of the views, of those that see a point, that must have found it; 0 to 1.
        nms_radius: no two labels are closer than this in x and in y, in pixels.
        max_keypoints: labels kept, the best of the whole image.
        border: detections this close to the edge of what a view sees are not believed, in pixels.
    """

    detector: str = "gftt"
    homographies: int = 24
    points: int = 500
    threshold: float = 0.2
    nms_radius: int = 4
    max_keypoints: int = 512
    border: int = 4

    def __post_init__(self) -> None:
        opencv_detector(self.detector)
        if self.homographies < 0 or self.points < 1 or self.nms_radius < 0 or self.border < 0:
            raise ValueError(
                "homographies, nms_radius and border are at least 0 and points at least 1, got "
                f"{self.homographies}, {self.nms_radius}, {self.border} and {self.points}"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a share of the views between 0 and 1, got {self.threshold}")
        if not 1 <= self.max_keypoints <= MAX_KEYPOINTS:
            raise ValueError(f"max_keypoints is between 1 and {MAX_KEYPOINTS}, got {self.max_keypoints}")


def adapt(image: np.ndarray, detector: Detector, config: LabelConfig, *, seed: int) -> np.ndarray:
    """Labels of one image by homographic adaptation.

    Args:
        image: uint8 [H, W, 3], RGB.
        detector: what is adapted; ``config.detector`` is not looked at.
        config: numbers of views and points.
        seed: of the random homographies. Equal arguments give equal labels.

    Returns:
        float32 [K, 3]: x, y in pixels (refined below a pixel) and a score in [0, 1], best first.

    Raises:
        ValueError: ``image`` is not uint8 [H, W, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is uint8 [H, W, 3] in RGB, got {image.dtype} {image.shape}")
    size = image.shape[:2]
    rng = np.random.default_rng(seed)
    votes, seen = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for homography in [np.eye(3)] + [random_homography(size, rng) for _ in range(config.homographies)]:
        found, visible = _view(image, detector, homography, config)
        votes += found
        seen += visible
    share = np.divide(votes, seen, out=np.zeros_like(votes), where=seen > 0)
    return _best_maxima(share, config)


def random_homography(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Random view of an image: float64 [3, 3], from its pixels to those of a view of the same size.

    A centred rectangle of 0.85 of the image's sides is bent (perspective up to 0.15 of a side), scaled by 0.7 to 1.4,
    turned by up to 60 degrees and moved, and is then seen as the whole view.
    """
    corners = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    aspect = np.array([size[1], size[0]]) / 2
    quad = 0.85 * corners * (1 + rng.uniform(-0.15, 0.15, (4, 2)))
    angle, scale = rng.uniform(-np.pi / 3, np.pi / 3), 2 ** rng.uniform(-0.5, 0.5)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    quad = quad * aspect @ turn.T + rng.uniform(-0.15, 0.15, 2) * aspect
    centre = (np.array([size[1], size[0]]) - 1) / 2
    source, target = quad + centre, corners * aspect + centre
    return cv2.getPerspectiveTransform(source.astype(np.float32), target.astype(np.float32))


def transform(points: np.ndarray, homography: np.ndarray) -> np.ndarray:
    """Points (x, y) through a homography: float [K, 2] -> float64 [K, 2]."""
    mapped = np.column_stack([points, np.ones(len(points))]) @ homography.T
    return mapped[:, :2] / mapped[:, 2:]


def repeatability(
    points0: np.ndarray, points1: np.ndarray, homography: np.ndarray, size: tuple[int, int], *, radius: float = 3
) -> float:
    """Share of the points in the common area of two images that were found in both (Mikolajczyk & Schmid 2004).

    Points of either image that fall outside the other are left out. A point is repeated where the other image has a
    point within ``radius`` of the place it is mapped to; the share is of the points of both images together, each
    measured in the other image, as SuperPoint's evaluation does (DeTone et al. 2018, section 7.2).

    Args:
        points0: float [K, 2 or more], (x, y, ...) in image 0.
        points1: float [L, 2 or more], in image 1.
        homography: pixels of image 0 -> pixels of image 1.
        size: (height, width) of image 1; image 0 has the same, or pass ``((h0, w0), (h1, w1))``.
        radius: pixels.

    Returns:
        0 to 1; nan where the common area holds no point.
    """
    raise NotImplementedError
