import cv2
import h5py
import numpy as np
import pycolmap
import pytest
from skimage import data

from samfeat.pipelines.extract import extract_folder
from samfeat.pipelines.features.formats import FeatureFile
from samfeat.pipelines.features.methods import load_method
from samfeat.pipelines.match import estimate, match_images, match_pairs, mutual_matches, read_pairs
from samfeat.pipelines.pictures.draw import draw_matches, inlier_colors

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


@pytest.mark.parametrize("estimator", ["magsac", "poselib"])
def test_homography_of_two_views(views, tmp_path, estimator):
    sift = load_method("sift", max_keypoints=500)
    summary = match_images(
        views / "0.png", views / "1.png", tmp_path / "m.png", method=sift, verify="homography", estimator=estimator
    )
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


def test_a_ratio_keeps_fewer_and_better_matches(views):
    sift = load_method("sift", max_keypoints=500)
    every, best = (
        match_images(views / "0.png", views / "1.png", method=sift, verify="homography", ratio=ratio)
        for ratio in (None, 0.7)
    )
    assert best["matches"] < every["matches"]
    assert best["inliers"] / best["matches"] > every["inliers"] / every["matches"]


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


@pytest.mark.parametrize("estimator", ["magsac", "poselib"])
def test_fundamental_matrix_of_a_scene_with_wrong_matches(estimator):
    rng = np.random.default_rng(1)
    scene = np.c_[rng.uniform(-2, 2, (200, 2)), rng.uniform(4, 8, 200)]
    camera = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    turned = scene @ cv2.Rodrigues(np.array([0.02, -0.15, 0.03]))[0].T + (0.8, 0.1, 0.05)
    points0, points1 = ((p @ camera.T)[:, :2] / p[:, 2:] for p in (scene, turned))
    points1[150:] = rng.uniform((0, 0), (640, 480), (50, 2))
    model, inliers = estimate(points0, points1, model="fundamental", estimator=estimator)
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


@pytest.mark.parametrize("model", ["fundamental", "homography"])
def test_poselib_with_nothing_to_find(model):
    points = np.zeros((20, 2))
    found, inliers = estimate(points, points, model=model, estimator="poselib")
    assert len(inliers) == 20
    assert (found is None) == (not inliers.any())


# --------------------------------------------------------------------------------------------------------- many pairs


@pytest.fixture(scope="module")
def stored(views, tmp_path_factory):
    """A file of SIFT features of the photograph, its view, and an image with nothing to see."""
    path = tmp_path_factory.mktemp("stored") / "f.h5"
    extract_folder(views, path, method=load_method("sift", max_keypoints=400))
    return path


def test_pairs_for_hloc(stored, tmp_path):
    seen = []
    made = match_pairs(stored, tmp_path / "m.h5", progress=lambda *state: seen.append(state))
    features = FeatureFile(stored)
    expected = mutual_matches(features["0.png"], features["1.png"])
    assert made == (3, 3, len(expected))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["m.h5"]
    with h5py.File(tmp_path / "m.h5") as file:
        matches0 = file["0.png/1.png/matches0"][()]
        assert len(matches0) == 400
        assert np.stack([np.flatnonzero(matches0 >= 0), matches0[matches0 >= 0]], 1).tolist() == expected.tolist()
        assert not (file["0.png/blank.png/matches0"][()] >= 0).any()


def test_pairs_for_colmap_are_verified(stored, views, tmp_path):
    (tmp_path / "pairs.txt").write_text("1.png 0.png\n\n1.png blank.png\n")
    match_pairs(stored, tmp_path / "d.db", pairs=read_pairs(tmp_path / "pairs.txt"), images=views, ratio=0.8)
    with pycolmap.Database.open(tmp_path / "d.db") as database:
        numbers = {image.name: image.image_id for image in database.read_all_images()}
        found = database.read_two_view_geometry(numbers["0.png"], numbers["1.png"])
        points = [database.read_keypoints(numbers[name])[found.inlier_matches[:, k]] - 0.5
                  for k, name in enumerate(("0.png", "1.png"))]  # fmt: skip
    assert found.config in (4, 5, 6)  # planar, panoramic, or either
    moved = cv2.perspectiveTransform(points[0][None], HOMOGRAPHY)[0]
    assert np.median(np.linalg.norm(moved - points[1], axis=1)) < 1
    assert len(points[0]) > 100


def test_interrupted_matching_goes_on(stored, tmp_path, monkeypatch):
    from samfeat.student import matching

    calls, real = [], matching.match

    def stopped(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(matching, "match", stopped)
    with pytest.raises(KeyboardInterrupt):
        match_pairs(stored, tmp_path / "m.h5")
    assert not (tmp_path / "m.h5").exists()
    match_pairs(stored, tmp_path / "m.h5")
    assert len(calls) == 2 + 2  # the first pair was kept
    with pytest.raises(ValueError, match="exists"):
        match_pairs(stored, tmp_path / "m.h5")
    match_pairs(stored, tmp_path / "m.h5", overwrite=True, ratio=0.8)


def test_bad_pairs_are_refused_in_one_line(stored, views, tmp_path):
    cases = [
        ({"output": tmp_path / "m.txt"}, ".h5 .hloc. or .db"),
        ({"output": tmp_path / "d.db"}, "give the folder of the images"),
        ({"pairs": [("0.png", "9.png")]}, "no features of 9.png"),
        ({"ratio": 1.5}, "ratio must lie in"),
    ]
    for changes, message in cases:
        arguments = {"features": stored, "output": tmp_path / "m.h5"} | changes
        with pytest.raises(ValueError, match=message) as caught:
            match_pairs(arguments.pop("features"), arguments.pop("output"), **arguments)
        assert "\n" not in str(caught.value)
    for text in ("a.png\n", "a.png a.png\n", "a.png b.png\nb.png a.png\n"):
        (tmp_path / "pairs.txt").write_text(text)
        with pytest.raises(ValueError, match=r"pairs\.txt, line \d: two different"):
            read_pairs(tmp_path / "pairs.txt")
