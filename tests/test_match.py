import cv2
import h5py
import numpy as np
import pycolmap
import pytest
from skimage import data

from samfeat.pipelines.extract import extract_folder
from samfeat.pipelines.features.formats import FeatureFile, write_features
from samfeat.pipelines.features.methods import load_method
from samfeat.pipelines.match import estimate, match_images, match_pairs, read_pairs
from samfeat.pipelines.metrics import mutual_matches
from samfeat.pipelines.pictures.draw import GREEN, MOST, draw_matches, inlier_colors

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
    assert 512 < picture.shape[0] < 620  # a caption above
    assert picture.shape[1] >= 1024


def test_inliers_are_drawn_over_outliers(views, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "samfeat.pipelines.pictures.draw.draw_matches",
        lambda *args, colors: seen.update(colors=colors) or draw_matches(*args),
    )
    orb = load_method("orb", max_keypoints=200)
    summary = match_images(views / "0.png", views / "1.png", tmp_path / "m.png", method=orb)
    order = np.random.default_rng(0).permutation(summary["matches"])[:MOST]
    assert len(seen["colors"]) == summary["drawn"] == len(order) <= 100
    colors = seen["colors"].tolist()
    right = colors.count(list(GREEN))
    assert colors == inlier_colors(np.arange(len(colors)) >= len(colors) - right).tolist()
    assert right / len(colors) == pytest.approx(summary["inliers"] / summary["matches"], abs=0.2)


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
def test_where_opencv_fails_poselib_estimates(monkeypatch, model):
    def fails(*arguments, **options):
        raise cv2.error("(-215:Assertion failed) !model.empty() in function 'setModelParameters'")

    points0 = np.random.default_rng(0).uniform(0, 600, (200, 2))
    points1 = cv2.perspectiveTransform(points0[None], np.array([[1, -0.02, 3], [0.02, 1, -4], [0, 0, 1.0]]))[0]
    expected, inliers = estimate(points0, points1, model=model, estimator="poselib")
    monkeypatch.setattr(cv2, "findFundamentalMat", fails)
    monkeypatch.setattr(cv2, "findHomography", fails)
    found, agree = estimate(points0, points1, model=model)
    np.testing.assert_array_equal(agree, inliers)
    assert agree.all()
    np.testing.assert_allclose(found, expected)


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
    for text in ("a.png\n", "a.png a.png\n", "a.png b.png c.png\n", '"a.png b.png\n', "a.png\tb.png\tc.png\n"):
        (tmp_path / "pairs.txt").write_text(text)
        with pytest.raises(ValueError, match=r"pairs\.txt, line \d: two different"):
            read_pairs(tmp_path / "pairs.txt")


def test_lists_of_pairs_as_people_write_them(tmp_path):
    text = "\ufeff# retrieval\na.png b.png\nb.png a.png\n\n a.png  b.png \nc d.png\te.png\r\n\"c d.png\" 'f g.png'\n"
    (tmp_path / "pairs.txt").write_bytes(text.encode())
    assert read_pairs(tmp_path / "pairs.txt") == [
        ("a.png", "b.png"),
        ("c d.png", "e.png"),
        ("c d.png", "f g.png"),
    ]
    (tmp_path / "pairs.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match=r"pairs\.txt is not a text file"):
        read_pairs(tmp_path / "pairs.txt")


def test_names_that_hloc_cannot_tell_apart_are_refused_before_matching(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        for name in ("cam/1.jpg", "cam-1.jpg", "x.jpg"):
            features = {"keypoints": np.zeros((1, 2)), "descriptors": np.ones((1, 4)), "image_size": np.ones(2)}
            write_features(file, name, features)
    monkeypatch.setattr("samfeat.student.matching.match", lambda *_, **__: pytest.fail("matched before the check"))
    with pytest.raises(ValueError, match=r"cam-1\.jpg x\.jpg and cam/1\.jpg x\.jpg have one name") as caught:
        match_pairs(tmp_path / "f.h5", tmp_path / "m.h5")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.h5").exists()


def test_an_output_that_is_an_input_is_refused(tmp_path, stored, views):
    before = stored.read_bytes()
    (tmp_path / "link.h5").symlink_to(stored)
    (tmp_path / "hard.h5").hardlink_to(stored)
    for output in (stored, tmp_path / "link.h5", tmp_path / "hard.h5"):
        with pytest.raises(ValueError, match="is an input"):
            match_pairs(stored, output, overwrite=True)
    first = next(path for path in sorted(views.iterdir()) if path.suffix == ".png")
    for output in ({"output": first}, {"maps": first}):
        with pytest.raises(ValueError, match="is an input"):
            match_images(first, first, method=load_method("sift"), **output)
    with pytest.raises(ValueError, match="are one file"):
        match_images(first, first, tmp_path / "m.png", maps=tmp_path / "m.png", method=load_method("sift"))
    assert stored.read_bytes() == before


@pytest.mark.parametrize("verify", ["none", "fundamental"])
def test_coordinates_of_matches_in_files(views, tmp_path, verify):
    first, second = sorted(views.glob("*.png"))[:2]
    found = match_images(first, second, tmp_path / "m.npz", method=load_method("sift"), verify=verify)
    assert (found["picture"], found["drawn"]) == (None, 0)
    stored = np.load(tmp_path / "m.npz")
    assert stored["points0"].shape == stored["points1"].shape == (found["matches"], 2)
    assert found["matches"] > 8
    match_images(first, second, tmp_path / "m.csv", method=load_method("sift"), verify=verify)
    header, *lines = (tmp_path / "m.csv").read_text().splitlines()
    rows = np.array([line.split(",") for line in lines], np.float64)
    np.testing.assert_allclose(rows[:, :4], np.hstack([stored["points0"], stored["points1"]]), atol=6e-4)
    if verify == "none":
        assert (header, "inliers" in stored) == ("x0,y0,x1,y1", False)
    else:
        assert header == "x0,y0,x1,y1,inlier"
        assert rows[:, 4].sum() == stored["inliers"].sum() == found["inliers"]
    with pytest.raises(ValueError, match=r"ends in \.png or \.npz or \.csv"):
        match_images(first, second, tmp_path / "m.jpg", method=load_method("sift"))
