import re

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import samfeat
from samfeat.pipelines.pictures.draw import (
    GREEN,
    OPACITY,
    RED,
    captioned,
    color_groups,
    color_map,
    draw_errors,
    draw_keypoints,
    draw_matches,
    enlarged,
    enlargement,
    error_colors,
    inlier_colors,
    panel,
    pca_rgb,
    save_png,
    thumbnail,
    with_scale,
)
from samfeat.pipelines.pictures.overlays import feature_tiles


def gray(height: int, width: int, value: int = 0) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_matches_join_their_points_on_a_canvas_that_holds_both_images():
    left, right = gray(60, 80), gray(40, 50)
    points0, points1 = np.array([[10.0, 20.0], [40.0, 50.0]]), np.array([[30.0, 20.0], [5.0, 5.0]])
    canvas = draw_matches(left, right, points0, points1, colors=inlier_colors(np.array([True, False])))
    assert canvas.shape[0] == 60
    offset = canvas.shape[1] - 50
    assert offset >= 80
    assert tuple(canvas[20, 10]) == tuple(canvas[20, offset + 30]) == GREEN
    assert tuple(canvas[50, 40]) == tuple(canvas[5, offset + 5]) == RED
    assert canvas[20, 70].tolist() == pytest.approx([OPACITY * part for part in GREEN], abs=20)  # horizontal, on black
    assert (canvas[50:, offset:] == 255).all()  # below the shorter image
    assert not left.any()


def test_some_of_many_matches_are_drawn_by_error_the_best_ones_on_top():
    points = np.tile([[30.0, 20.0]], (40, 1))
    errors = np.repeat([100.0, 0.0], 20)
    picture = draw_errors(gray(40, 60), gray(40, 60), points, points, errors)
    assert tuple(picture[20, 30]) == GREEN
    assert not (picture == RED).all(axis=-1).any()
    rows = np.linspace(5, 2000, 400)
    points = np.stack([np.full(400, 20.0), rows], -1)
    few = draw_errors(gray(2010, 40), gray(2010, 40), points, points, np.tile([0.0, 100.0], 200), most=100)
    drawn = few[rows.round().astype(int), 20].tolist()
    assert drawn.count(list(GREEN)) + drawn.count(list(RED)) == 100
    assert 30 < drawn.count(list(GREEN)) < 70


def test_pictures_without_any_point():
    none = np.zeros((0, 2))
    assert draw_matches(gray(8, 8), gray(8, 8), none, none).shape[0] == 8
    assert not draw_keypoints(gray(8, 8), none, np.zeros(0)).any()
    assert inlier_colors(np.zeros(0, bool)).shape == error_colors(np.zeros(0)).shape == (0, 3)


def test_keypoints_are_circles_coloured_by_rank():
    points = np.array([[20.0, 20.0], [60.0, 20.0]])
    picture = draw_keypoints(gray(40, 80, 128), points, np.array([0.9, 0.1]))
    best, worst = picture[20, 24], picture[20, 64]  # on the circles of radius 4
    assert best[0] > best[2]
    assert worst[2] > worst[0]
    assert (picture[20, 20] == 128).all()


def test_error_colours_run_from_green_to_red():
    colors = error_colors(np.array([0, 5, 7, np.nan, np.inf]))
    assert tuple(colors[0]) == GREEN
    assert (colors[1:] == RED).all()


def test_groups_have_colours_of_their_own_and_an_outline():
    groups = np.zeros((20, 30), np.uint16)
    groups[:, 10:20], groups[:, 20:] = 7, 65535
    picture = color_groups(groups)
    inside = [tuple(picture[5, x]) for x in (3, 13, 25)]
    assert inside[0] == (0, 0, 0)
    assert len(set(inside)) == 3
    assert (picture[:, 9] == 255).all()
    assert (picture[:, 19] == 255).all()
    assert tuple(color_groups(groups[:, 10:15])[5, 3]) == inside[1]  # the same label, the same colour


def test_groups_blend_with_the_image():
    groups = np.zeros((6, 6), int)
    assert (color_groups(groups, gray(6, 6, 200)) == 90).all()


def test_pca_finds_the_directions_of_variance():
    rng = np.random.default_rng(0)
    ramp = np.linspace(-1, 1, 32)
    embedding = np.zeros((8, 32, 32)) + rng.normal(0, 1e-3, (8, 32, 32))
    embedding[2] += 10 * ramp[:, None]  # strongest along y
    embedding[5] += 3 * ramp[None, :]  # then along x
    picture = pca_rgb([embedding])[0].astype(float)
    expected = 255 * (np.clip(ramp, -0.98, 0.98) / 0.98 + 1) / 2
    assert picture[..., 0] == pytest.approx(np.repeat(expected[:, None], 32, 1), abs=6)
    assert picture[..., 1] == pytest.approx(np.repeat(expected[None], 32, 0), abs=6)


def test_pca_of_little_or_nothing():
    assert not pca_rgb([np.ones((16, 4, 4))])[0].any()
    (two,) = pca_rgb([np.random.default_rng(0).normal(size=(2, 5, 5))])
    assert two[..., :2].max() == 255
    assert not two[..., 2].any()


def test_views_of_a_pair_share_their_components():
    rng = np.random.default_rng(1)
    first = rng.normal(size=(8, 6, 7))
    second = first[:, :, ::-1] + 0
    left, right = pca_rgb([first, second])
    assert (left == right[:, ::-1]).all()  # equal embeddings, equal colours, wherever they are
    darker = pca_rgb([first, 0.5 * first])[1].astype(int)
    assert np.ptp(darker) < np.ptp(left.astype(int))  # on the scale of both, not each on its own
    assert [picture.shape for picture in pca_rgb([first, rng.normal(size=(8, 2, 3))])] == [(6, 7, 3), (2, 3, 3)]


def test_color_map_is_matplotlibs():
    picture = color_map(np.array([[0.0, 1.0, np.nan]]), "gray")
    assert picture.tolist() == [[[0, 0, 0], [255, 255, 255], [0, 0, 0]]]
    assert color_map(np.array([[5.0]]), "gray", low=0, high=20)[0, 0].tolist() == [64, 64, 64]
    assert color_map(np.full((2, 2), 3.0), "gray").max() == 0


def test_small_images_are_enlarged_about_pixel_centres_and_large_ones_shrunk():
    image = gray(40, 64)
    image[10, 30] = 255
    factor = enlargement(image)
    assert factor == 8
    large = enlarged(image, factor).astype(float)[..., 0]
    y, x = (np.average(at, weights=large) for at in np.mgrid[:320, :512])
    assert (x, y) == (pytest.approx(30.5 * 8 - 0.5, abs=0.1), pytest.approx(10.5 * 8 - 0.5, abs=0.1))
    assert enlargement(gray(500, 400)) == 1
    assert thumbnail(gray(500, 400), 100).shape == (100, 80, 3)
    assert thumbnail(gray(50, 40), 100).shape == (50, 40, 3)


def test_panel_holds_all_pictures_at_one_height():
    sheet = panel([[("one", gray(10, 20, 50)), ("two", gray(40, 40, 60))], [("three", gray(5, 5, 70))]], height=40)
    assert [(sheet == value).all(-1).sum() for value in (50, 60, 70)] == pytest.approx([3200, 1600, 1600], abs=60)
    assert (sheet[:20] < 100).any()  # the titles


def test_png_keeps_red_red(tmp_path):
    image = gray(4, 5)
    image[..., 0] = 200
    path = save_png(tmp_path / "new" / "picture.png", image)
    assert (cv2.imread(str(path))[..., ::-1] == image).all()
    assert list(path.parent.iterdir()) == [path]


def test_a_caption_stands_above_and_says_what_colours_mean():
    picture = gray(100, 300, 90)
    sheet = captioned(picture, "two views " * 40, [("agree", GREEN), ("do not", RED)])
    assert (sheet[-100:] == 90).all()
    above = sheet[:-100]
    assert above.shape[1] == 300
    assert (above[:, -4:] == 255).all()  # a long title is shortened
    assert all((above == color).all(-1).sum() > 50 for color in (GREEN, RED))
    assert len(captioned(picture, "title")) < len(sheet)


def test_a_scale_runs_from_low_below_to_high_above():
    picture = gray(200, 300, 90)
    sheet = with_scale(picture, "gray", "0", "1.5")
    assert (sheet[:, :300] == 90).all()
    bar = sheet[:, 300 + 200 // 22 // 2 + 3, 0].astype(int)
    assert (bar[0], bar[-1]) == (255, 0)
    assert (np.diff(bar) <= 0).all()
    labels = (sheet[:, 320:] < 100).any(axis=(1, 2))
    assert labels[:15].any()
    assert labels[-15:].any()
    assert not labels[30:-30].any()


def test_notebooks_get_pictures_of_what_extract_and_match_return(tmp_path):
    grey = np.full((200, 300, 3), 128, np.uint8)
    features = {"keypoints": torch.tensor([[50.0, 60.0], [200.0, 150.0]]), "scores": torch.tensor([0.9, 0.5])}
    Image.fromarray(grey).save(tmp_path / "grey.png")
    pictures = [samfeat.show_keypoints(image, features) for image in (grey, tmp_path / "grey.png", grey / 255)]
    assert {picture.size for picture in pictures} == {(300, 200)}
    for picture in pictures:
        changed = (np.asarray(picture) != 128).any(axis=2)
        near = np.hypot(*(np.indices(changed.shape)[::-1] - np.array([50, 60])[:, None, None])) < 12
        near |= np.hypot(*(np.indices(changed.shape)[::-1] - np.array([200, 150])[:, None, None])) < 12
        assert changed[near].any()
        assert not changed[~near].any()
    for matches in (torch.tensor([[0, 1]]), {"matches": torch.tensor([[0, 1]])}):
        drawn = np.asarray(samfeat.show_matches(grey, grey, features, features, matches))
        np.testing.assert_array_equal(drawn, draw_matches(grey, grey, np.array([[50, 60]]), np.array([[200, 150]])))
    assert pictures[0]._repr_png_()


@pytest.mark.parametrize(
    ("matches", "message"),
    [
        ([1, 0], "whole numbers [M, 2], got int64 [2]"),
        ([[0, 1, 1]], "whole numbers [M, 2], got int64 [1, 3]"),
        ([[0.0, 1.0]], "whole numbers [M, 2], got float64 [1, 2]"),
        ([[0, 1], [1, 2]], "rows of 2 and 2 keypoints"),
        (torch.tensor([[0, -1]]), "rows of 2 and 2 keypoints"),
    ],
)
def test_matches_that_are_none_of_the_features_are_refused(matches, message):
    grey, features = np.full((200, 300, 3), 128, np.uint8), {"keypoints": torch.tensor([[50.0, 60.0], [200.0, 150.0]])}
    with pytest.raises(ValueError, match=re.escape(message)):
        samfeat.show_matches(grey, grey, features, features, matches)


def test_features_without_what_is_drawn_are_refused():
    grey = np.zeros((32, 32), np.uint8)
    with pytest.raises(ValueError, match="give what samfeat returned"):
        samfeat.show_keypoints(grey, {})
    with pytest.raises(ValueError, match="give what samfeat returned"):
        samfeat.show_matches(grey, grey, {}, {}, {})


def test_keypoints_without_scores_are_green():
    grey = np.zeros((300, 400), np.uint8)
    drawn = np.asarray(samfeat.show_keypoints(grey, {"keypoints": np.array([[200.0, 150.0]])}))
    assert drawn[..., 1].max() > 100
    assert drawn[..., 1].max() > drawn[..., 0].max()
    (title, picture), *maps = feature_tiles(np.zeros((300, 400, 3), np.uint8), {"keypoints": np.zeros((3, 2))})
    assert (title, maps) == ("3 keypoints", [])
    assert picture.max() > 0


def test_no_matches_are_the_photographs_beside_each_other():
    left, right = np.full((200, 300, 3), 128, np.uint8), np.full((100, 80, 3), 7, np.uint8)
    none = {"keypoints": np.zeros((0, 2), np.float32)}
    for matches in ([], np.zeros((0, 2), int)):
        drawn = np.asarray(samfeat.show_matches(left, right, none, none, matches))
        np.testing.assert_array_equal(drawn[:200, :300], left)
        np.testing.assert_array_equal(drawn[:100, -80:], right)
