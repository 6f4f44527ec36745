"""Detector labels: known corners, views, borders, and the choice of the best."""

import dataclasses
import json

import cv2
import numpy as np
import pytest

from samfeat.teacher_cache.keypoints import (
    DETECTORS,
    LabelConfig,
    adapt,
    opencv_detector,
    random_homography,
    transform,
)
from samfeat.teacher_cache.schema import MAX_KEYPOINTS

TURN = np.vstack([cv2.getRotationMatrix2D((79.5, 79.5), 25, 1), [0, 0, 1]])


def checkerboard(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A 160 x 160 board of 32-pixel squares of random greys, blurred a little, and its 16 inner corners (x, y)."""
    shade = np.random.default_rng(seed).integers(0, 60, (5, 5)) + 180 * (np.indices((5, 5)).sum(0) % 2)
    image = np.kron(shade, np.ones((32, 32))).astype(np.uint8)
    x, y = np.meshgrid(np.arange(1, 5) * 32 - 0.5, np.arange(1, 5) * 32 - 0.5)
    image = cv2.GaussianBlur(image, (0, 0), 0.8)
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB), np.stack([x.ravel(), y.ravel()], axis=1)


def label(image: np.ndarray, **changes: object) -> np.ndarray:
    config = LabelConfig(**{"max_keypoints": 16, **changes})
    return adapt(image, opencv_detector(config.detector), config, seed=3)


def distances(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None, :2] - corners[None], axis=-1)


@pytest.mark.parametrize(("detector", "error"), [("gftt", 1.0), ("harris", 1.5)])
def test_labels_lie_on_the_corners(detector: str, error: float) -> None:
    """Harris' measure peaks on the brighter side of a corner, about a pixel off."""
    image, corners = checkerboard()
    points = label(image, detector=detector)
    distance = distances(points, corners)
    assert len(points) == len(corners)
    assert distance.min(axis=0).max() < error
    assert distance.min(axis=1).max() < error


def test_labels_turn_with_the_image() -> None:
    image, corners = checkerboard()
    turned = cv2.warpPerspective(image, TURN, (160, 160), borderMode=cv2.BORDER_REPLICATE)
    inner = corners[((transform(corners, TURN) > 20) & (transform(corners, TURN) < 140)).all(axis=1)]
    distance = distances(label(turned, max_keypoints=60, detector="gftt"), transform(inner, TURN))
    assert len(inner) >= 8
    assert distance.min(axis=0).max() < 1.5


def test_the_best_labels_of_the_whole_image_stay() -> None:
    """Weak corners above, strong ones below: with room for half of them, the strong ones stay."""
    image = np.full((200, 200, 3), 128, np.uint8)
    for y in range(20, 200, 40):
        for x in range(20, 200, 40):
            image[y : y + 15, x : x + 15] = 128 + (12 if y < 100 else 110)
    points = label(image, max_keypoints=30)
    assert len(points) >= 20
    assert (points[:, 1] > 98).all()
    assert (np.diff(points[:, 2]) <= 0).all()


def test_a_flat_image_has_no_labels() -> None:
    for detector in DETECTORS:
        assert label(np.full((64, 64, 3), 90, np.uint8), detector=detector, homographies=4).shape == (0, 3)


def test_points_near_the_frame_are_not_believed() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    noise = cv2.GaussianBlur(noise, (0, 0), 1.5)
    options = {"homographies": 0, "threshold": 0.0, "max_keypoints": 200}
    inner, outer = (label(noise, border=border, **options) for border in (6, 0))
    assert (inner[:, :2] >= 5.5).all()
    assert (inner[:, :2] <= (113.5, 83.5)).all()
    assert ((outer[:, :2] < 5.5) | (outer[:, :2] > (113.5, 83.5))).any()


def test_points_near_the_frame_take_no_votes() -> None:
    image = np.full((120, 120, 3), 100, np.uint8)
    for at in range(4, 120, 12):
        image[[1, 1, -2, -2], [at, at + 1, at, at + 1]] = image[[at, at + 1, at, at + 1], [1, 1, -2, -2]] = 255
    centres = np.array([(x, y) for x in (30, 60, 90) for y in (30, 60, 90)])
    for x, y in centres.tolist():
        image[y, x] = 150
    points = label(image, homographies=0, threshold=0.0, border=8, max_keypoints=9)
    assert len(points) == 9
    assert distances(points, centres).min(axis=0).max() < 2


def config_and_detector() -> tuple:
    return opencv_detector("gftt"), LabelConfig(max_keypoints=200)


def test_labels_depend_on_the_seed_alone() -> None:
    image, _ = checkerboard()
    detector, config = config_and_detector()
    runs = [adapt(image, detector, config, seed=seed) for seed in (1, 1, 2)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_labels_keep_their_distance_and_their_range() -> None:
    image = np.random.default_rng(0).integers(0, 256, (80, 90, 3)).astype(np.uint8)
    points = label(cv2.GaussianBlur(image, (0, 0), 1.5), max_keypoints=100, nms_radius=5)
    gap = np.abs(points[:, None, :2] - points[None, :, :2]).max(-1) + 99 * np.eye(len(points))
    assert len(points) > 20
    assert gap.min() > 5  # labels are more than 5 pixels apart before each moves by up to half a pixel
    assert (points[:, :2] > -0.5).all()
    assert (points[:, :2] < (89.5, 79.5)).all()
    assert (points[:, 2] > 0).all()
    assert (points[:, 2] <= 1).all()
    assert points.dtype == np.float32


def test_any_callable_on_rgb_is_a_detector() -> None:
    """A detector of the colour red, which no grey image shows."""

    def red_spots(image: np.ndarray) -> np.ndarray:
        mask = (image[..., 0] > 180) & (image[..., 1] < 90)
        _, _, _, centres = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
        return np.column_stack([centres[1:], np.ones(len(centres) - 1)]).astype(np.float32)

    image = np.full((90, 120, 3), 120, np.uint8)
    centres = np.array([[30, 40], [80, 30], [70, 65]])
    for x, y in centres.tolist():
        cv2.circle(image, (x, y), 4, (255, 30, 30), -1)
    points = adapt(image, red_spots, LabelConfig(max_keypoints=10), seed=0)
    assert len(points) == 3
    assert distances(points, centres).min(axis=1).max() < 0.6


def test_a_view_is_a_view() -> None:
    """The four corners of every view lie in front of the camera, and most of the image is seen."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        homography = random_homography((120, 160), rng)
        corners = np.array([[0, 0, 1], [159, 0, 1], [159, 119, 1], [0, 119, 1]]) @ np.linalg.inv(homography).T
        assert (corners[:, 2] > 0).all()
        shares.append(cv2.warpPerspective(np.ones((120, 160)), homography, (160, 120), flags=0 | 16).mean())
    assert 0.4 < np.mean(shares) < 0.8


@pytest.mark.parametrize("name", DETECTORS)
def test_opencv_detectors_give_points_with_responses(name: str) -> None:
    points = opencv_detector(name)(checkerboard()[0])
    assert points.dtype == np.float32
    assert points.shape[1:] == (3,)
    assert len(points) > 0
    assert (points[:, 2] > 0).any()
    assert (points[:, :2] >= 0).all()
    assert (points[:, :2] <= 159).all()


def test_unknown_names_and_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'surf'.*gftt"):
        opencv_detector("surf")
    for wrong in (
        {"homographies": -1},
        {"threshold": 1.5},
        {"max_keypoints": 0},
        {"max_keypoints": MAX_KEYPOINTS + 1},
        {"nms_radius": -1},
    ):
        with pytest.raises(ValueError, match=r"got|choose"):
            LabelConfig(**wrong)
    with pytest.raises(ValueError, match="uint8"):
        adapt(np.zeros((10, 10), np.uint8), opencv_detector("gftt"), LabelConfig(), seed=0)


def test_the_config_is_json() -> None:
    config = LabelConfig(detector="sift")
    assert LabelConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
