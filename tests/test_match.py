import cv2
import numpy as np
import pytest
from skimage import data

from samfeat.pipelines.draw import draw_matches, inlier_colors
from samfeat.pipelines.extract import load_method
from samfeat.pipelines.match import estimate, match_images, mutual_matches

HOMOGRAPHY = np.array([[0.9, 0.15, 10.0], [-0.12, 0.95, 30.0], [1e-4, -5e-5, 1.0]])


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """A photograph and its view under HOMOGRAPHY."""
    folder = tmp_path_factory.mktemp("views")
    photo = np.ascontiguousarray(data.astronaut()[..., ::-1])
    cv2.imwrite(str(folder / "0.png"), photo)
    cv2.imwrite(str(folder / "1.png"), cv2.warpPerspective(photo, HOMOGRAPHY, (512, 512)))
    cv2.imwrite(str(folder / "blank.png"), np.zeros((64, 64, 3), np.uint8))
    return folder


def test_homography_of_two_views(views, tmp_path):
    sift = load_method("sift", max_keypoints=500)
    summary = match_images(views / "0.png", views / "1.png", tmp_path / "m.png", method=sift, verify="homography")
    corners = np.array([[[0.0, 0], [511, 0], [511, 511], [0, 511]]])
    moved = cv2.perspectiveTransform(corners, np.array(summary["model"]))
    assert moved == pytest.approx(cv2.perspectiveTransform(corners, HOMOGRAPHY), abs=1.5)
    assert summary["keypoints0"] == 500
    assert 100 < summary["inliers"] < summary["matches"] < 500
    picture = cv2.imread(summary["picture"])
    assert picture.shape[0] == 512
    assert picture.shape[1] >= 1024


def test_inliers_are_drawn_over_outliers(views, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "samfeat.pipelines.match.draw_matches", lambda *args, colors: seen.update(colors=colors) or draw_matches(*args)
    )
    orb = load_method("orb", max_keypoints=200)
    summary = match_images(views / "0.png", views / "1.png", tmp_path / "m.png", method=orb)
    assert (
        seen["colors"].tolist()
        == inlier_colors(np.arange(summary["matches"]) >= summary["matches"] - summary["inliers"]).tolist()
    )


def test_without_verification_nothing_is_an_inlier(views):
    summary = match_images(
        views / "0.png", views / "1.png", method=load_method("orb", max_keypoints=200), verify="none"
    )
    assert summary["matches"] > 50
    assert summary["inliers"] is summary["model"] is summary["picture"] is None


def test_nothing_to_match_is_a_normal_result(views, tmp_path):
    summary = match_images(views / "0.png", views / "blank.png", tmp_path / "m.png", method=load_method("sift"))
    assert (summary["keypoints1"], summary["matches"], summary["inliers"]) == (0, 0, 0)
    assert cv2.imread(str(tmp_path / "m.png")) is not None


def test_unknown_verification_is_refused(views):
    with pytest.raises(ValueError, match="none, fundamental, homography"):
        match_images(views / "0.png", views / "1.png", method=load_method("sift"), verify="essential")


def test_mutual_matches_are_nearest_both_ways():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 8)).astype(np.float32), rng.normal(size=(30, 8)).astype(np.float32)
    dots = a @ b.T
    expected = [(i, j) for i in range(40) for j in range(30) if dots[i].argmax() == j and dots[:, j].argmax() == i]
    assert mutual_matches({"descriptors": a}, {"descriptors": b}).tolist() == [list(pair) for pair in expected]


def test_fundamental_matrix_of_a_scene_with_wrong_matches():
    rng = np.random.default_rng(1)
    scene = np.c_[rng.uniform(-2, 2, (200, 2)), rng.uniform(4, 8, 200)]
    camera = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    turned = scene @ cv2.Rodrigues(np.array([0.02, -0.15, 0.03]))[0].T + (0.8, 0.1, 0.05)
    points0, points1 = ((p @ camera.T)[:, :2] / p[:, 2:] for p in (scene, turned))
    points1[150:] = rng.uniform((0, 0), (640, 480), (50, 2))
    model, inliers = estimate(points0, points1, model="fundamental")
    assert inliers[:150].all()
    assert inliers[150:].sum() <= 5  # a random point lies near its epipolar line now and then
    ends = [np.c_[p[:150], np.ones(150)] for p in (points0, points1)]
    lines = ends[0] @ model.T
    distance = np.abs((ends[1] * lines).sum(1)) / np.linalg.norm(lines[:, :2], axis=1)
    assert distance.max() < 1


@pytest.mark.parametrize(("model", "few"), [("fundamental", 7), ("homography", 3)])
def test_too_few_matches_for_a_model(model, few):
    points = np.random.default_rng(0).uniform(0, 100, (few, 2))
    found, inliers = estimate(points, points, model=model)
    assert found is None
    assert inliers.tolist() == [False] * few
