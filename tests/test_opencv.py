"""Features and matches as OpenCV's classes, which OpenCV's own functions accept."""

import cv2
import numpy as np
import torch

from samfeat import match, to_opencv, to_opencv_matches


def features(count: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    descriptors = torch.nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=1)
    scores = torch.rand(count, generator=generator).sort(descending=True).values
    return {"keypoints": torch.rand(count, 2, generator=generator) * 50, "scores": scores, "descriptors": descriptors}


def test_keypoints_and_matches_are_those_of_opencvs_own_matcher():
    first, second = features(40, 1), features(30, 2)
    keypoints = to_opencv(first)
    np.testing.assert_allclose(cv2.KeyPoint.convert(keypoints), first["keypoints"], atol=1e-5)
    np.testing.assert_allclose([point.response for point in keypoints], first["scores"], atol=1e-6)
    found = to_opencv_matches(match(first, second))
    wanted = cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(
        first["descriptors"].numpy(), second["descriptors"].numpy()
    )
    assert len(wanted) > 5
    assert [(m.queryIdx, m.trainIdx) for m in found] == [(m.queryIdx, m.trainIdx) for m in wanted]
    assert np.argsort([m.distance for m in found]).tolist() == np.argsort([m.distance for m in wanted]).tolist()
    image = np.zeros((60, 60, 3), np.uint8)
    drawn = cv2.drawMatches(image, keypoints, image, to_opencv(second), found, None)
    assert drawn.shape == (60, 120, 3)
    assert drawn.any()


def test_no_features_are_no_keypoints():
    assert to_opencv(features(0, 0)) == []
    assert to_opencv_matches(match(features(0, 0), features(3, 0))) == []
