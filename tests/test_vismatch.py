"""The matcher for vismatch, run by vismatch's own code; skipped where vismatch is not installed."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from samfeat import SAMFeat, match

FOLDER = Path(__file__).parents[1] / "integrations" / "vismatch"
TO_SECOND = np.array([[1.08, 0.12, -30.0], [-0.1, 1.02, 24.0], [5e-5, -1e-5, 1.0]])

pytestmark = pytest.mark.integration


@pytest.fixture
def matcher(monkeypatch):
    im_models = pytest.importorskip("vismatch.im_models", reason="install vismatch")
    monkeypatch.setattr(im_models, "__path__", [*im_models.__path__, str(FOLDER)])
    from vismatch.im_models.samfeat import SAMFeatMatcher

    return SAMFeatMatcher("cpu", 500, weights="samfeat-slim")


@pytest.fixture(scope="module")
def pair():
    """uint8 [H, W, 3] of a photograph and its view by ``TO_SECOND``; no side is a multiple of 16."""
    first = np.ascontiguousarray(skimage.data.astronaut()[:313, :471])
    return first, cv2.warpPerspective(first, TO_SECOND, (457, 339))


def test_vismatch_returns_the_matches_of_the_extractor(matcher, pair):
    student = SAMFeat.from_pretrained("samfeat-slim", max_keypoints=500)
    features0, features1 = (student.extract(np.float32(image) / 255) for image in pair)
    expected = match(features0, features1)
    index0, index1 = expected["matches"].T
    found = matcher(*(Image.fromarray(image) for image in pair))
    for key, values in (
        ("all_kpts0", features0["keypoints"]),
        ("all_kpts1", features1["keypoints"]),
        ("all_desc0", features0["descriptors"]),
        ("all_desc1", features1["descriptors"]),
        ("matched_kpts0", features0["keypoints"][index0]),
        ("matched_kpts1", features1["keypoints"][index1]),
        ("matched_confidences", expected["scores"]),
    ):
        np.testing.assert_allclose(found[key], values, atol=1e-3, err_msg=key)


def test_keypoints_are_pixels_of_the_images_given(matcher, pair):
    found = matcher(*(np.float32(image.transpose(2, 0, 1) / 255) for image in pair))
    assert found["num_inliers"] > 100
    corners = np.float32([[[0, 0], [470, 0], [470, 312], [0, 312]]])
    shift = cv2.perspectiveTransform(corners, found["H"]) - cv2.perspectiveTransform(corners, TO_SECOND)
    assert np.abs(shift).max() < 1


@pytest.mark.parametrize("channels", ["colour", "grey"])
def test_files_and_tensors_give_the_same(matcher, pair, tmp_path, channels):
    images = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in pair] if channels == "grey" else pair
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, image in zip(paths, images):
        Image.fromarray(image).save(path)
    tensors = [torch.from_numpy(np.atleast_3d(image).transpose(2, 0, 1).copy() / 255.0) for image in images]
    found, expected = matcher(*(tensor.expand(3, -1, -1).float() for tensor in tensors)), matcher(*paths)
    np.testing.assert_allclose(found["matched_kpts0"], expected["matched_kpts0"], atol=1e-3)
    assert len(found["matched_kpts0"]) > 100


def test_values_slightly_beyond_the_range_are_taken(matcher, pair):
    first, second = (torch.from_numpy(image.transpose(2, 0, 1) / np.float32(255)) for image in pair)
    found = matcher(first * 1.2 - 0.1, second * 1.2 - 0.1)
    expected = matcher((first * 1.2 - 0.1).clamp(0, 1), (second * 1.2 - 0.1).clamp(0, 1))
    np.testing.assert_array_equal(found["matched_kpts0"], expected["matched_kpts0"])


def test_images_without_features_have_no_matches(matcher):
    found = matcher(torch.rand(3, 4, 4), torch.rand(3, 4, 4))
    assert found["H"] is None
    assert found["matched_kpts0"].shape == found["all_kpts0"].shape == (0, 2)
