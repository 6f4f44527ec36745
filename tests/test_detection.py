"""From detection maps to keypoints: suppression against the obvious loop, peaks against known quadratics."""

import cv2
import numpy as np
import pytest
import torch

from samfeat.student.detection import _pooled_max, detect, greedy_nms, subpixel_offsets, window_max


def greedy_loop(scores, candidates, radius):
    """Best first, raster order among equals; everything within the radius of a taken pixel is dropped."""
    height, width = scores.shape
    queue = [(-float(scores[y, x]), y, x) for y in range(height) for x in range(width) if candidates[y, x]]
    taken = []
    for _, y, x in sorted(queue):
        if all(abs(y - v) > radius or abs(x - u) > radius for v, u in taken):
            taken.append((y, x))
    return [y * width + x for y, x in taken]


def maps(kind, rng):
    noise = rng.standard_normal((37, 41)).astype(np.float32)
    return {
        "noise": noise,
        "smooth": cv2.GaussianBlur(noise, (0, 0), 2.5),
        "ties": np.round(noise),
        "plateaus": np.round(3 * cv2.GaussianBlur(noise, (0, 0), 2.5)),
        "constant": np.zeros_like(noise),
        "ramp": np.broadcast_to(np.arange(41, dtype=np.float32), noise.shape).copy(),
    }[kind]


@pytest.mark.parametrize("radius", [0, 1, 4, 60])
@pytest.mark.parametrize("kind", ["noise", "smooth", "ties", "plateaus", "constant", "ramp"])
def test_greedy_nms_equals_the_plain_loop(kind, radius):
    rng = np.random.default_rng(radius)
    scores = maps(kind, rng)
    for share in (1.0, 0.3):
        candidates = rng.random(scores.shape) < share
        (kept,) = greedy_nms(torch.from_numpy(scores)[None], torch.from_numpy(candidates)[None], radius=radius)
        assert kept.tolist() == greedy_loop(scores, candidates, radius)


def test_greedy_nms_keeps_the_maps_of_a_batch_apart():
    rng = np.random.default_rng(3)
    scores = np.stack([maps(kind, rng) for kind in ("smooth", "ties", "constant", "plateaus")])
    candidates = rng.random(scores.shape) < 0.5
    candidates[2] = False
    found = greedy_nms(torch.from_numpy(scores), torch.from_numpy(candidates), radius=3)
    for kept, score, candidate in zip(found, scores, candidates, strict=True):
        assert kept.tolist() == greedy_loop(score, candidate, 3)


def test_greedy_nms_differs_from_keeping_local_maxima():
    scores = torch.tensor([[[1.0, 2.0, 3.0, 2.5, 1.0]]])  # 2.5 is dropped by 3, so 1 at the end survives
    (kept,) = greedy_nms(scores, torch.ones_like(scores, dtype=torch.bool), radius=1)
    assert kept.tolist() == [2, 0, 4]


def test_greedy_nms_without_candidates():
    (kept,) = greedy_nms(torch.rand(1, 5, 6), torch.zeros(1, 5, 6, dtype=torch.bool), radius=4)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


@pytest.mark.parametrize("radius", [0, 1, 4])
def test_pooling_of_other_devices_gives_the_same_windows(radius):
    values = torch.rand((2, 23, 31), generator=torch.Generator().manual_seed(0))
    assert torch.equal(window_max(values, radius), _pooled_max(values, radius))
    assert torch.equal(window_max(values > 0.99, radius), _pooled_max(values > 0.99, radius))


def test_detect_thresholds_the_probability_and_includes_it():
    logits = torch.full((20, 30), -10.0)
    logits[8, 9], logits[8, 20], logits[15, 10] = 2.5, 0.0, -0.01
    assert detect(logits[None], 0.5, radius=4, border=4)[0].tolist() == [[8, 9], [8, 20]]


def test_detect_removes_the_border_after_suppression():
    logits = torch.full((20, 30), -10.0)
    logits[3, 10], logits[6, 10] = 5.0, 4.0  # the first lies in the border, yet drops the second
    logits[4, 25], logits[15, 4], logits[16, 15], logits[10, 26] = 3.0, 2.0, 2.0, 2.0
    assert detect(logits[None], 0.5, radius=4, border=4)[0].tolist() == [[4, 25], [15, 4]]
    assert detect(logits[None], 0.5, radius=4, border=0)[0].tolist() == [[3, 10], [4, 25], [10, 26], [15, 4], [16, 15]]


def test_saturated_probabilities_are_still_ordered():
    logits = torch.full((9, 30), -10.0)
    logits[4, 4], logits[4, 14], logits[4, 24] = 30.0, 50.0, 40.0  # sigmoid of all three is 1 in float32
    assert detect(logits[None], 0.5, radius=4, border=0)[0].tolist() == [[4, 14], [4, 24], [4, 4]]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("smooth", [0, 1, 6])
@pytest.mark.parametrize("limit", [1, 7, 60, 100_000])
def test_a_limit_keeps_the_best_of_all(limit, smooth, threshold):
    generator = torch.Generator().manual_seed(smooth)
    logits = torch.randn((2, 90, 130), generator=generator)
    if smooth:
        maps = [cv2.GaussianBlur(one.numpy(), (0, 0), smooth) for one in logits]
        logits = torch.from_numpy(np.round(4 * smooth * np.stack(maps), 1))  # with ties
    logits[1] -= 1
    every = detect(logits, threshold, radius=2, border=4)
    best = detect(logits, threshold, radius=2, border=4, limit=limit)
    assert [points.tolist() for points in best] == [points[:limit].tolist() for points in every]


def quadratic(peak_x, peak_y, *, a=-1.0, b=-0.7, c=0.4, shape=(15, 17)):
    y, x = np.mgrid[: shape[0], : shape[1]]
    u, v = x - peak_x, y - peak_y
    return torch.from_numpy(a * u * u + b * v * v + c * u * v)


@pytest.mark.parametrize(("x", "y"), [(8.0, 7.0), (8.3, 6.9), (7.6, 7.45), (8.5, 7.0)])
def test_subpixel_offsets_find_the_peak_of_a_quadratic(x, y):
    offsets = subpixel_offsets(quadratic(x, y), torch.tensor([[7, 8]]))
    np.testing.assert_allclose(offsets, [[x - 8, y - 7]], atol=1e-6)


def test_subpixel_offsets_are_at_most_half_a_pixel():
    offsets = subpixel_offsets(quadratic(9.4, 7.0, c=0.0), torch.tensor([[7, 8]]))
    np.testing.assert_allclose(offsets, [[0.5, 0.0]])


@pytest.mark.parametrize("signs", [(1.0, -1.0), (1.0, 1.0), (0.0, 0.0)])
def test_subpixel_offsets_stay_where_there_is_no_peak(signs):
    logits = quadratic(8.3, 7.2, a=signs[0], b=signs[1], c=0.0)
    assert subpixel_offsets(logits, torch.tensor([[7, 8]])).tolist() == [[0.0, 0.0]]


def test_subpixel_offsets_at_the_corner_are_finite():
    offsets = subpixel_offsets(quadratic(0.0, 0.0, c=0.0), torch.tensor([[0, 0], [14, 16]]))
    assert offsets.isfinite().all()


def test_subpixel_offsets_of_no_points():
    assert subpixel_offsets(quadratic(8, 7), torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2)
