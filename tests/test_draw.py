import cv2
import numpy as np
import pytest

from samfeat.pipelines.pictures.draw import (
    GREEN,
    RED,
    color_groups,
    color_map,
    draw_errors,
    draw_keypoints,
    draw_matches,
    enlarged,
    enlargement,
    error_colors,
    inlier_colors,
    mma_figure,
    panel,
    pca_rgb,
    save_png,
    thumbnail,
)


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
    assert canvas[20, 70].tolist() == pytest.approx(GREEN, abs=20)  # the first line is horizontal
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
    picture = pca_rgb(embedding).astype(float)
    expected = 255 * (np.clip(ramp, -0.98, 0.98) / 0.98 + 1) / 2
    assert picture[..., 0] == pytest.approx(np.repeat(expected[:, None], 32, 1), abs=6)
    assert picture[..., 1] == pytest.approx(np.repeat(expected[None], 32, 0), abs=6)


def test_pca_of_little_or_nothing():
    assert not pca_rgb(np.ones((16, 4, 4))).any()
    two = pca_rgb(np.random.default_rng(0).normal(size=(2, 5, 5)))
    assert two[..., :2].max() == 255
    assert not two[..., 2].any()


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


def test_mma_figure_is_a_picture_with_one_plot_a_subset(tmp_path):
    curves = {"one": {"all": [0.1] * 10, "viewpoint": [0.2] * 10}, "two": {"all": [0.3] * 10}}
    wide = cv2.imread(str(mma_figure(tmp_path / "wide.png", curves)))
    narrow = cv2.imread(str(mma_figure(tmp_path / "narrow.png", {"two": curves["two"]})))
    assert wide.shape[1] > 1.5 * narrow.shape[1]
    assert ((narrow[..., 0] > 150) & (narrow[..., 2] < 80)).sum() > 500  # a line in matplotlib's blue
