import json
from itertools import permutations

import cv2
import numpy as np
import pytest
import skimage.data

from samfeat.images import read_image
from samfeat.pipelines.sample import write as sample
from samfeat.pipelines.sample.render import (
    SceneCamera,
    Surface,
    look_at,
    mipmap,
    render_depth,
    render_image,
)
from samfeat.pipelines.sample.scenes import HELD_OUT, PICTURES, TILES, WALLS, load_photographs
from samfeat.pipelines.sample.write import disparity_of_right_view, plane_homography, write_sample
from samfeat.teacher_cache.sources.correspondences import correspondences
from samfeat.teacher_cache.sources.megadepth import MegaDepthSource, read_depth, read_scene_info


def pinhole(focal=200.0, size=(120, 160)):
    return np.array([[focal, 0, (size[1] - 1) / 2], [0, focal, (size[0] - 1) / 2], [0, 0, 1.0]])


def slanted(texture=None):
    """A parallelogram that fills the views below; not a rectangle, so that nothing is right by symmetry."""
    texture = np.zeros((8, 8, 3), np.float32) if texture is None else texture
    return Surface(np.array([-3.0, -2.5, 3.5]), np.array([6.0, 0.4, 1.0]), np.array([0.5, 5.0, -0.6]), mipmap(texture))


VIEWPOINTS = [
    SceneCamera(pinhole(), look_at(np.array([0.1, -0.2, 0.0]), np.array([0.2, 0.1, 4.0])), (120, 160)),
    SceneCamera(pinhole(260.0), look_at(np.array([-0.7, 0.4, 0.3]), np.array([0.0, 0.0, 4.0]), roll=0.5), (120, 160)),
]


def homography_between(surface, first, second):
    """From four points of the surface that OpenCV projects into both views."""
    world = surface.corner + np.array([[0.2, 0.2], [0.8, 0.3], [0.7, 0.9], [0.3, 0.8]]) @ [surface.right, surface.down]
    pixels = [
        cv2.projectPoints(world, cv2.Rodrigues(view.pose[:3, :3])[0], view.pose[:3, 3], view.K, None)[0][:, 0]
        for view in (first, second)
    ]
    source, target = ([np.array([x, y, 1]) for x, y in points] for points in pixels)
    rows = [
        row
        for p, (u, v, _) in zip(source, target)
        for row in (np.concatenate([p, np.zeros(3), -u * p]), np.concatenate([np.zeros(3), p, -v * p]))
    ]
    return np.linalg.svd(np.array(rows))[2][-1].reshape(3, 3)


def test_depth_is_exact_to_a_hundredth_of_a_pixel():
    surface = slanted()
    depths = [render_depth([surface], view) for view in VIEWPOINTS]
    assert all((depth > 0).all() for depth in depths)
    y, x = np.mgrid[2:118:5, 2:158:5]
    points0 = np.stack([x.ravel(), y.ravel()], axis=1)
    first, second = VIEWPOINTS
    T = second.pose @ np.linalg.inv(first.pose)
    points1, valid = correspondences(*(d.astype(np.float32) for d in depths), first.K, second.K, T, points0)
    expected = cv2.perspectiveTransform(points0[:, None].astype(np.float64), homography_between(surface, first, second))
    assert valid.mean() > 0.3
    assert np.abs(points1 - expected[:, 0])[valid].max() < 1e-3


def test_the_nearest_surface_hides_the_others():
    far = Surface(
        np.array([-5.0, -5.0, 6.0]), np.array([10.0, 0, 0]), np.array([0, 10.0, 0]), mipmap(np.zeros((4, 4, 3)))
    )
    near = Surface(
        np.array([-0.5, -0.5, 2.0]), np.array([1.0, 0, 0]), np.array([0, 1.0, 0]), mipmap(np.ones((4, 4, 3)))
    )
    behind = Surface(
        np.array([-0.5, -0.5, -2.0]), np.array([1.0, 0, 0]), np.array([0, 1.0, 0]), mipmap(np.ones((4, 4, 3)))
    )
    view = SceneCamera(pinhole(100.0), np.eye(4), (120, 160))
    background = np.full((120, 160, 3), 0.5, np.float32)
    for surfaces in permutations([far, near, behind]):
        depth = render_depth(list(surfaces), view)
        image = render_image(list(surfaces), view, background=background)
        inner = np.zeros((120, 160), bool)
        inner[35:85, 55:105] = True  # 1 m at 2 m and 100 px: 50 px about the centre (79.5, 59.5)
        np.testing.assert_allclose(depth, np.where(inner, 2.0, 6.0), rtol=1e-12)
        np.testing.assert_allclose(image.mean(axis=2), inner, atol=1e-6)


def test_what_is_not_hit_has_no_depth_and_shows_the_background():
    view = SceneCamera(pinhole(), look_at(np.zeros(3), np.array([0, 0, -1.0])), (120, 160))
    background = np.random.default_rng(0).random((120, 160, 3)).astype(np.float32)
    assert (render_depth([slanted()], view) == 0).all()
    np.testing.assert_allclose(render_image([slanted()], view, background=background), background, atol=1e-6)


def test_pictures_move_with_the_homography():
    """A smooth texture looks the same at points that correspond, and the same as OpenCV's warp of the first view."""
    rng = np.random.default_rng(0)
    texture = cv2.resize(rng.random((12, 12, 3)).astype(np.float32), (512, 512), interpolation=cv2.INTER_CUBIC)
    surface, background = slanted(texture), np.zeros((120, 160, 3), np.float32)
    first, second = (render_image([surface], view, background=background) for view in VIEWPOINTS)
    H = homography_between(surface, *VIEWPOINTS)
    warped = cv2.warpPerspective(first, H, (160, 120), flags=cv2.INTER_CUBIC)
    inside = (
        cv2.erode(
            cv2.warpPerspective(np.ones((120, 160), np.uint8), H, (160, 120)),
            np.ones((9, 9)),
            borderType=cv2.BORDER_CONSTANT,
            borderValue=0,
        )
        == 1
    )
    assert inside.mean() > 0.3
    assert np.abs(warped - second)[inside].max() < 0.005


def test_no_aliasing():
    """A chequerboard whose squares are smaller than a pixel is grey, not moiré."""
    board = np.repeat((np.indices((1024, 1024)).sum(axis=0) % 2)[:, :, None], 3, axis=2).astype(np.float32)
    floor = Surface(np.array([-20.0, 1.0, 40.0]), np.array([40.0, 0, 0]), np.array([0, 0, -39.0]), mipmap(board))
    view = SceneCamera(pinhole(), np.eye(4), (120, 160))
    image = render_image([floor], view, background=np.full((120, 160, 3), 0.5, np.float32))
    far, near = image[65:75], image[110:]  # squares of 0.2 to 0.6 pixels; of 2
    assert np.abs(far - 0.5).max() < 0.02
    assert near.std() > 0.02


def test_look_at():
    eye, target = np.array([1.0, -2.0, 3.0]), np.array([-1.0, 0.5, 7.0])
    for roll in (0.0, 0.4):
        pose = look_at(eye, target, roll=roll)
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
        np.testing.assert_allclose(pose @ [*eye, 1], [0, 0, 0, 1], atol=1e-12)
        np.testing.assert_allclose(pose @ [*target, 1], [0, 0, np.linalg.norm(target - eye), 1], atol=1e-12)
    level, turned = look_at(eye, target), look_at(eye, target, roll=0.4)
    assert (level[:3, :3] @ [0, 1, 0])[0] == pytest.approx(0)  # down stays in the picture's vertical plane
    relative = cv2.Rodrigues(turned[:3, :3] @ level[:3, :3].T)[0].ravel()
    np.testing.assert_allclose(np.abs(relative), [0, 0, 0.4], atol=1e-9)


def test_disparity_of_the_right_view():
    row = np.array([[2.0, 2.0, 2.5, 3.0, 3.0, np.nan, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    expected = np.full(14, np.nan)
    # x - d of columns 0-4: -2, -1, -0.5, 0, 1; of the near strip 6-8: -3, -2, -1; of 9-13: 8 ... 12
    expected[[0, 1]] = 3.0
    expected[8:13] = 1.0
    np.testing.assert_allclose(disparity_of_right_view(row)[0], expected)
    left = np.tile(np.linspace(4, 8.05, 60), (3, 1))  # x_right = x - d grows more slowly than x
    right = disparity_of_right_view(left)
    x = np.arange(60)
    found = np.interp(x, x - left[0], left[0], left=np.nan, right=np.nan)
    np.testing.assert_allclose(right[1], found, atol=1e-9)


def test_photographs_are_in_the_wheels_and_held_out_ones_in_no_scene():
    photographs = load_photographs()
    assert not set(HELD_OUT) & {*TILES, *WALLS, *PICTURES}
    assert {name.split("_", 1)[1] for name in sample.HELD_OUT_SEQUENCES} <= set(HELD_OUT)
    for photograph in photographs.values():
        assert photograph.dtype == np.float32
        assert photograph.shape[2] == 3
        assert 0 <= photograph.min() < photograph.max() <= 1
    np.testing.assert_array_equal(np.round(photographs["astronaut"] * 255), skimage.data.astronaut())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A sample of two scenes and two sequences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "ROOMS", 1)
        patch.setattr(sample, "HELD_OUT_SEQUENCES", ("v_chelsea", "i_coffee"))
        folder = tmp_path_factory.mktemp("data") / "sample"
        seen = []
        summary = write_sample(folder, progress=lambda done, total: seen.append((done, total)))
        yield folder, summary, seen


def test_the_sample_is_complete(small):
    folder, summary, seen = small
    assert (summary.scenes, summary.images, summary.heldout) == (2, 8, ("v_chelsea", "i_coffee"))
    assert sorted(seen) == [(k, 20) for k in range(1, 21)]
    assert sorted(path.name for path in folder.iterdir()) == [
        "Undistorted_SfM",
        "heldout",
        "phoenix",
        "sample.json",
        "scene_info",
    ]
    assert not folder.with_name("sample.partial").exists()
    assert json.loads((folder / "sample.json").read_text())["seed"] == 0
    for path in (folder / "scene_info").iterdir():
        assert all(array.dtype != object for array in np.load(path, allow_pickle=False).values())


def test_a_complete_sample_is_left_alone(small):
    folder, summary, _ = small
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_sample(folder) == summary
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps
    with pytest.raises(ValueError, match="of seed 0; remove it"):
        write_sample(folder, seed=1)


def test_rooms_agree_with_sift(small):
    """Depth and poses put points where SIFT finds them in the other view."""
    info = read_scene_info(small[0] / "scene_info" / "0001.npz")
    assert len(info.pairs) == 30
    images = [read_image(small[0] / path) for path in info.image_paths]
    depths = [read_depth(small[0] / path) for path in info.depth_paths]
    assert all(depth.dtype == np.float32 and depth.shape == (480, 640) for depth in depths)
    sift = cv2.SIFT_create(1500, enable_precise_upscale=True)
    features = [sift.detectAndCompute(image, None) for image in images]
    for i, j in info.pairs[info.overlap > 0.7]:
        pairs = cv2.BFMatcher().knnMatch(features[i][1], features[j][1], k=2)
        good = [first for first, second in pairs if first.distance < 0.7 * second.distance]
        points0 = np.array([features[i][0][match.queryIdx].pt for match in good])
        found = np.array([features[j][0][match.trainIdx].pt for match in good])
        T = info.poses[j] @ np.linalg.inv(info.poses[i])
        points1, valid = correspondences(depths[i], depths[j], info.intrinsics[i], info.intrinsics[j], T, points0)
        offset = (found - points1)[valid]
        error = np.linalg.norm(offset, axis=1)
        assert (error < 3).sum() > 50
        assert (error < 3).mean() > 0.6
        assert np.median(error[error < 3]) < 0.6
        assert np.abs(np.median(offset[error < 3], axis=0)).max() < 0.15


def test_the_motorcycle_is_the_measured_pair(small):
    folder = small[0]
    info = read_scene_info(folder / "scene_info" / "0000.npz")
    left, right, disparity = skimage.data.stereo_motorcycle()
    for path, image in zip(info.image_paths, (left, right)):
        assert np.abs(read_image(folder / path).astype(int) - image).mean() < 2.5  # JPEG
    depths = [read_depth(folder / path) for path in info.depth_paths]
    rng = np.random.default_rng(0)
    points0 = np.stack([rng.integers(741, size=4000), rng.integers(500, size=4000)], axis=1)
    T = info.poses[1] @ np.linalg.inv(info.poses[0])
    points1, valid = correspondences(*depths, *info.intrinsics, T, points0)
    d = disparity[points0[:, 1], points0[:, 0]]
    assert np.isfinite(d[valid]).all()
    assert valid.mean() > 0.75
    np.testing.assert_allclose(points1[valid, 0], points0[valid, 0] - d[valid], atol=0.01)
    np.testing.assert_allclose(points1[valid, 1], points0[valid, 1], atol=1e-6)


def test_overlap_and_scale_ratio():
    """A wall four units away, seen, seen zoomed twice, and seen from half as far: closed form."""
    nearer = np.eye(4)
    nearer[2, 3] = -2.0
    cameras = [SceneCamera(pinhole(), np.eye(4), (120, 160)), SceneCamera(pinhole(400.0), np.eye(4), (120, 160))]
    cameras.append(SceneCamera(pinhole(), nearer, (120, 160)))
    views = [
        sample.RenderedView(np.zeros((120, 160, 3), np.uint8), np.full((120, 160), depth), camera)
        for camera, depth in zip(cameras, (4.0, 4.0, 2.0))
    ]
    overlap, scale_ratio = sample.relations(views)
    np.testing.assert_allclose(overlap, [[-1, 0.25, 0.25], [1, -1, 1], [1, 1, -1]], atol=0.03)
    np.testing.assert_allclose(scale_ratio, [[-1, 2, 2], [2, -1, 1], [2, 1, -1]], atol=1e-9)


def test_rooms_make_enough_pairs(small):
    info = read_scene_info(small[0] / "scene_info" / "0001.npz")
    assert (info.overlap >= 0.5).sum() >= 10
    assert info.overlap.max() <= 1
    assert np.nanmin(info.scale_ratio) >= 1


def test_the_reader_takes_the_sample(small):
    source = MegaDepthSource(small[0], pairs_per_scene=3)
    assert len(source) == 6
    for k in range(len(source)):
        item = source.item(k)
        assert all(image.shape == (400, 400, 3) for image in item.images)
        assert item.valid.sum() >= 200


def test_held_out_homographies(small):
    """SIFT matches of the photographs themselves agree with the homographies that are written beside them."""
    folder = small[0] / "heldout"
    assert sorted(path.name for path in folder.iterdir()) == ["i_coffee", "v_chelsea"]
    sift = cv2.SIFT_create(3000, enable_precise_upscale=True)
    for sequence in ("v_chelsea", "i_coffee"):
        views = [read_image(folder / sequence / f"{k}.png") for k in range(1, 7)]
        features = [sift.detectAndCompute(view, None) for view in views]
        for k in range(2, 7):
            H = np.loadtxt(folder / sequence / f"H_1_{k}")
            if sequence == "i_coffee":
                np.testing.assert_allclose(H, np.eye(3), atol=1e-12)
            matches = cv2.BFMatcher(crossCheck=True).match(features[0][1], features[k - 1][1])
            first = np.array([features[0][0][match.queryIdx].pt for match in matches])
            found = np.array([features[k - 1][0][match.trainIdx].pt for match in matches])
            error = np.linalg.norm(cv2.perspectiveTransform(first[:, None], H)[:, 0] - found, axis=1)
            near = error < 3
            assert near.sum() > 60
            assert np.median(error[near]) < 1.0
            assert (
                np.linalg.norm(np.median((found - cv2.perspectiveTransform(first[:, None], H)[:, 0])[near], axis=0))
                < 0.2
            )


def test_plane_homography_against_opencv():
    surface = Surface(np.array([-0.5, -0.4, 0]), np.array([1.0, 0, 0]), np.array([0, 0.8, 0]), ())
    views = [
        SceneCamera(pinhole(), look_at(np.array([0.1, 0.0, -2.0]), np.zeros(3)), (120, 160)),
        SceneCamera(pinhole(250.0), look_at(np.array([0.9, -0.6, -1.5]), np.array([0.1, 0, 0]), roll=0.3), (120, 160)),
    ]
    expected = homography_between(surface, *views)
    np.testing.assert_allclose(plane_homography(*views), expected / expected[2, 2], atol=1e-8)


def test_folders_that_are_no_sample_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not a sample"):
        write_sample(tmp_path / "mine")
    with pytest.raises(ValueError, match="not a sample"):
        write_sample(tmp_path / "mine" / "thesis.txt")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    (tmp_path / "mine" / "sample.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        write_sample(tmp_path / "mine")


def test_an_interrupted_sample_leaves_no_folder(tmp_path, monkeypatch):
    def stop(done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "ROOMS", 0)
    monkeypatch.setattr(sample, "HELD_OUT_SEQUENCES", ())
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path / "sample", progress=stop)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "sample.partial").mkdir()  # left by a process that was killed
    (tmp_path / "sample").mkdir()
    monkeypatch.chdir(tmp_path / "sample")
    summary = write_sample(".")  # an empty folder will do
    assert summary.images == 2
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]
