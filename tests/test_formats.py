"""Files of other tools, read back by the tools."""

import cv2
import h5py
import kornia
import numpy as np
import pycolmap
import pytest
import torch

from samfeat.pipelines.features.formats import (
    FeatureFile,
    d2net_bytes,
    to_kornia,
    write_colmap_database,
    write_features,
    write_matches,
)

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


# ---------------------------------------------------------------------------------------------------------------- hloc


def hloc_dataset(path, name):
    """What hloc's matching reads: every array of a group as a float tensor, an empty image of its size."""
    with h5py.File(path, "r") as file:
        group = file[name]
        data = {key: torch.from_numpy(values.__array__()).float() for key, values in group.items()}
        return data | {"image": torch.empty((1, *tuple(group["image_size"])[::-1]))}


def hloc_matches(path, name0, name1):
    """What hloc's reconstruction reads of the matches of a pair."""
    with h5py.File(path, "r") as file:
        group = file["/".join((name0.replace("/", "-"), name1.replace("/", "-")))]
        matches, scores = group["matches0"].__array__(), group["matching_scores0"].__array__()
    index = np.where(matches != -1)[0]
    return np.stack([index, matches[index]], -1), scores[index]


def test_hloc_layout(tmp_path):
    features = features_of(two_views()[0][0])
    features["keypoints"][0] = (3000.25, 2000.75)  # half floats would make it (3000, 2000)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        write_features(file, "deep/a.jpg", features | {"uncertainty": np.array(2.5, np.float32)})
        write_features(file, "b.jpg", features)
        assert file["deep/a.jpg"]["keypoints"].attrs["uncertainty"] == 2.5
        assert file["b.jpg"]["keypoints"].attrs["uncertainty"] == 1
        assert {key: values.dtype.name for key, values in file["b.jpg"].items()} == {
            "keypoints": "float32", "scores": "float32", "descriptors": "float32", "image_size": "int64",
        }  # fmt: skip
    data = hloc_dataset(tmp_path / "f.h5", "deep/a.jpg")
    assert data["keypoints"][0].tolist() == [3000.25, 2000.75]
    assert data["descriptors"].shape == (8, 120)  # one descriptor a column
    assert data["image"].shape == (1, 480, 640)

    stored = FeatureFile(tmp_path / "f.h5")
    assert list(stored) == ["b.jpg", "deep/a.jpg"]
    for key, values in features.items():
        np.testing.assert_array_equal(stored["deep/a.jpg"][key], values)


def test_hloc_matches_layout(tmp_path):
    found = {"matches": np.array([[1, 7], [4, 2]]), "scores": np.array([0.5, 0.25], np.float32)}
    with h5py.File(tmp_path / "m.h5", "w") as file:
        write_matches(file, ("deep/a.jpg", "b.jpg"), found, 6)
        write_matches(file, ("b.jpg", "c.jpg"), {"matches": np.zeros((0, 2), int), "scores": np.zeros(0)}, 0)
    matches, scores = hloc_matches(tmp_path / "m.h5", "deep/a.jpg", "b.jpg")
    assert matches.tolist() == [[1, 7], [4, 2]]
    assert scores.tolist() == [0.5, 0.25]
    assert len(hloc_matches(tmp_path / "m.h5", "b.jpg", "c.jpg")[0]) == 0


def foreign(**changes):
    arrays = {
        "keypoints": np.zeros((5, 2)), "descriptors": np.zeros((8, 5)), "image_size": np.array([9, 9])
    }  # fmt: skip
    return {key: values for key, values in (arrays | changes).items() if values is not None}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (foreign(descriptors=None), "descriptors is missing"),
        (foreign(descriptors=np.zeros((5, 8))), r"descriptors is \(8, 5\)"),
        (foreign(keypoints=np.zeros((5, 3))), r"keypoints is \(5, 3\)"),
        (foreign(image_size=None), "image_size is missing"),
    ],
)
def test_foreign_features_are_refused_in_one_line(tmp_path, arrays, message):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        for key, values in arrays.items():
            file[f"a.jpg/{key}"] = values
    with pytest.raises(ValueError, match=message) as caught:
        FeatureFile(tmp_path / "f.h5")["a.jpg"]
    assert str(tmp_path / "f.h5") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_features(tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["a.jpg/global_descriptor"] = np.zeros(4)
    with pytest.raises(ValueError, match="holds no features"):
        FeatureFile(tmp_path / "f.h5")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        FeatureFile(tmp_path / "none.h5")


# ------------------------------------------------------------------------------------------------------ D2-Net, kornia


def test_d2net_file(tmp_path):
    features = features_of(two_views()[0][0])
    (tmp_path / "a.ppm.samfeat").write_bytes(d2net_bytes(features))
    with np.load(tmp_path / "a.ppm.samfeat") as file:
        assert {key: values.shape for key, values in file.items()} == {
            "keypoints": (120, 2), "scores": (120,), "descriptors": (120, 8),
        }  # fmt: skip
        np.testing.assert_array_equal(file["keypoints"], features["keypoints"])


@pytest.mark.parametrize("kind", ["arrays", "tensors"])
def test_kornia_matches_and_draws_from_our_features(kind):
    points, _, _ = two_views()
    first, second = (features_of(p) for p in points)  # equal descriptors: feature k matches feature k
    if kind == "tensors":
        first, second = ({key: torch.from_numpy(values) for key, values in f.items()} for f in (first, second))
    ours = [to_kornia(features, scale=3.0) for features in (first, second)]
    matcher = kornia.feature.GeometryAwareDescriptorMatcher
    _, index = matcher("fginn")(ours[0].descriptors[0], ours[1].descriptors[0], ours[0].lafs, ours[1].lafs)
    assert index.tolist() == [[k, k] for k in range(120)]
    for laf, xy in zip(ours, points):
        assert laf.responses.shape == (1, 120)
        np.testing.assert_allclose(kornia.feature.get_laf_center(laf.lafs)[0], xy, rtol=1e-6)
        assert kornia.feature.get_laf_scale(laf.lafs).flatten().tolist() == pytest.approx([3.0] * 120)
        assert kornia.feature.get_laf_orientation(laf.lafs).abs().max() < 1e-5
