import cv2
import numpy as np
import pytest

from samfeat.pipelines.pictures.draw import LEAST, panel
from samfeat.pipelines.pictures.overlays import MAPS, SHOWN, feature_tiles, overlay

GREY = np.full((LEAST, 2 * LEAST, 3), 128, np.uint8)


def test_the_best_keypoints_are_drawn_whatever_their_order():
    rng = np.random.default_rng(0)
    weak = 20 + rng.random((SHOWN, 2)) * (2 * LEAST - 40, LEAST / 2 - 40)  # in the upper half
    strong = weak + (0, LEAST / 2)
    scores = np.concatenate([np.full(SHOWN, 0.2), np.linspace(0.5, 0.9, SHOWN)])
    order = rng.permutation(2 * SHOWN)
    features = {"keypoints": np.concatenate([weak, strong])[order], "scores": scores[order]}
    ((title, picture),) = feature_tiles(GREY, features)
    assert title == f"{2 * SHOWN} keypoints, the best {SHOWN} drawn, scores 0.5 to 0.9"
    picture, scale = picture[:, : 2 * LEAST], picture[:, 2 * LEAST :]
    assert (picture[: LEAST // 2] == 128).all()
    assert (picture[LEAST // 2 :] != 128).any(axis=-1).mean() > 0.05
    assert scale.shape[1] > 20


def test_small_images_are_enlarged_and_their_keypoints_with_them():
    small = np.full((40, 40, 3), 128, np.uint8)
    ((_, picture),) = feature_tiles(small, {"keypoints": np.array([[10.0, 30.0]]), "scores": np.ones(1)})
    assert picture.shape == (LEAST, LEAST, 3)
    ys, xs = np.nonzero((picture != 128).any(axis=-1))
    assert (xs.mean(), ys.mean()) == pytest.approx((83.5, 243.5), abs=0.6)  # (p + 0.5) * 8 - 0.5


def test_no_keypoint_and_no_map_is_a_normal_picture():
    none = {"keypoints": np.zeros((0, 2)), "scores": np.zeros(0)}
    ((title, picture),) = feature_tiles(GREY, none)
    assert title == "0 keypoints"
    assert (picture == GREY).all()


def test_maps_lie_over_the_image_at_its_size():
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (16, 1))
    tiles = feature_tiles(GREY, {"keypoints": np.zeros((0, 2)), "scores": np.zeros(0)}, dict.fromkeys(MAPS, ramp))
    assert [title for title, _ in tiles[1:]] == ["heat-map: 0 to 1", "attention: 0 to 1", "edges: 0 to 1"]
    for _, picture in tiles[1:]:
        assert picture.shape[0] == GREY.shape[0]
        assert picture.shape[1] > GREY.shape[1]  # the scale of the colours beside it
        brightness = cv2.cvtColor(picture[:, : GREY.shape[1]], cv2.COLOR_RGB2GRAY).astype(int)
        assert (np.diff(brightness[LEAST // 2]) >= -3).all()  # these colour maps grow brighter
        assert brightness[:, -1].mean() > brightness[:, 0].mean() + 60
    assert panel([tiles]).ndim == 3


def test_an_overlay_is_three_parts_of_colour_and_one_of_the_image():
    checks = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((8, 8))).astype(np.uint8)[..., None].repeat(3, -1) * 255
    picture = overlay(checks, np.zeros((8, 8), np.float32), "gray", 0, 1)
    np.testing.assert_allclose(picture, checks * 0.25, atol=1)
    picture = overlay(checks, np.ones((8, 8), np.float32), "gray", 0, 1)
    np.testing.assert_allclose(picture, 191 + checks * 0.25, atol=1)
