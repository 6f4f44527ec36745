"""Detector labels by homographic adaptation: an image and any detector -> points that are stable across views.

DeTone et al. 2018 (SuperPoint), section 5: a detector is run on many warped copies of an image, and a point's score is
its average vote over the copies that can see it. A copy's vote is 1 for its strongest point and falls to 0 with the
rank, so detectors need no common response scale. Votes are collected at sub-pixel positions and blurred once. The best
points of the whole image are kept, regardless of where they are.
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
    "kaze": lambda: cv2.KAZE.create(threshold=1e-4),
    "orb": lambda: cv2.ORB.create(nfeatures=5000, fastThreshold=5),
    "sift": lambda: cv2.SIFT.create(contrastThreshold=0.01),
}

_CORNERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "gftt": (lambda gray: cv2.cornerMinEigenVal(gray, blockSize=3, ksize=3), 1e-3),
    "harris": (lambda gray: cv2.cornerHarris(gray, blockSize=3, ksize=3, k=0.04), 1e-5),
}
"""Corner measures, and the share of an image's highest value from which a maximum counts."""

DETECTORS = tuple(sorted((*_OPENCV, *_CORNERS)))
"""Names that :func:`opencv_detector` knows. ``gftt`` is Shi & Tomasi's corner measure."""

VOTES = 1.5  # votes of a full view per label wanted: views do not find exactly the same points
VOTE_SIGMA = 1.0  # pixels; detections of one point in two views agree to about this
QUORUM = 0.25  # a pixel seen by a smaller share of views counts as seen by this share


@dataclass(frozen=True)
class LabelConfig:
    """How detector labels are made; every field is part of a store's provenance.

    Harris corners are the default. Of OpenCV's detectors (``tests/benchmarks/bench_detectors.py``: 300 points, images
    of 400 pixels, repeated within one pixel) their adapted labels do best under random homographies of photographs,
    0.63, and as well as the best, AKAZE's, between the views of the Oxford sequences, 0.59; unadapted they reach 0.48
    and 0.50. Only Shi & Tomasi's corners are adapted as fast.

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
    homographies: int = 14
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
    if name not in DETECTORS:
        raise ValueError(f"no detector is called {name!r}: choose one of {', '.join(DETECTORS)}")

    def detect(image: np.ndarray) -> np.ndarray:
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if name in _CORNERS:
            measure, share = _CORNERS[name]
            return _maxima(measure(gray), share)
        found = _OPENCV[name]().detect(gray, None)
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
    if min(size) <= 2 * config.border + 1:  # nothing is far enough from the frame
        return np.zeros((0, 3), np.float32)
    points, weights, visible = zip(*(_vote(image, detector, homography, config) for homography in views))
    seen = np.sum(visible, axis=0, dtype=np.float32)
    votes = cv2.GaussianBlur(_splat(np.concatenate(points), np.concatenate(weights), size), (0, 0), VOTE_SIGMA)
    votes = votes * np.float32(2 * np.pi * VOTE_SIGMA**2)  # a lone vote keeps its height
    return _best_maxima(np.minimum(votes / np.maximum(seen, QUORUM * len(views)), 1), config)


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


def _maxima(measure: np.ndarray, share: float) -> np.ndarray:
    """Pixels highest in their 5 x 5 neighbourhood and above a share of the highest: float32 [K, 3] of (x, y, value)."""
    highest = cv2.dilate(measure, np.ones((5, 5), np.uint8))
    at = np.flatnonzero((measure == highest) & (measure > share * max(0.0, float(measure.max()))))
    row, column = np.divmod(at, measure.shape[1])
    return np.column_stack([column, row, measure.ravel()[at]]).astype(np.float32)


def _vote(
    image: np.ndarray, detector: Detector, homography: np.ndarray, config: LabelConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One view's votes: points of the image, float64 [K, 2], their weights in [0, 1], and visibility, uint8 [H, W]."""
    (height, width), border = image.shape[:2], config.border
    view = image
    if not np.array_equal(homography, np.eye(3)):  # mirrored, so that no black frame is detected
        view = cv2.warpPerspective(image, homography, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    first, last = np.array([border, border]), np.array([width, height]) - 1 - border
    frame = np.array([first, (last[0], first[1]), last, (first[0], last[1])], np.float64)
    back = np.linalg.inv(homography)
    _, seen = cv2.intersectConvexConvex(frame.astype(np.float32), transform(frame, back).astype(np.float32))
    visible = np.zeros((height, width), np.uint8)
    if seen is not None:
        cv2.fillConvexPoly(visible, np.rint(seen.reshape(-1, 2)).astype(np.int32), 1)
    area, _ = cv2.intersectConvexConvex(frame.astype(np.float32), transform(frame, homography).astype(np.float32))

    found = detector(view)
    points = transform(found[:, :2].astype(np.float64), back)
    inside = ((found[:, :2] >= first) & (found[:, :2] <= last) & (points >= first) & (points <= last)).all(axis=1)
    believed = max(1, round(VOTES * config.max_keypoints * area / (width * height)))
    best = np.flatnonzero(inside)[np.argsort(-found[inside, 2], kind="stable")[:believed]]
    return points[best], 1 - np.arange(len(best)) / believed, visible


def _splat(points: np.ndarray, weights: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Weights divided bilinearly among the four pixels around each point: float32 [H, W]."""
    height, width = size
    corner = np.floor(points).astype(np.int64)
    right, below = (points - corner).T
    column, row = corner.T
    columns, rows = np.minimum(column + 1, width - 1), np.minimum(row + 1, height - 1)
    pixels = [row * width + column, row * width + columns, rows * width + column, rows * width + columns]
    shares = [(1 - below) * (1 - right), (1 - below) * right, below * (1 - right), below * right]
    weighted = np.concatenate([share * weights for share in shares])
    return np.bincount(np.concatenate(pixels), weighted, height * width).reshape(size).astype(np.float32)


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
    kept: list[tuple[int, int]] = []
    order = np.argsort(-share[row, column], kind="stable")
    for y, x in zip(row[order].tolist(), column[order].tolist()):
        if not free[y, x]:  # a plateau has several equal maxima
            continue
        free[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = False
        kept.append((y, x))
        if len(kept) == config.max_keypoints:
            break
    y, x = np.array(kept, np.int64).reshape(-1, 2).T
    wide = cv2.copyMakeBorder(share, 1, 1, 1, 1, cv2.BORDER_REFLECT_101).astype(np.float64)
    right = _offset(wide[y + 1, x], wide[y + 1, x + 1], wide[y + 1, x + 2])
    below = _offset(wide[y, x + 1], wide[y + 1, x + 1], wide[y + 2, x + 1])
    return np.column_stack([x + right, y + below, share[y, x]]).astype(np.float32)


def _offset(before: np.ndarray, here: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Tops of the parabolas through a maximum and its two neighbours, relative to the maximum: -0.5 to 0.5."""
    curvature = before - 2 * here + after
    return np.divide(0.5 * (before - after), curvature, out=np.zeros_like(here), where=curvature < 0)
