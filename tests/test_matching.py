"""Mutual nearest neighbours against NumPy, OpenCV and kornia."""

import subprocess
import sys

import cv2
import kornia
import numpy as np
import pytest
import torch

from samfeat.student import matching
from samfeat.student.matching import match


def unit(rng, count, width=32):
    values = rng.standard_normal((count, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def related(rng, count0=300, count1=260):
    """Two sets of unit descriptors, half of the second a noisy copy of the first."""
    first, second = unit(rng, count0), unit(rng, count1)
    second[: count1 // 2] = first[rng.permutation(count0)[: count1 // 2]] + 0.1 * second[: count1 // 2]
    return first, second / np.linalg.norm(second, axis=1, keepdims=True)


def features(descriptors):
    return {"descriptors": descriptors}


@pytest.mark.parametrize("block", [1, 1 << 10, 1 << 22])
def test_equals_brute_force_whatever_the_blocks(monkeypatch, block):
    monkeypatch.setattr(matching, "BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(0)
    first, second = (values * rng.uniform(0.2, 2, (len(values), 1)).astype(np.float32) for values in related(rng))
    similarity = first.astype(np.float64) @ second.T.astype(np.float64)
    best = similarity.argmax(axis=1)
    expected = [(i, j) for i, j in enumerate(best) if similarity[:, j].argmax() == i]

    result = match(features(torch.from_numpy(first)), features(torch.from_numpy(second)))
    assert result["matches"].dtype == torch.int64
    assert result["scores"].dtype == torch.float32
    assert list(map(tuple, result["matches"].tolist())) == expected
    np.testing.assert_allclose(result["scores"], [similarity[pair] for pair in expected], rtol=1e-5)


def test_equals_opencv_cross_check_on_unit_descriptors():
    first, second = related(np.random.default_rng(1))
    expected = cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(first, second)
    result = match(features(first), features(second))
    assert [tuple(pair) for pair in result["matches"].tolist()] == sorted((m.queryIdx, m.trainIdx) for m in expected)
    assert len(expected) > 100


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.0])
def test_ratio_equals_opencv_knn_on_unit_descriptors(ratio):
    first, second = related(np.random.default_rng(2))
    mutual = {(m.queryIdx, m.trainIdx) for m in cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(first, second)}
    nearest = cv2.BFMatcher(cv2.NORM_L2).knnMatch(first, second, k=2)
    expected = [(a.queryIdx, a.trainIdx) for a, b in nearest if a.distance < ratio * b.distance]
    result = match(features(first), features(second), ratio=ratio)
    assert [tuple(pair) for pair in result["matches"].tolist()] == [pair for pair in expected if pair in mutual]


def test_ratio_keeps_the_only_candidate():
    assert len(
        match(features(np.eye(3, 4, dtype=np.float32)), features(np.eye(1, 4, dtype=np.float32)), ratio=0.8)["matches"]
    )


def test_never_normalises():
    query, strong, close = [[1.0, 0.0]], [2.0, 2.0], [1.0, 0.0]  # cosine prefers the second, the dot product the first
    assert match(features(np.array(query)), features(np.array([strong, close])))["matches"].tolist() == [[0, 0]]


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_of_equal_candidates_the_first_wins(monkeypatch, block):
    monkeypatch.setattr(matching, "BLOCK_ELEMENTS", block)
    same = np.ones((3, 4), np.float32)
    assert match(features(same), features(same))["matches"].tolist() == [[0, 0]]


@pytest.mark.parametrize(("count0", "count1"), [(0, 5), (5, 0), (0, 0)])
def test_no_descriptors_no_matches(count0, count1):
    result = match(features(np.zeros((count0, 8), np.float32)), features(torch.zeros(count1, 8)), ratio=0.8)
    assert result["matches"].shape == (0, 2)
    assert result["matches"].dtype == torch.int64
    assert result["scores"].shape == (0,)


def test_equals_kornia_on_unit_descriptors():
    first, second = map(torch.from_numpy, related(np.random.default_rng(3)))
    _, mutual = kornia.feature.match_mnn(first, second)
    assert match(features(first), features(second))["matches"].tolist() == mutual[mutual[:, 0].argsort()].tolist()
    _, both = kornia.feature.match_smnn(first, second, 0.8)  # the ratio in both directions
    forth = match(features(first), features(second), ratio=0.8)["matches"].tolist()
    back = match(features(second), features(first), ratio=0.8)["matches"].flip(1).tolist()
    assert sorted(pair for pair in forth if pair in back) == sorted(both.tolist())
    assert len(both) > 100


@pytest.mark.parametrize("ratio", [None, 0.9])
def test_cosine_is_matching_at_unit_length(ratio):
    rng = np.random.default_rng(4)
    first, second = related(rng)
    expected = match(features(first), features(second), ratio=ratio)
    longer = [values * rng.uniform(0.1, 3, (len(values), 1)).astype(np.float32) for values in (first, second)]
    result = match(features(longer[0]), features(longer[1]), ratio=ratio, cosine=True)
    assert torch.equal(result["matches"], expected["matches"])
    torch.testing.assert_close(result["scores"], expected["scores"])


def test_memory_is_a_block_whatever_the_number_of_features():
    """Ten thousand on ten thousand features would be 400 MB of similarities: the process grows by a tenth of that."""
    program = (
        "import resource, torch; from samfeat.student.matching import match\n"
        "torch.set_num_threads(1); generator = torch.Generator().manual_seed(0)\n"
        "small = [{'descriptors': torch.rand(2000, 128, generator=generator)} for _ in '01']\n"
        "big = [{'descriptors': torch.rand(10_000, 128, generator=generator)} for _ in '01']\n"
        "match(*small, ratio=0.8, cosine=True)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "match(*big, ratio=0.8, cosine=True)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000  # KiB


@pytest.mark.parametrize(
    ("first", "second", "ratio", "message"),
    [
        ({"keypoints": 1}, features(np.zeros((2, 8))), None, "features0 must hold"),
        (features(np.zeros(8)), features(np.zeros((2, 8))), None, r"features0 must be a float.*\[N, D\].*\[8\]"),
        (features(np.zeros((2, 8))), features([[1.0]]), None, "features1 must be a float.*got list"),
        (features(np.zeros((2, 8))), features(np.zeros((2, 8), np.uint8)), None, "got torch.uint8"),
        (features(np.zeros((2, 8))), features(np.zeros((2, 4))), None, "one length, got 8 and 4"),
        (features(np.full((2, 8), np.nan)), features(np.zeros((2, 8))), None, "must be finite"),
        (features(np.zeros((2, 8))), features(np.zeros((2, 8))), 1.2, "ratio must lie in"),
        (features(np.zeros((2, 8))), features(np.zeros((2, 8))), 0.0, "ratio must lie in"),
        (features(np.eye(2, 8)), features(1.1 * np.eye(2, 8)), 0.8, "unit length: match with cosine=True"),
    ],
)
def test_rejects(first, second, ratio, message):
    with pytest.raises(ValueError, match=message):
        match(first, second, ratio=ratio)
