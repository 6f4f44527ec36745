"""Matches and their errors, MMA, areas under curves and repeatability: by hand, in closed form, by brute force."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from samfeat.pipelines.metrics import corner_error, error_auc, match_errors, mma, mutual_matches, repeatability
from samfeat.teacher_cache.keypoints import random_homography

SHIFT = np.array([[1.0, 0, 20], [0, 1, -10], [0, 0, 1]])


def features_at(points: list[tuple[float, float]]) -> dict[str, np.ndarray]:
    """Features that match those of equal rank, and nothing else."""
    return {"keypoints": np.array(points, np.float32), "descriptors": np.eye(8, dtype=np.float32)[: len(points)]}


def test_training_imports_no_evaluation_and_no_package_of_one():
    program = (
        "import sys, samfeat.pipelines.train\n"
        "heavy = {'pycolmap', 'h5py', 'poselib', 'segment_anything'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "ours = [name for name in sys.modules if name.startswith('samfeat.pipelines.evaluat')]\n"
        "assert not ours, ours"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mutual_matches_are_nearest_both_ways():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 8)).astype(np.float32), rng.normal(size=(30, 8)).astype(np.float32)
    dots = a @ b.T
    expected = [(i, j) for i in range(40) for j in range(30) if dots[i].argmax() == j and dots[:, j].argmax() == i]
    assert mutual_matches({"descriptors": a}, {"descriptors": b}).tolist() == [list(pair) for pair in expected]


def test_errors_are_distances_in_the_second_image():
    double = np.diag([2.0, 2.0, 1.0])
    errors = match_errors(features_at([(1, 2), (3, 4)]), features_at([(2, 4), (9, 8)]), double)
    assert errors.tolist() == [0, 3]
    tensors = [{key: torch.as_tensor(v) for key, v in features_at(p).items()} for p in ([(1, 2)], [(2, 7)])]
    assert match_errors(*tensors, torch.from_numpy(double).float().numpy()).tolist() == [3]


def test_errors_divide_by_the_third_coordinate_and_survive_its_zero():
    tilt = np.array([[1.0, 0, 0], [0, 1, 0], [-0.1, 0, 1]])
    errors = match_errors(features_at([(5, 3), (10, 3)]), features_at([(10, 6), (0, 0)]), tilt)
    assert errors[0] == pytest.approx(0)
    assert errors[1] == np.inf


def test_mma_is_the_mean_over_pairs_not_over_matches():
    errors = [np.array([0.5]), np.array([0.2, 1.0, 1.00001, 9.0]), np.zeros(0)]
    assert mma(errors, (1, 2, 10)) == pytest.approx([(1 + 2 / 4 + 0) / 3, (1 + 3 / 4) / 3, (1 + 1) / 3])
    with pytest.raises(ValueError, match="at least one"):
        mma([])


def test_corner_error_of_a_shift_is_its_length_and_of_a_scale_the_mean_over_corners():
    assert corner_error(SHIFT, np.eye(3), (20, 30)) == pytest.approx(np.hypot(20, 10))
    double = np.diag([2.0, 2.0, 1.0])
    assert corner_error(double, np.eye(3), (4, 5)) == pytest.approx((0 + 4 + 3 + 5) / 4)
    assert corner_error(3 * double, double, (4, 5)) == pytest.approx(0)  # homographies have no scale of their own
    assert corner_error(None, SHIFT, (4, 5)) == np.inf


def test_auc_by_hand():
    """One error of 2.5 and a failure: recall rises to 1/2 at 2.5 degrees and stays."""
    errors = [np.inf, 2.5]
    assert error_auc(errors, (5, 10)) == pytest.approx([(2.5 * 0.25 + 2.5 * 0.5) / 5, (2.5 * 0.25 + 7.5 * 0.5) / 10])
    assert error_auc([0, 0, 0], (5, 10, 20)) == [1, 1, 1]
    assert error_auc([np.inf, 30], (5, 20)) == [0, 0]
    with pytest.raises(ValueError, match="at least one"):
        error_auc([], (5,))


def test_auc_of_many_errors_is_the_area_above_their_mean():
    """For errors below t the area under the recall is 1 - mean(error) / t, but for the first step's triangle."""
    errors = np.random.default_rng(0).uniform(0, 10, 100_000)
    assert error_auc(errors, (10, 20)) == pytest.approx([1 - errors.mean() / 10, 1 - errors.mean() / 20], abs=1e-4)


def repeatability_by_hand(
    points0: np.ndarray, points1: np.ndarray, homography: np.ndarray, size: tuple[int, int], radius: float
) -> float:
    hits = total = 0
    for points, others, onward in ((points0, points1, homography), (points1, points0, np.linalg.inv(homography))):
        back = np.linalg.inv(onward)
        for point in points:
            x, y = cv2.perspectiveTransform(point[None, None, :2].astype(float), onward)[0, 0]
            if not (-0.5 <= x < size[1] - 0.5 and -0.5 <= y < size[0] - 0.5):
                continue
            total += 1
            for other in others:
                u, v = cv2.perspectiveTransform(other[None, None, :2].astype(float), back)[0, 0]
                seen = -0.5 <= u < size[1] - 0.5 and -0.5 <= v < size[0] - 0.5
                if seen and np.hypot(*(other[:2] - (x, y))) <= radius:
                    hits += 1
                    break
    return hits / total


@pytest.mark.parametrize("seed", range(4))
def test_repeatability_is_counted_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = (60, 80)
    homography = random_homography(size, rng)
    points0, points1 = rng.uniform(0, (79, 59), (40, 2)), rng.uniform(0, (79, 59), (30, 2))
    expected = repeatability_by_hand(points0, points1, homography, size, 4)
    assert 0 < expected < 1
    assert repeatability(points0, points1, homography, size, radius=4) == pytest.approx(expected)


def test_repeatability_of_perfect_absent_and_unseen_points() -> None:
    points = np.array([[10.0, 10.0], [50.0, 20.0]])
    shift = np.array([[1.0, 0, 30], [0, 1, 0], [0, 0, 1]])
    assert repeatability(points, points, np.eye(3), (40, 60), radius=1) == 1
    assert repeatability(points[:1], points[:1] + (30, 0), shift, (40, 60), radius=1) == 1
    assert repeatability(points, np.zeros((0, 2)), np.eye(3), (40, 60)) == 0
    assert np.isnan(repeatability(points[1:], np.zeros((0, 2)), shift, (40, 60)))
