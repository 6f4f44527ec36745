import numpy as np
import pycolmap
import pytest
from synthetic_scenes import MATRIX, POINTS, SIZE, cameras, features_of, write_photographs

from samfeat.pipelines.evaluation import sfm
from samfeat.pipelines.evaluation.sfm import (
    count_dense_points,
    count_verified,
    create_database,
    guess_camera,
    map_database,
    match_database,
    pinhole,
    points_and_colors,
    posed_cameras,
    triangulate_database,
)


@pytest.fixture
def place(tmp_path):
    posed = cameras(5)
    write_photographs(tmp_path / "images", list(posed))
    features = {name: features_of(camera, seed=k) for k, (name, camera) in enumerate(posed.items())}
    return tmp_path, posed, features


def pairs_of(names) -> list[tuple[str, str]]:
    names = list(names)
    return [(a, b) for k, a in enumerate(names) for b in names[k + 1 :]]


def build(place, folder="work", **kwargs):
    root, posed, features = place
    lenses = {name: pinhole(camera) for name, camera in posed.items()}
    return create_database(root / folder, lenses, features.__getitem__, config={"a": 1}, **kwargs)


def test_colmap_projects_where_our_keypoints_are(place):
    """COLMAP's camera and keypoints both lie half a pixel further than ours."""
    _, posed, features = place
    with pycolmap.Database.open(build(place)) as database:
        for image in database.read_all_images():
            camera, found = posed[image.name], features[image.name]
            stored = database.read_keypoints(image.image_id)
            assert np.abs(stored - found["keypoints"] - 0.5).max() < 1e-4
            lens = database.read_camera(image.camera_id)
            local = POINTS @ camera.pose.rotation.T + camera.pose.translation
            seen = np.array([lens.img_from_cam(point) for point in local])
            nearest = np.linalg.norm(stored[:, None, :2] - seen, axis=2).min(1)
            assert nearest.max() < 1e-3


def test_posed_cameras_are_the_ones_put_in(place):
    root, posed, features = place
    database = build(place)
    match_database(database, features.__getitem__, pairs_of(posed))
    lenses = {name: pinhole(camera) for name, camera in posed.items()}
    model = triangulate_database(database, root / "images", lenses, {name: c.pose for name, c in posed.items()})
    for name, camera in posed_cameras(model).items():
        assert camera.size == SIZE
        assert np.allclose(camera.matrix, MATRIX)
        assert np.allclose(camera.pose.rotation, posed[name].pose.rotation)
        assert np.allclose(camera.pose.translation, posed[name].pose.translation)


def test_triangulated_points_are_where_they_should_be(place):
    root, posed, features = place
    database = build(place)
    match_database(database, features.__getitem__, pairs_of(posed))
    lenses = {name: pinhole(camera) for name, camera in posed.items()}
    poses = {name: c.pose for name, c in posed.items()}
    model = triangulate_database(database, root / "images", lenses, poses)
    points, _ = points_and_colors(model)
    assert len(points) > 200
    assert np.linalg.norm(points[:, None] - POINTS, axis=2).min(1).max() < 1e-3
    assert model.compute_mean_reprojection_error() < 1e-3
    again = triangulate_database(database, root / "images", lenses, poses)
    assert again.num_points3D() == len(points)


def test_matches_are_mutual_nearest_at_unit_length_and_verified(place):
    _, posed, features = place
    names = list(posed)
    database = build(place)
    match_database(database, features.__getitem__, pairs_of(names), ratio=0.8)
    with pycolmap.Database.open(database) as opened:
        ids = {image.name: image.image_id for image in opened.read_all_images()}
        unit = {
            n: f["descriptors"] / np.linalg.norm(f["descriptors"], axis=1, keepdims=True) for n, f in features.items()
        }
        for first, second in pairs_of(names):
            matches = opened.read_matches(ids[first], ids[second]).astype(int)
            distances = np.linalg.norm(unit[first][:, None] - unit[second], axis=2)
            same = [(i, j) for i, j in zip(*np.nonzero(distances < 1e-3), strict=True)]
            assert sorted(map(tuple, matches.tolist())) == same  # every shared point, no other
            assert len(opened.read_two_view_geometry(ids[first], ids[second]).inlier_matches) > 0.95 * len(same)
    assert count_verified(database) == 10


def test_wrong_matches_are_thrown_out(place):
    root, posed, features = place
    rng = np.random.default_rng(0)
    spoilt = dict(features)
    for name, found in features.items():
        keypoints = found["keypoints"].copy()
        keypoints[:60] = rng.uniform((0, 0), (640, 480), (60, 2))
        spoilt[name] = {**found, "keypoints": keypoints}
    database = build((root, posed, spoilt))
    match_database(database, spoilt.__getitem__, pairs_of(posed))
    lenses = {name: pinhole(camera) for name, camera in posed.items()}
    poses = {name: c.pose for name, c in posed.items()}
    points, _ = points_and_colors(triangulate_database(database, root / "images", lenses, poses))
    assert len(points) > 100
    assert np.mean(np.linalg.norm(points[:, None] - POINTS, axis=2).min(1) < 0.01) > 0.95


def test_raw_matches_stay_out_of_the_map(place):
    root, posed, features = place
    names = list(posed)
    database = build(place)
    match_database(database, features.__getitem__, pairs_of(names[:4]))
    match_database(database, features.__getitem__, [(names[4], name) for name in names[:4]], verify=False)
    assert count_verified(database) == 6
    lenses = {name: pinhole(camera) for name, camera in posed.items()}
    model = triangulate_database(database, root / "images", lenses, {n: posed[n].pose for n in names[:4]})
    assert sorted(posed_cameras(model)) == names[:4]


def test_an_interrupted_matching_goes_on(place, monkeypatch):
    _, posed, features = place
    database, pairs = build(place), pairs_of(posed)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        match_database(database, features.__getitem__, pairs, progress=stop)
    matched = []
    real = sfm.mutual_matches
    monkeypatch.setattr(sfm, "mutual_matches", lambda *args, **kw: matched.append(1) or real(*args, **kw))
    seen = []
    match_database(database, features.__getitem__, pairs, progress=lambda *counts: seen.append(counts))
    assert len(matched) == 6
    assert seen[-1] == (10, 10)
    assert count_verified(database) == 10


def test_the_same_twice(place):
    root, posed, features = place
    models = []
    for folder in ("one", "two"):
        database = build(place, folder)
        match_database(database, features.__getitem__, pairs_of(posed))
        models.append(map_database(database, root / "images", fixed_intrinsics=True))
    first, second = (points_and_colors(model)[0] for model in models)
    assert (first == second).all()
    one, two = (posed_cameras(model) for model in models)
    assert all((one[name].pose.translation == two[name].pose.translation).all() for name in posed)


def test_a_database_of_other_settings_is_refused(place):
    root, posed, features = place
    path = build(place)
    lenses = {name: pinhole(camera) for name, camera in posed.items()}
    with pytest.raises(ValueError, match=r"other settings \(a\)"):
        create_database(root / "work", lenses, features.__getitem__, config={"a": 2})
    match_database(path, features.__getitem__, pairs_of(posed))
    assert create_database(root / "work", lenses, features.__getitem__, config={"a": 1}) == path
    assert count_verified(path) == 10
    create_database(root / "work", lenses, features.__getitem__, config={"a": 2}, overwrite=True)
    assert count_verified(path) == 0


def test_images_without_keypoints_or_matches_give_an_empty_model(place):
    root, posed, features = place
    nothing = {name: {key: values[:0] for key, values in found.items()} for name, found in features.items()}
    database = build((root, posed, nothing))
    match_database(database, nothing.__getitem__, pairs_of(posed))
    for _ in range(2):
        model = map_database(database, root / "images", fixed_intrinsics=True)
        assert (model.num_reg_images(), model.num_points3D()) == (0, 0)


def test_a_camera_is_guessed_as_colmap_does(place):
    root, *_ = place
    path = root / "images" / "0000.png"
    camera = guess_camera(path, SIZE)
    assert camera.model.name == "SIMPLE_RADIAL"
    assert camera.params.tolist() == [1.2 * 640, 320, 240, 0]
    assert camera.params.tolist() == pycolmap.infer_camera_from_image(path).params.tolist()
    turned = guess_camera(path, (640, 480))
    assert (turned.width, turned.height, *turned.params) == (480, 640, 1.2 * 640, 240, 320, 0)


def test_dense_points_are_those_of_colmaps_fusion(place, monkeypatch):
    """Depth maps, which need CUDA, are written by the test: the plane z = 0, which COLMAP's own fusion then fuses."""
    root, posed, features = place
    database = build(place)
    match_database(database, features.__getitem__, pairs_of(posed))
    lenses = {name: pinhole(camera) for name, camera in posed.items()}
    model = triangulate_database(database, root / "images", lenses, {name: c.pose for name, c in posed.items()})
    (root / "work" / "map").rename(root / "work" / "sparse")
    monkeypatch.setattr(pycolmap, "has_cuda", False)
    assert count_dense_points(database, root / "images") is None

    def plane(workspace, options):
        undistorted = pycolmap.Reconstruction(workspace / "sparse")
        for image in undistorted.images.values():
            camera, pose = undistorted.cameras[image.camera_id], image.cam_from_world().matrix()
            columns, rows = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
            rays = np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(camera.calibration_matrix()).T
            normal = pose[:, 2]  # of z = 0, in the camera
            depths = (normal @ pose[:, 3]) / (rays @ normal)
            away = np.broadcast_to(normal if normal[2] < 0 else -normal, rays.shape)
            folder, name = workspace / "stereo", f"{image.name}.photometric.bin"
            pycolmap.DepthMap.from_array(depths.astype(np.float32), 1, 100).write(folder / "depth_maps" / name)
            pycolmap.NormalMap.from_array(away.astype(np.float32)).write(folder / "normal_maps" / name)

    monkeypatch.setattr(pycolmap, "has_cuda", True)
    monkeypatch.setattr(pycolmap, "patch_match_stereo", plane)
    count = count_dense_points(database, root / "images")
    cloud = pycolmap.Reconstruction()
    cloud.import_PLY(root / "work" / "dense" / "fused.ply")
    assert count == cloud.num_points3D() > 1000
    assert np.abs(points_and_colors(cloud)[0][:, 2]).max() < 0.05
    monkeypatch.setattr(pycolmap, "patch_match_stereo", None)
    assert count_dense_points(database, root / "images") == count
    assert model.num_reg_images() == 5
