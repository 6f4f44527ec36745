"""Files of other tools, read back by the tools."""

import cv2
import numpy as np
import pycolmap
import pytest

from samfeat.pipelines.formats import write_colmap_database

FOCAL, SIZE = 700.0, (640, 480)


def two_views(seed=0, count=120):
    """Exact projections of random points into two cameras, in pixels from the centre of the top-left pixel."""
    rng = np.random.default_rng(seed)
    scene = np.c_[rng.uniform(-2, 2, (count, 2)), rng.uniform(4, 8, count)]
    rotation, shift = cv2.Rodrigues(np.array([0.02, -0.15, 0.03]))[0], np.array([0.8, 0.1, 0.05])
    centre = np.array(SIZE) / 2 - 0.5  # COLMAP's (320, 240) in pixels from the centre of the first pixel
    views = [scene, scene @ rotation.T + shift]
    return [(FOCAL * view[:, :2] / view[:, 2:] + centre).astype(np.float32) for view in views], rotation, shift


def features_of(points, width=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "keypoints": points,
        "scores": np.linspace(1, 0.5, len(points), dtype=np.float32),
        "descriptors": rng.normal(size=(len(points), width)).astype(np.float32),
        "image_size": np.array(SIZE, np.int64),
    }


@pytest.fixture
def scene(tmp_path):
    points, rotation, shift = two_views()
    names = ["a.jpg", "deep/b.jpg"]
    features = {name: features_of(p, seed=k) for k, (name, p) in enumerate(zip(names, points))}
    camera = pycolmap.Camera.create_from_model_name(0, "SIMPLE_PINHOLE", FOCAL, *SIZE)
    count = len(points[0])
    pair = np.stack([np.arange(count)] * 2, 1)
    pair[100:, 1] = np.random.default_rng(1).permutation(pair[100:, 1])  # twenty wrong matches
    return {
        "images": dict.fromkeys(names, tmp_path / "never-opened.jpg"),
        "features": features,
        "matches": {tuple(names): pair},
        "cameras": dict.fromkeys(names, camera),
    }, (rotation, shift)


def test_colmap_finds_the_motion_from_the_database(scene, tmp_path):
    arguments, (rotation, shift) = scene
    numbers = write_colmap_database(tmp_path / "new" / "d.db", **arguments)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["d.db"]
    with pycolmap.Database.open(tmp_path / "new" / "d.db") as database:
        assert {image.name: image.image_id for image in database.read_all_images()} == numbers
        assert database.num_cameras() == 1
        for name, number in numbers.items():
            stored = arguments["features"][name]
            np.testing.assert_array_equal(database.read_keypoints(number), stored["keypoints"] + np.float32(0.5))
            bits = database.read_descriptors(number)
            np.testing.assert_array_equal(np.ascontiguousarray(bits.data).view(np.float32), stored["descriptors"])
        pair = tuple(numbers.values())
        np.testing.assert_array_equal(database.read_matches(*pair), next(iter(arguments["matches"].values())))
        found = database.read_two_view_geometry(*pair)
        points = [database.read_keypoints(number) for number in pair]
        camera = database.read_camera(1)
    assert 100 <= len(found.inlier_matches) <= 104
    options = pycolmap.TwoViewGeometryOptions(compute_relative_pose=True)
    pose = pycolmap.estimate_calibrated_two_view_geometry(
        camera, points[0], camera, points[1], found.inlier_matches, options
    ).cam2_from_cam1
    assert pose.rotation.matrix() == pytest.approx(rotation, abs=2e-4)
    assert pose.translation / np.linalg.norm(pose.translation) == pytest.approx(shift / np.linalg.norm(shift), abs=2e-3)


def test_cameras_come_from_the_photographs(scene, tmp_path):
    from PIL import Image

    arguments, _ = scene
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 50  # FocalLengthIn35mmFilm
    Image.new("RGB", SIZE).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "b.jpg")  # turned by its EXIF data, as far as COLMAP can tell
    arguments |= {"images": {"a.jpg": tmp_path / "a.jpg", "deep/b.jpg": tmp_path / "b.jpg"}, "cameras": None}
    write_colmap_database(tmp_path / "d.db", **arguments, verify=False)
    with pycolmap.Database.open(tmp_path / "d.db") as database:
        first, second = database.read_all_cameras()
        assert database.num_verified_image_pairs() == 0
    diagonal = np.hypot(36, 24)
    assert first.has_prior_focal_length
    assert first.focal_length == pytest.approx(50 / diagonal * np.hypot(*SIZE), rel=0.1)
    assert (second.width, second.height, second.has_prior_focal_length) == (*SIZE, False)
    assert second.focal_length == pytest.approx(1.2 * max(SIZE))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"matches": {("a.jpg", "c.jpg"): np.zeros((1, 2), int)}}, ValueError, "no image c.jpg"),
        ({"matches": {("a.jpg", "deep/b.jpg"): np.array([[0, 120]])}}, ValueError, "deep/b.jpg has only 120 features"),
        ({"matches": {("a.jpg", "deep/b.jpg"): np.array([[-1, 0]])}}, ValueError, "a.jpg has only 120 features"),
        ({"matches": {("a.jpg", "a.jpg"): np.zeros((1, 2), int)}}, ValueError, "give two images"),
        ({"matches": {p: np.zeros((0, 2), int) for p in (("a.jpg", "deep/b.jpg"), ("deep/b.jpg", "a.jpg"))}},
         ValueError, "every pair once"),
        ({"cameras": {"a.jpg": pycolmap.Camera.create_from_model_name(0, "PINHOLE", 9.0, 64, 48)}},
         ValueError, "a.jpg is for 64x48 pixels, but the image has 640x480"),
        ({"cameras": None}, FileNotFoundError, "does not exist"),
    ],
)  # fmt: skip
def test_a_bad_database_is_refused_and_leaves_nothing(scene, tmp_path, changes, error, message):
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=message) as caught:
        write_colmap_database(tmp_path / "out" / "d.db", **(scene[0] | changes))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_image_without_features_has_a_place_in_the_database(scene, tmp_path):
    arguments, _ = scene
    arguments["features"]["a.jpg"] = features_of(np.zeros((0, 2), np.float32))
    arguments["matches"] = {("a.jpg", "deep/b.jpg"): np.zeros((0, 2), np.int64)}
    numbers = write_colmap_database(tmp_path / "d.db", **arguments)
    with pycolmap.Database.open(tmp_path / "d.db") as database:
        assert database.num_keypoints_for_image(numbers["a.jpg"]) == 0
        assert database.num_keypoints_for_image(numbers["deep/b.jpg"]) == 120
