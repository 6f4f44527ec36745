"""Detector labels by homographic adaptation: an image and any detector -> points that are stable across views.

DeTone et al. 2018 (SuperPoint), section 5: a detector is run on many warped copies of an image, and a point's score is
its average vote over the copies that can see it. A copy's vote is 1 for its strongest point and falls to 0 with the
rank, so detectors need no common response scale. The best points of the whole image are kept, regardless of where they
are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from samfeat.teacher_cache.schema import MAX_KEYPOINTS

Detector = Callable[[np.ndarray], np.ndarray]
"""RGB uint8 [H, W, 3] -> float32 [K, 3]: x, y in pixels and a response (higher is better), in any order."""

_OPENCV: dict[str, Callable[[], cv2.Feature2D]] = {
    "agast": lambda: cv2.AgastFeatureDetector.create(),
    "akaze": lambda: cv2.AKAZE.create(threshold=1e-4),
    "brisk": lambda: cv2.BRISK.create(thresh=10),
    "fast": lambda: cv2.FastFeatureDetector.create(threshold=5),
    "gftt": lambda: cv2.GFTTDetector.create(maxCorners=0, qualityLevel=1e-3, minDistance=3),
    "harris": lambda: cv2.GFTTDetector.create(maxCorners=0, qualityLevel=1e-5, minDistance=3, useHarrisDetector=True),
    "kaze": lambda: cv2.KAZE.create(threshold=1e-4),
    "orb": lambda: cv2.ORB.create(nfeatures=5000, fastThreshold=5),
    "sift": lambda: cv2.SIFT.create(contrastThreshold=0.01),
}

DETECTORS = tuple(_OPENCV)
"""Names that :func:`opencv_detector` knows. ``gftt`` is Shi & Tomasi's corner measure."""

VOTES = 1.5  # votes of a full view per label wanted: views do not find exactly the same points
VOTE_SIGMA = 1.0  # pixels; detections of one point in two views agree to about this
QUORUM = 0.25  # a pixel seen by a smaller share of views counts as seen by this share


@dataclass(frozen=True)
class LabelConfig:
    """How detector labels are made; every field is part of a store's provenance.

    Harris corners are the default. Of OpenCV's detectors (``tests/benchmarks/bench_detectors.py``: 300 points, images
    of 400 pixels, repeated within one pixel) their adapted labels do best under random homographies of photographs,
    0.63, and within 0.01 of the best between the views of the Oxford sequences, 0.57; unadapted they reach 0.48 and
    0.51. No other detector is adapted faster.

    Attributes:
        detector: name of the base detector: one of ``DETECTORS``, or the caller's name for its own.
        weights: the weights file, if the base detector is a network.
        homographies: random views besides the image itself. With 0 the detector's own points are the labels, at its
            own sub-pixel positions: for detectors that are already precise and repeatable.
        threshold: minimum score of a label; 0 to 1.
        nms_radius: of two labels this close in both x and y, in pixels, the better one is kept.
        max_keypoints: labels kept, the best of the whole image; a view has ``VOTES`` times as many votes.
        border: detections this close to the edge of a view's visible area are ignored, in pixels.
    """

    detector: str = "harris"
    weights: str = ""
    homographies: int = 24
    threshold: float = 0.05
    nms_radius: int = 4
    max_keypoints: int = 512
    border: int = 4

    def __post_init__(self) -> None:
        if min(self.homographies, self.nms_radius, self.border) < 0:
            raise ValueError(
                "homographies, nms_radius and border are at least 0, got "
                f"{self.homographies}, {self.nms_radius} and {self.border}"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a score, 0 to 1, got {self.threshold}")
        if not 1 <= self.max_keypoints <= MAX_KEYPOINTS:
            raise ValueError(f"max_keypoints is 1 to {MAX_KEYPOINTS}, got {self.max_keypoints}")


def opencv_detector(name: str) -> Detector:
    """One of OpenCV's detectors, set to find weak points too, so that the response decides which are kept.

    Raises:
        ValueError: ``name`` is not in ``DETECTORS``.
    """
    if name not in _OPENCV:
        raise ValueError(f"no detector is called {name!r}: choose one of {', '.join(DETECTORS)}")

    def detect(image: np.ndarray) -> np.ndarray:
        found = _OPENCV[name]().detect(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)
        return np.array([(*point.pt, point.response) for point in found], np.float32).reshape(-1, 3)

    return detect


def adapt(image: np.ndarray, detector: Detector, config: LabelConfig, *, seed: int) -> np.ndarray:
    """Labels of one image by homographic adaptation.

    Args:
        image: uint8 [H, W, 3], RGB.
        detector: the detector to adapt, ``opencv_detector(config.detector)`` or any other.
        config: numbers of views and points; its ``detector`` is ignored.
        seed: seed of the random views. Equal arguments give equal labels.

    Returns:
        float32 [K, 3]: x, y in pixels, to a fraction of a pixel, and the score in [0, 1] (mean vote of the views that
        see the point), best first.

    Raises:
        ValueError: ``image`` is not uint8 [H, W, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is uint8 [H, W, 3] in RGB, got {image.dtype} {image.shape}")
    size = image.shape[:2]
    if config.homographies == 0:
        return _strongest(detector(image), size, config)
    rng = np.random.default_rng(seed)
    views = [np.eye(3), *(random_homography(size, rng) for _ in range(config.homographies))]
    votes, seen = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for homography in views:
        found, visible = _vote(image, detector, homography, config)
        votes += found
        seen += visible
    return _best_maxima(votes / np.maximum(seen, QUORUM * len(views)), config)


def random_homography(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random view of an image of ``size`` = (height, width): float64 [3, 3], pixels of the image -> of the view.

    A centred frame of 0.85 of the image is distorted (each corner by up to 0.15 of a half side), scaled by 0.7 to 1.4,
    rotated by up to 60 degrees and shifted by up to 0.15 of a half side; it then fills a view of the same size. Milder
    than the student's training views, since labels need points that most views can see.
    """
    corners = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    half = np.array([size[1], size[0]]) / 2
    angle, scale = rng.uniform(-np.pi / 3, np.pi / 3), 2 ** rng.uniform(-0.5, 0.5)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    bent = 0.85 * (corners + rng.uniform(-0.15, 0.15, (4, 2)))
    frame = (bent * half) @ turn.T + rng.uniform(-0.15, 0.15, 2) * half
    source, target = frame + half - 0.5, corners * half + half - 0.5
    return cv2.getPerspectiveTransform(source.astype(np.float32), target.astype(np.float32))


def transform(points: np.ndarray, homography: np.ndarray) -> np.ndarray:
    """Points (x, y) through a homography: float [K, 2] -> float64 [K, 2]."""
    mapped = points @ homography[:, :2].T + homography[:, 2]
    return mapped[:, :2] / mapped[:, 2:]


def _vote(
    image: np.ndarray, detector: Detector, homography: np.ndarray, config: LabelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """One view's votes for the image's pixels, in [0, 1], and their visibility, 0 or 1; both float32 [H, W]."""
    height, width = image.shape[:2]
    view = cv2.warpPerspective(image, homography, (width, height), borderMode=cv2.BORDER_REFLECT_101)  # no black frame
    whole = np.ones((height, width), np.uint8)
    covered = cv2.warpPerspective(whole, homography, (width, height), flags=cv2.INTER_NEAREST)
    reach = 2 * config.border + 1
    inside = cv2.erode(covered, np.ones((reach, reach), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    back = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    visible = cv2.warpPerspective(inside, homography, (width, height), flags=back).astype(np.float32)

    found = detector(view)
    column, row = np.clip(np.rint(found[:, :2]).astype(int), 0, (width - 1, height - 1)).T
    found = found[inside[row, column] > 0]
    believed = max(1, round(VOTES * config.max_keypoints * float(inside.mean())))
    found = found[np.argsort(-found[:, 2], kind="stable")[:believed]]
    weight = (1 - np.arange(len(found)) / believed).astype(np.float32)
    column, row = np.rint(transform(found[:, :2], np.linalg.inv(homography))).astype(int).T
    kept = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    votes = np.zeros((height, width), np.float32)
    np.maximum.at(votes, (row[kept], column[kept]), weight[kept])
    votes = 2 * np.pi * VOTE_SIGMA**2 * cv2.GaussianBlur(votes, (0, 0), VOTE_SIGMA)  # a lone vote keeps its height
    return np.minimum(votes, 1) * visible, visible


def _strongest(found: np.ndarray, size: tuple[int, int], config: LabelConfig) -> np.ndarray:
    """The best detections of one image, none within the radius of a better one: float32 [K, 3] of (x, y, score)."""
    (height, width), radius, border = size, config.nms_radius, config.border
    x, y = found[:, 0], found[:, 1]
    inside = (x >= border) & (y >= border) & (x <= width - 1 - border) & (y <= height - 1 - border)
    found = found[inside & (found[:, 2] >= config.threshold)]
    free = np.ones(size, bool)
    kept: list[int] = []
    for k in np.argsort(-found[:, 2], kind="stable"):
        column, row = np.rint(found[k, :2]).astype(int)
        if free[row, column]:
            free[max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1] = False
            kept.append(int(k))
    return found[kept[: config.max_keypoints]].astype(np.float32)


def _best_maxima(share: np.ndarray, config: LabelConfig) -> np.ndarray:
    """The highest local maxima of a map in [0, 1]: float32 [K, 3] of (x, y, score), best first."""
    radius = config.nms_radius
    around = cv2.dilate(share, np.ones((2 * radius + 1, 2 * radius + 1), np.uint8))
    peak = (share == around) & (share >= max(config.threshold, 1e-6))
    row, column = np.nonzero(peak)
    free = np.ones(share.shape, bool)
    kept: list[tuple[float, float, float]] = []
    for i in np.argsort(-share[row, column], kind="stable"):
        y, x = row[i], column[i]
        if not free[y, x]:  # a plateau has several equal maxima
            continue
        free[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = False
        kept.append((x + _offset(share[y, :], x), y + _offset(share[:, x], y), share[y, x]))
        if len(kept) == config.max_keypoints:
            break
    return np.array(kept, np.float32).reshape(-1, 3)


def _offset(line: np.ndarray, at: int) -> float:
    """Position of the top of the parabola through three neighbours of a maximum, relative to it: -0.5 to 0.5."""
    if not 0 < at < len(line) - 1:
        return 0.0
    before, here, after = (float(value) for value in line[at - 1 : at + 2])
    curvature = before - 2 * here + after
    return 0.5 * (before - after) / curvature if curvature < 0 else 0.0
