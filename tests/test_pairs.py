import os
import pickle
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from samfeat.teacher_cache.schema import POINTS
from samfeat.teacher_cache.sources.correspondences import DEPTH_TOLERANCE, correspondences
from samfeat.teacher_cache.sources.megadepth import MegaDepthSource, read_depth, read_scene_info
from samfeat.teacher_cache.sources.pairs import MIN_VALID

SIZE = (120, 160)
PLANE = np.array([0.2, -0.1, 1.0, -6.0])  # n . X + d = 0 in the world; six units away
DEPTHS = "phoenix/S6/zl548/MegaDepth_v1/0001/dense0/depths"


def camera(rotation=(0.0, 0.0, 0.0), translation=(0.0, 0.0, 0.0), focal=150.0, centre=(79.5, 59.5)):
    pose = np.eye(4)
    pose[:3, :3] = cv2.Rodrigues(np.array(rotation))[0]
    pose[:3, 3] = translation
    return np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]]), pose


CAMERAS = [
    camera(),
    camera((0.05, -0.1, 0.2), (0.6, 0.1, -0.2), 170.0, (75.0, 62.0)),
    camera((-0.05, 0.08, -0.3), (-0.5, 0.2, 0.4), 140.0),
]


def plane_depth(K, pose, plane=PLANE, size=SIZE):
    """Depth of a plane at every pixel: n . (R^T (z K^-1 p - t)) + d = 0, solved for z."""
    y, x = np.mgrid[: size[0], : size[1]]
    rays = pose[:3, :3].T @ np.linalg.inv(K) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    offset = plane[:3] @ (-pose[:3, :3].T @ pose[:3, 3]) + plane[3]
    return (-offset / (plane[:3] @ rays)).reshape(size)


def project_with_opencv(points0, depth0, first, second):
    """Where OpenCV sees, through ``second``, the points that ``first`` sees at their (whole) pixels."""
    (K0, pose0), (K1, pose1) = first, second
    z = depth0[points0[:, 1].astype(int), points0[:, 0].astype(int)]
    world = np.linalg.inv(pose0) @ np.vstack(
        [np.linalg.inv(K0) @ (z * np.vstack([points0.T, np.ones(len(z))])), np.ones(len(z))]
    )
    return cv2.projectPoints(world[:3].T, cv2.Rodrigues(pose1[:3, :3])[0], pose1[:3, 3], K1, None)[0][:, 0]


def between(first, second):
    return second[1] @ np.linalg.inv(first[1])


def whole_pixels(rng, number, size=SIZE):
    return np.stack([rng.integers(size[1], size=number), rng.integers(size[0], size=number)], axis=1)


@pytest.mark.parametrize("other", [1, 2])
def test_correspondences_against_opencv(other):
    first, second = CAMERAS[0], CAMERAS[other]
    depth0, depth1 = plane_depth(*first), plane_depth(*second)
    points0 = whole_pixels(np.random.default_rng(0), 500)
    points1, valid = correspondences(depth0, depth1, first[0], second[0], between(first, second), points0)
    expected = project_with_opencv(points0, depth0, first, second)
    np.testing.assert_allclose(points1, expected, atol=1e-9)
    inside = np.all((expected >= 0) & (expected <= (SIZE[1] - 1, SIZE[0] - 1)), axis=1)
    np.testing.assert_array_equal(valid, inside)
    assert 100 < inside.sum() < 500


def test_points_between_pixels():
    first, second = CAMERAS[0], CAMERAS[1]
    points0 = np.random.default_rng(0).uniform((20, 20), (130, 100), size=(200, 2))
    depths = [plane_depth(*view) for view in (first, second)]
    points1, _ = correspondences(*depths, first[0], second[0], between(first, second), points0)
    n, d, (K0, _), (K1, _), T = PLANE[:3], PLANE[3], first, second, between(first, second)
    H = K1 @ (T[:3, :3] - np.outer(T[:3, 3], n) / d) @ np.linalg.inv(K0)  # homography induced by the plane
    expected = cv2.perspectiveTransform(points0[:, None], H)[:, 0]
    assert np.abs(points1 - expected).max() < 1e-3  # bilinear depth of a slanted plane


def test_the_tolerance_is_relative():
    first, second = CAMERAS[0], CAMERAS[1]
    depth0, depth1 = plane_depth(*first), plane_depth(*second)
    points0, T = whole_pixels(np.random.default_rng(0), 300), between(first, second)
    points1, valid = correspondences(depth0, depth1, first[0], second[0], T, points0)
    for scale in (1e-3, 1e4):
        scaled = T.copy()
        scaled[:3, 3] *= scale
        again, still = correspondences(scale * depth0, scale * depth1, first[0], second[0], scaled, points0)
        np.testing.assert_allclose(again, points1, atol=1e-8)
        np.testing.assert_array_equal(still, valid)


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e4])
def test_hidden_points_are_not_valid(unit):
    first, second = camera(), camera(translation=(0.3 * unit, 0, 0))
    depth0, depth1 = np.full(SIZE, 10.0 * unit), np.full(SIZE, 10.0 * unit)
    depth1[:, 40:80] = 5.0 * unit  # something stands in front, in the second view alone
    points0 = np.stack([np.arange(20, 140), np.full(120, 60)], axis=1)
    points1, valid = correspondences(depth0, depth1, first[0], second[0], between(first, second), points0)
    np.testing.assert_allclose(points1[:, 0], points0[:, 0] + 150 * 0.3 / 10)
    np.testing.assert_array_equal(valid, (points1[:, 0] <= 39) | (points1[:, 0] >= 80))


def test_depth_and_way_back_are_both_needed():
    points0 = np.array([[80, 60]])
    flat = np.full(SIZE, 10.0)
    for error, seen in ((0.9 * DEPTH_TOLERANCE, True), (1.1 * DEPTH_TOLERANCE, False)):
        _, valid = correspondences(flat, flat / (1 - error), *[camera()[0]] * 2, np.eye(4), points0)
        assert valid[0] == seen  # no parallax: the way back is exact whatever the depth
    wide = camera(translation=(3.0, 0, 0))
    for error, seen in ((0.0, True), (0.025, True), (0.04, False)):  # 45 px of parallax x error: 0, 1.1, 1.8 px back
        _, valid = correspondences(flat, flat * (1 + error), camera()[0], wide[0], between(camera(), wide), points0)
        assert valid[0] == seen


@pytest.mark.parametrize("unknown", [0.0, -1.0, np.nan, np.inf])
def test_unknown_depth_is_not_valid(unknown):
    depth0, depth1 = np.full(SIZE, 10.0), np.full(SIZE, 10.0)
    depth0[50, 50] = depth1[50, 50] = depth1[20, 31] = unknown
    points0 = np.array(
        [[50, 50], [49.5, 50], [49, 50], [30.5, 20], [30, 20], [32.5, 20.5], [-0.1, 5], [159.5, 5], [159, 119]]
    )
    _, valid = correspondences(depth0, depth1, *[camera()[0]] * 2, np.eye(4), points0)
    assert valid.tolist() == [False, False, True, False, True, True, False, False, True]


def test_points_behind_the_second_camera_are_not_valid():
    depth, turned = np.full(SIZE, 10.0), camera((0, np.pi, 0))
    points1, valid = correspondences(depth, depth, turned[0], turned[0], turned[1], np.array([[80, 60]]))
    assert np.isnan(points1).all()
    assert not valid.any()


@pytest.mark.real
@pytest.mark.parametrize("name", ["cones", "teddy"])
def test_measured_disparities(name):
    root = Path(os.environ.get("SAMFEAT_DATA", "../shared/data")) / "stereo" / name
    if not root.is_dir():
        pytest.skip(f"{root} is absent; set SAMFEAT_DATA to the folder of photographs")
    disparities = [cv2.imread(str(root / f"disp{k}.png"), cv2.IMREAD_GRAYSCALE) / 4.0 for k in (2, 6)]
    depths = [np.divide(100.0, d, out=np.zeros_like(d), where=d > 0) for d in disparities]  # focal x baseline = 100
    K, T = np.diag([100.0, 100.0, 1.0]), np.eye(4)
    T[0, 3] = -1.0
    points0 = whole_pixels(np.random.default_rng(0), 5000, depths[0].shape)
    points1, valid = correspondences(*depths, K, K, T, points0)
    d = disparities[0][points0[:, 1], points0[:, 0]]
    np.testing.assert_allclose((points0[:, 0] - points1[:, 0])[valid], d[valid], atol=1e-9)
    there = np.rint(points0[:, 0] - d).astype(int)
    agree = (d > 0) & (there >= 0)
    agree[agree] = np.abs(disparities[1][points0[agree, 1], there[agree]] - d[agree]) <= 1
    assert (valid == agree).mean() > 0.9  # the usual left-right check, which looks at the nearest pixel alone
    assert valid.mean() > 0.5


def texture(seed, size=SIZE):
    rng = np.random.default_rng(seed)
    return cv2.GaussianBlur(rng.integers(0, 256, size=(*size, 3)).astype(np.uint8), (0, 0), 1.0)


def write_scene(root, *, name="0001", cameras=CAMERAS, absent=(), style="d2net", overlap=0.8, **changes):
    """A scene of one plane in D2-Net's or LoFTR's layout; images in ``absent`` have no depth and None in the lists."""
    images, depths, intrinsics, poses = [], [], [], []
    for k, (K, pose) in enumerate(cameras):
        image_path, depth_path = f"Undistorted_SfM/{name}/images/{k}.png", f"{DEPTHS.replace('0001', name)}/{k}.h5"
        for path in (image_path, depth_path):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / image_path), texture(k)[:, :, ::-1])
        with h5py.File(root / depth_path, "w") as file:
            file["depth"] = np.maximum(plane_depth(K, pose), 0).astype(np.float32)
        row = (None, None, None, None) if k in absent else (image_path, depth_path, K, pose)
        for values, value in zip((images, depths, intrinsics, poses), row):
            values.append(value)
    number = len(cameras)
    objects = {"image_paths": images, "depth_paths": depths, "intrinsics": intrinsics, "poses": poses}
    arrays = {key: as_array(values) for key, values in objects.items()}
    if style == "d2net":
        matrix = np.full((number, number), overlap)
        matrix[np.eye(number, dtype=bool)] = -1
        arrays |= {"overlap_matrix": matrix, "scale_ratio_matrix": np.where(matrix > 0, 1.2, -1.0)}
        arrays["points3D_id_to_2D"] = as_array([{7: [1.0, 2.0]}, *[{}] * (number - 1)])
    else:
        rows = np.empty((number - 1, 3), object)
        for k in range(number - 1):
            rows[k] = [np.array([k, k + 1]), overlap, np.zeros((3, 4))]
        arrays["pair_infos"] = rows
    arrays |= changes
    (root / "scene_info").mkdir(exist_ok=True)
    path = root / "scene_info" / f"{name}.npz"
    if style == "bare pickle":
        path.write_bytes(pickle.dumps(arrays))
    else:
        np.savez(path, **arrays)
    return path


def as_array(values):
    """What numpy made of such a list when the original files were written."""
    if all(value is not None and not isinstance(value, dict) for value in values):
        return np.array(values)
    array = np.empty(len(values), object)
    array[:] = values
    return array


@pytest.mark.parametrize("style", ["d2net", "loftr", "bare pickle"])
@pytest.mark.parametrize("absent", [(), (1,)])
def test_scene_files_of_both_kinds(tmp_path, style, absent):
    info = read_scene_info(write_scene(tmp_path, style=style, absent=absent))
    assert info.name == "0001"
    assert [path is None for path in info.image_paths] == [k in absent for k in range(3)]
    for k in {0, 2} - set(absent):
        np.testing.assert_array_equal(info.intrinsics[k], CAMERAS[k][0])
        np.testing.assert_array_equal(info.poses[k], CAMERAS[k][1])
    every = [(i, j) for i in range(3) for j in range(3) if i != j and not {i, j} & set(absent)]
    expected = every if style == "d2net" else [pair for pair in every if abs(pair[0] - pair[1]) == 1]
    assert sorted(map(tuple, info.pairs.tolist())) == expected
    assert (info.overlap == 0.8).all()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_old_and_new_pickles_of_arrays(tmp_path, protocol):
    values = {"image_paths": np.array(["a", None], object), "depth_paths": np.array(["b", None], object)}
    values |= {"intrinsics": [np.eye(3), None], "poses": [np.eye(4), None]}
    values |= {"pair_infos": [((0, 1), np.float64(0.6), np.ones(3))]}
    data = pickle.dumps(values, protocol)
    older = data.replace(b"numpy._core.", b"numpy.core.") if protocol < 4 else data
    for content in (data, older):
        (tmp_path / "old.npz").write_bytes(content)
        assert len(read_scene_info(tmp_path / "old.npz").image_paths) == 2


class Malicious:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["PYTEST_CURRENT_FOLDER"]) / "owned"),)


@pytest.mark.parametrize("style", ["d2net", "bare pickle"])
def test_nothing_in_a_scene_file_is_run(tmp_path, monkeypatch, style):
    monkeypatch.setenv("PYTEST_CURRENT_FOLDER", str(tmp_path))
    path = write_scene(tmp_path, style=style, poses=as_array([None, Malicious()]))
    with pytest.raises(ValueError, match="mkdir, which is refused") as error:
        read_scene_info(path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"poses": np.zeros((3, 4))}, "reshape"),
        ({"poses": np.zeros((2, 4, 4))}, "differ in length"),
        ({"overlap_matrix": np.zeros((2, 2))}, "3x3"),
        ({"image_paths": np.array(["../a", "b", "c"])}, "inside the data set"),
        ({"image_paths": np.array(["/etc/a", "b", "c"])}, "inside the data set"),
    ],
)
def test_damaged_scene_files(tmp_path, changes, message):
    path = write_scene(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_scene_info(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_truncated_scene_files(tmp_path, share):
    path = write_scene(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="not a usable scene file"):
        read_scene_info(path)


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "mega"
    path.mkdir()
    write_scene(path)
    return path


def open_source(root, **changes):
    return MegaDepthSource(root, **{"crop_size": (64, 80), "pairs_per_scene": 6, **changes})


def test_items_are_crops_with_true_correspondences(root):
    source = open_source(root)
    assert (source.paired, source.crop_size, len(source)) == (True, (64, 80), 6)
    for k in range(len(source)):
        item = source.item(k)
        indices = [int(name.split("/")[1][0]) for name in item.names]
        for image, (left, top, width, height), index in zip(item.images, item.boxes, indices):
            assert image.shape == (64, 80, 3) == (height, width, 3)
            np.testing.assert_array_equal(image, texture(index)[top : top + height, left : left + width])
        assert item.points.shape == (2, POINTS, 2)
        assert item.points.dtype == np.float32
        assert item.valid.sum() >= MIN_VALID
        inside = (item.points >= 0) & (item.points <= (79, 63))
        assert inside.all()
        corner0, corner1 = (np.array(box[:2]) for box in item.boxes)
        first, second = (CAMERAS[index] for index in indices)
        points0 = item.points[0, item.valid] + corner0
        expected = project_with_opencv(points0, plane_depth(*first), first, second) - corner1
        assert np.abs(item.points[1, item.valid] - expected).max() < 1e-3  # float32 depth
        assert len(set(item.names)) == 2


def test_points_are_the_best_corners_of_their_cells(tmp_path):
    write_scene(tmp_path, cameras=[camera(), camera(centre=(79.4, 59.4))])  # the same view moved by a tenth of a pixel
    item = open_source(tmp_path, crop_size=(100, 100)).item(0)
    assert item.valid.all()
    x, y = item.points[0].astype(int).T
    moved = item.points[1] - item.points[0]
    shift = np.round(moved[0], 1)  # a tenth up or down, and perhaps a pixel where the crop was rounded the other way
    np.testing.assert_allclose(moved, np.broadcast_to(shift, moved.shape), atol=1e-4)
    cells = set(zip(y // 4, x // 4))  # almost 100 x 100 pixels are seen: 400 cells need a side below 5
    assert len(cells) == POINTS
    response = cv2.cornerMinEigenVal(cv2.cvtColor(item.images[0], cv2.COLOR_RGB2GRAY), 3)
    j, i = np.mgrid[:100, :100]
    response[(i + shift[0] < 0) | (i + shift[0] > 99) | (j + shift[1] < 0) | (j + shift[1] > 99)] = 0  # out of crop 1
    best = response.reshape(25, 4, 25, 4).max(axis=(1, 3))
    np.testing.assert_array_equal(response[y, x], np.sort(best.ravel())[::-1][:POINTS])


def test_few_correspondences_are_padded(tmp_path):
    write_scene(tmp_path, cameras=[camera(), camera(translation=(2.2, 0, 0))])  # 55 px of parallax
    item = open_source(tmp_path, crop_size=(16, 16)).item(0)
    count = item.valid.sum()
    assert MIN_VALID <= count < POINTS
    assert item.valid[:count].all()
    assert (item.points[:, count:] == 0).all()


def test_everything_follows_from_the_seed(root):
    first, again = open_source(root), open_source(shutil.copytree(root, root.with_name("copy")))
    assert first.provenance() == again.provenance()
    assert str(root) not in str(first.provenance())
    for k in (3, 0):  # in any order
        one, two = first.item(k), again.item(k)
        assert (one.names, one.boxes, one.sha256) == (two.names, two.boxes, two.sha256)
        np.testing.assert_array_equal(one.points, two.points)
    other = open_source(root, seed=1)
    assert other.provenance() != first.provenance()
    assert [other.item(k).boxes for k in range(6)] != [first.item(k).boxes for k in range(6)]


def test_a_scene_does_not_depend_on_the_others(root):
    alone = open_source(root)
    write_scene(root, name="0000")
    both = open_source(root)
    assert len(both) == 12
    assert alone.item(2).boxes == both.item(8).boxes
    assert open_source(root, scenes=["0001"]).provenance() == alone.provenance()
    with pytest.raises(ValueError, match=r"no 0007\.npz"):
        open_source(root, scenes=["0007"])


def test_every_pair_is_drawn_before_any_is_drawn_again(root):
    source = open_source(root, pairs_per_scene=15)
    drawn = Counter(tuple(name.split("#")[0] for name in source.item(k).names) for k in range(15))
    assert sorted(drawn.values()) == [2, 2, 2, 3, 3, 3]


def test_thresholds(root):
    write_scene(root, name="0002", overlap=0.3)
    assert len(open_source(root)) == 6
    assert len(open_source(root, min_overlap=0.1)) == 12
    assert len(open_source(root, min_overlap=0.1, max_overlap=0.5)) == 6
    with pytest.raises(ValueError, match=r"no pair .* widen the limits"):
        open_source(root, min_overlap=0.9)
    with pytest.raises(ValueError, match="no pair"):
        open_source(root, max_scale_ratio=1.1)
    write_scene(root, name="0003", style="loftr")
    with pytest.raises(ValueError, match="0003 has no scale_ratio_matrix"):
        open_source(root, max_scale_ratio=2.0)
    with pytest.raises(ValueError, match="pairs_per_scene >= 1"):
        open_source(root, pairs_per_scene=0)


@pytest.mark.parametrize("left_out", ["phoenix/S6/zl548", "phoenix/S6/zl548/MegaDepth_v1"])
def test_depth_without_the_archives_folders(root, left_out):
    expected = open_source(root).item(0)
    for entry in list((root / left_out).iterdir()):
        entry.rename(root / entry.name)
    shutil.rmtree(root / "phoenix")
    np.testing.assert_array_equal(open_source(root).item(0).points, expected.points)


def test_small_images_are_passed_over(root):
    write_scene(root, cameras=[*CAMERAS, camera()])
    cv2.imwrite(str(root / "Undistorted_SfM/0001/images/3.png"), texture(3, (60, 70)))
    with h5py.File(root / DEPTHS / "3.h5", "w") as file:
        file["depth"] = np.ones((60, 70))
    source = open_source(root, pairs_per_scene=12)
    names = [name for k in range(12) for name in source.item(k).names]
    assert len(set(names)) == 24
    assert not any("/3.png" in name for name in names)


def test_pairs_without_common_points_are_given_up_by_name(root):
    write_scene(root, cameras=[camera(), camera((0, 2.0, 0))])
    with pytest.raises(ValueError, match=r"scene 0001: .*images/[01]\.png and .*; leave the scene out") as error:
        open_source(root).item(0)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="smaller than the 400x400 crop"):
        open_source(root, crop_size=(400, 400)).item(0)


def spoil(path, how):
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "other size":
        with h5py.File(path, "w") as file:
            file["depth"] = np.ones((10, 10))
    elif how == "negative":
        with h5py.File(path, "w") as file:
            file["depth"] = -np.ones(SIZE)
    else:
        with h5py.File(path, "w") as file:
            file["other"] = np.ones(SIZE)


@pytest.mark.parametrize("how", ["missing", "truncated", "other size", "negative", "no dataset"])
def test_bad_depth_is_named(root, how):
    for k in range(3):
        spoil(root / DEPTHS / f"{k}.h5", how)
    with pytest.raises(ValueError, match=r"/[012]\.h5") as error:
        open_source(root).item(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["huge", "flipped"])
def test_damaged_headers_of_depth_are_one_line(root, how):
    path = root / DEPTHS / "0.h5"
    if how == "huge":  # a header that claims 10^12 pixels, of which none is stored
        with h5py.File(path, "w") as file:
            file.create_dataset("depth", shape=(10**6, 10**6), dtype="f4", chunks=(64, 64))
        with pytest.raises(ValueError, match="1000000x1000000 is more than"):
            read_depth(path)
        return
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for bit in rng.integers(8 * 2048, size=300):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        with suppress(ValueError):  # and nothing else
            read_depth(path)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="scene_info"):
        open_source(tmp_path)
    (tmp_path / "scene_info").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        open_source(tmp_path)
