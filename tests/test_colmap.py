"""COLMAP's models against a plane that many cameras see: closed forms and OpenCV say where every point belongs."""

import pickle
import struct

import cv2
import numpy as np
import pycolmap
import pytest
from PIL import Image

from samfeat.teacher_cache.schema import POINTS
from samfeat.teacher_cache.sources import open_source
from samfeat.teacher_cache.sources.colmap import ColmapSource, pairs_of
from samfeat.teacher_cache.sources.colmap_model import ColmapCamera, find_workspaces, read_array, read_model
from samfeat.teacher_cache.sources.correspondences import PIXEL_TOLERANCE
from samfeat.teacher_cache.sources.folder import FolderSource
from samfeat.teacher_cache.sources.pairs import MIN_VALID

SIZE = (120, 160)
CROP = (80, 96)
NORMAL, OFFSET = np.array([0.2, -0.1, 1.0]), -6.0  # n . X + d = 0 in the world, six units away
MOTIONS = [
    ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ((0.05, -0.1, 0.2), (0.6, 0.1, -0.2)),
    ((-0.05, 0.08, -0.3), (-0.5, 0.2, 0.4)),
]
CENTRE = (79.2, 60.4)  # principal point with (0, 0) the centre of the top-left pixel
LENSES = {  # parameters behind the focal lengths and the principal point; OpenCV's (k1, k2, p1, p2)
    "SIMPLE_PINHOLE": ((), (0, 0, 0, 0)),
    "PINHOLE": ((), (0, 0, 0, 0)),
    "SIMPLE_RADIAL": ((-0.15,), (-0.15, 0, 0, 0)),
    "RADIAL": ((-0.15, 0.05), (-0.15, 0.05, 0, 0)),
    "OPENCV": ((-0.15, 0.05, 0.003, -0.004), (-0.15, 0.05, 0.003, -0.004)),
}


class Views:
    """Three cameras with one lens before a plane, seen through OpenCV."""

    def __init__(self, lens):
        self.lens = lens
        extra, distortion = LENSES[lens]
        self.focal = (150.0, 150.0) if lens in ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL") else (150.0, 155.0)
        self.K = np.array([[self.focal[0], 0, CENTRE[0]], [0, self.focal[1], CENTRE[1]], [0, 0, 1]])
        self.distortion = np.array(distortion, float)
        focals = self.focal[:1] if self.focal[0] == self.focal[1] else self.focal
        self.params = [*focals, CENTRE[0] + 0.5, CENTRE[1] + 0.5, *extra]  # COLMAP's pixels
        self.R = [cv2.Rodrigues(np.array(rotation))[0] for rotation, _ in MOTIONS]
        self.t = [np.array(translation) for _, translation in MOTIONS]

    def project(self, k, world):
        return cv2.projectPoints(world, cv2.Rodrigues(self.R[k])[0], self.t[k], self.K, self.distortion)[0][:, 0]

    def on_plane(self, k, points):
        """Where the rays of pixels meet the plane, in the world; and their depth."""
        criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 1e-12)
        flat = cv2.undistortPointsIter(points[:, None].astype(float), self.K, self.distortion, None, None, criteria)
        rays = np.c_[flat[:, 0], np.ones(len(points))] @ self.R[k]
        eye = -self.R[k].T @ self.t[k]
        z = -(NORMAL @ eye + OFFSET) / (rays @ NORMAL)
        return eye + z[:, None] * rays, z

    def transfer(self, i, j, points):
        """The closed form: from image i through the plane to image j."""
        return self.project(j, self.on_plane(i, points)[0])

    def depth(self, k):
        y, x = np.mgrid[: SIZE[0], : SIZE[1]]
        return self.on_plane(k, np.stack([x.ravel(), y.ravel()], axis=1))[1].reshape(SIZE)


def texture(seed, size=SIZE):
    rng = np.random.default_rng(seed)
    return cv2.GaussianBlur(rng.integers(0, 256, size=(*size, 3)).astype(np.uint8), (0, 0), 1.0)


def inside(points, size=SIZE):
    return np.all((points >= 0) & (points <= (size[1] - 1, size[0] - 1)), axis=1)


def write_model(root, views, *, text=False, folder="sparse", scale=1.0, offset=None, number=2500):
    """A model of points of the plane, and its images; ``offset`` is added to what image 1 observes of odd points."""
    rng = np.random.default_rng(0)
    world, _ = views.on_plane(0, rng.uniform((-20, -20), (SIZE[1] + 20, SIZE[0] + 20), size=(number, 2)))
    model = pycolmap.Reconstruction()
    model.add_camera_with_trivial_rig(
        pycolmap.Camera(camera_id=1, model=views.lens, width=SIZE[1], height=SIZE[0], params=views.params)
    )
    tracks = [pycolmap.Track() for _ in world]
    (root / "images").mkdir(parents=True, exist_ok=True)
    for k in range(len(MOTIONS)):
        points = views.project(k, world)
        if offset is not None and k == 1:
            points[1::2] += offset
        seen = np.flatnonzero(inside(points))
        image = pycolmap.Image(f"{k}.png", points[seen] + 0.5, 1, k + 1)
        pose = np.c_[views.R[k], views.t[k] * scale]
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose))
        for row, point in enumerate(seen):
            tracks[point].add_element(k + 1, row)
        Image.fromarray(texture(k)).save(root / "images" / f"{k}.png")
    for xyz, track in zip(world * scale, tracks):
        if track.length() >= 2:
            model.add_point3D(xyz, track)
    (root / folder).mkdir(parents=True, exist_ok=True)
    (model.write_text if text else model.write_binary)(root / folder)
    return root


def write_colmap_depth(path, depth):
    """COLMAP's format, by its documentation: width&height&channels&, then float32, x fastest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = depth.shape
    values = [depth[y, x] for y in range(height) for x in range(width)]
    path.write_bytes(f"{width}&{height}&1&".encode() + struct.pack(f"<{len(values)}f", *values))


def write_png_depth(path, depth):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.rint(depth).astype(np.uint16))


def errors_of(source, views):
    """Distance in pixels of every valid correspondence from where the closed form puts it; and the items."""
    distances, items = [], [source.item(k) for k in range(len(source))]
    for item in items:
        i, j = (int(name.split("/")[1][0]) for name in item.names)
        points0 = item.points[0, item.valid].astype(float) + item.boxes[0][:2]
        points1 = item.points[1, item.valid].astype(float) + item.boxes[1][:2]
        distances.append(np.linalg.norm(views.transfer(i, j, points0) - points1, axis=1))
    return np.concatenate(distances), items


def source_of(root, **changes):
    return ColmapSource(root, **{"crop_size": CROP, "pairs_per_scene": 6, **changes})


# -- tracks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
@pytest.mark.parametrize("lens", LENSES)
def test_tracks_are_where_the_plane_puts_them(tmp_path, lens, text):
    views = Views(lens)
    distances, items = errors_of(source_of(write_model(tmp_path, views, text=text)), views)
    assert distances.max() < 1e-3  # float32; half a pixel too many would be 0.05 and more
    for item in items:
        assert item.points.shape == (2, POINTS, 2)
        assert item.valid.sum() >= MIN_VALID
        assert inside(item.points[:, item.valid].reshape(-1, 2), CROP).all()
        assert (item.points[:, ~item.valid] == 0).all()
        for image, name, (left, top, width, height) in zip(item.images, item.names, item.boxes):
            whole = texture(int(name.split("/")[1][0]))
            np.testing.assert_array_equal(image, whole[top : top + height, left : left + width])


def test_half_a_pixel_would_show():
    views = Views("PINHOLE")
    points = np.random.default_rng(0).uniform((20, 20), (140, 100), size=(200, 2))
    shifted = views.transfer(0, 2, points + 0.5) - 0.5
    assert np.linalg.norm(shifted - views.transfer(0, 2, points), axis=1).min() > 0.05


@pytest.mark.parametrize("lens", LENSES)
def test_cameras_against_opencv(lens):
    views = Views(lens)
    camera = ColmapCamera(lens, SIZE, tuple(views.params))
    points = np.random.default_rng(0).uniform((0, 0), (159, 119), size=(300, 2))
    world, z = views.on_plane(0, points)
    np.testing.assert_allclose(camera.pixels(world), points, atol=1e-6)
    np.testing.assert_allclose(camera.rays(points) * z[:, None], world, atol=1e-6)
    assert np.isnan(camera.pixels(-world)).all()


def test_many_tracks_are_thinned_to_the_best_corners(tmp_path):
    views = Views("PINHOLE")
    item = source_of(write_model(tmp_path, views, number=20000)).item(0)
    assert 0.8 * POINTS < item.valid.sum() <= POINTS
    x, y = np.rint(item.points[0, item.valid]).astype(int).T
    side = int(np.sqrt(CROP[0] * CROP[1] / POINTS))
    assert len(set(zip(y // side, x // side))) == item.valid.sum()  # one in a cell
    response = cv2.cornerMinEigenVal(cv2.cvtColor(item.images[0], cv2.COLOR_RGB2GRAY), 3)[y, x]
    assert (np.diff(response) <= 0).all()


@pytest.mark.parametrize(("offset", "kept"), [(0.9 * PIXEL_TOLERANCE, True), (1.1 * PIXEL_TOLERANCE, False)])
def test_observations_off_their_point_are_left_out(tmp_path, offset, kept):
    views = Views("OPENCV")
    source = source_of(write_model(tmp_path, views, offset=(offset, 0)), pairs_per_scene=12)
    distances, _ = errors_of(source, views)
    assert (distances.max() > 0.5) == kept


def test_pairs_against_sets_of_points(tmp_path):
    options = pycolmap.SyntheticDatasetOptions()
    options.num_points3D, options.track_length, options.num_frames_per_rig = 300, 3, 4
    synthetic = pycolmap.synthesize_dataset(options)
    synthetic.write(tmp_path)
    model = read_model(tmp_path)
    seen = [
        {point.point3D_id for point in synthetic.find_image_with_name(image.name).get_observation_points2D()}
        for image in model.images
    ]
    assert [set(image.ids.tolist()) for image in model.images] == seen
    for low, high in ((0.0, 1.0), (0.3, 1.0), (0.0, 0.35)):
        expected = [
            (i, j)
            for i in range(len(seen))
            for j in range(len(seen))
            if i != j and len(seen[i] & seen[j]) >= MIN_VALID and low <= len(seen[i] & seen[j]) / len(seen[i]) <= high
        ]
        assert list(map(tuple, pairs_of(model, min_overlap=low, max_overlap=high).tolist())) == expected
    assert 0 < len(expected) < len(seen) * (len(seen) - 1)


# -- depth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_depth_files_against_pycolmap(tmp_path, channels):
    depth = np.random.default_rng(0).uniform(1, 9, size=(5, 7)).astype(np.float32)
    if channels == 1:
        pycolmap.DepthMap.from_array(depth, 0.0, 10.0).write(tmp_path / "theirs.bin")
        write_colmap_depth(tmp_path / "ours.bin", depth)
        assert (tmp_path / "theirs.bin").read_bytes() == (tmp_path / "ours.bin").read_bytes()
        again = pycolmap.DepthMap()
        again.read(tmp_path / "ours.bin")
        np.testing.assert_array_equal(again.to_array(), read_array(tmp_path / "ours.bin"))
    else:  # as normal maps are written
        planes = np.stack([depth, 2 * depth, 3 * depth])
        (tmp_path / "theirs.bin").write_bytes(b"7&5&3&" + planes.tobytes())
    np.testing.assert_array_equal(read_array(tmp_path / "theirs.bin"), depth)


@pytest.mark.parametrize("data", [b"", b"7&5&", b"7&5&1&1234", b"a&b&c&" + bytes(140), b"7&5&1&" + bytes(139)])
def test_damaged_depth_files(tmp_path, data):
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.bin is not a depth map of COLMAP's"):
        read_array(tmp_path / "x.bin")


def test_colmaps_depth_gives_dense_correspondences(tmp_path):
    views = Views("PINHOLE")
    write_model(tmp_path, views)
    for k in range(3):
        write_colmap_depth(tmp_path / "stereo/depth_maps" / f"{k}.png.geometric.bin", np.maximum(views.depth(k), 0))
    distances, items = errors_of(source_of(tmp_path), views)
    assert distances.max() < 1e-3
    assert np.median([item.valid.sum() for item in items]) > 0.7 * POINTS
    whole = np.concatenate([item.points[0, item.valid] for item in items])
    np.testing.assert_array_equal(whole, np.rint(whole))  # pixels, not tracks


def test_what_something_hides_does_not_correspond(tmp_path):
    views = Views("PINHOLE")
    write_model(tmp_path, views)
    for k in range(3):
        depth = views.depth(k)
        if k == 1:
            depth[:, 60:110] *= 0.5  # something stands in front, in this view alone
        write_colmap_depth(tmp_path / "stereo/depth_maps" / f"{k}.png.geometric.bin", depth)
    checked = 0
    for item in (source_of(tmp_path, pairs_per_scene=12).item(k) for k in range(12)):
        for side, name in enumerate(item.names):
            if "/1.png" in name:
                x = item.points[side, item.valid, 0] + item.boxes[side][0]
                assert not ((x > 60) & (x < 109)).any()
                checked += len(x)
    assert checked > 1000


@pytest.mark.parametrize("lens", ["PINHOLE", "OPENCV"])
def test_measured_depth_of_any_unit_and_lens(tmp_path, lens):
    views = Views(lens)
    write_model(tmp_path, views, scale=0.37)
    for k in range(3):
        write_png_depth(tmp_path / "depth" / f"{k}.png", np.maximum(1000 * views.depth(k), 0))  # six metres
    distances, items = errors_of(source_of(tmp_path), views)
    assert distances.max() < 0.05  # a millimetre is a sixth of a per mille
    assert np.median([item.valid.sum() for item in items]) > 0.5 * POINTS


def test_smaller_depth_maps_are_stretched(tmp_path):
    views = Views("PINHOLE")
    write_model(tmp_path, views)
    for k in range(3):
        blocks = views.depth(k).reshape(60, 2, 80, 2).mean(axis=(1, 3))
        write_png_depth(tmp_path / "depth" / f"{k}.png", 1000 * blocks)
    distances, items = errors_of(source_of(tmp_path), views)
    assert distances.max() < 0.5  # the plane is slanted, a depth pixel two wide
    assert np.median(distances) < 0.1
    assert min(item.valid.sum() for item in items) > MIN_VALID


def test_a_pair_without_depth_falls_back_to_tracks(tmp_path):
    views = Views("PINHOLE")
    write_model(tmp_path, views)
    before = source_of(tmp_path).provenance()
    for k in range(2):
        write_colmap_depth(tmp_path / "stereo/depth_maps" / f"{k}.png.geometric.bin", np.maximum(views.depth(k), 0))
    source = source_of(tmp_path, pairs_per_scene=12)
    _, items = errors_of(source, views)
    for item in items:
        dense = not any("/2.png" in name for name in item.names)
        assert np.array_equal(item.points[0], np.rint(item.points[0])) == dense
    assert (before["with_depth"], source.provenance()["with_depth"]) == ({"0": 0}, {"0": 2})


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (np.full((50, 160), 6000), "another shape"),
        (np.random.default_rng(0).uniform(1000, 60000, size=SIZE), "disagrees with the model's points"),
        (np.zeros(SIZE), "at 0 points of the model"),
    ],
)
def test_wrong_depth_is_named(tmp_path, depth, message):
    write_model(tmp_path, Views("PINHOLE"))
    for k in range(3):
        write_png_depth(tmp_path / "depth" / f"{k}.png", depth)
    with pytest.raises(ValueError, match=message) as error:
        source_of(tmp_path).item(0)
    assert "\n" not in str(error.value)


# -- folders and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "name"),
    [("sparse/0", "0"), ("sparse", "0"), ("", "0"), ("church/sparse", "church"), ("7/sparse/2", "7/2")],
)
@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
def test_models_are_found_where_colmap_puts_them(tmp_path, folder, name, text):
    inner = folder.split("sparse")[0]
    write_model(tmp_path / inner, Views("SIMPLE_RADIAL"), folder=folder.removeprefix(inner), text=text)
    assert [workspace.name for workspace in find_workspaces(tmp_path)] == [name]
    source = open_source(tmp_path, crop_size=80, pairs_per_scene=3)
    assert (source.provenance()["kind"], source.paired, len(source)) == ("colmap", True, 3)
    assert source.item(0).names[0].startswith(f"{name}/")


@pytest.mark.parametrize("images", ["images", "."])
def test_images_beside_the_folder_of_the_model(tmp_path, images):
    """As nerfstudio lays out its data: colmap/sparse/0, and images/ beside colmap."""
    write_model(tmp_path, Views("PINHOLE"), folder="sparse/0")
    (tmp_path / "colmap").mkdir()
    (tmp_path / "sparse").rename(tmp_path / "colmap" / "sparse")
    if images == ".":
        for path in list((tmp_path / "images").iterdir()):
            path.rename(tmp_path / path.name)
        (tmp_path / "images").rmdir()
    for root in (tmp_path, tmp_path / "colmap"):
        source = source_of(root, pairs_per_scene=3)
        item = source.item(0)
        assert not item.passed_over
        file = source.file_of(item.names[0])
        assert file.parent.resolve() == (tmp_path / images).resolve()
        assert file.name == item.names[0].split("/")[-1].split("#")[0]


def test_every_model_is_a_scene(tmp_path):
    for name in ("b", "a"):
        write_model(tmp_path / name, Views("PINHOLE"))
    both, alone = source_of(tmp_path), source_of(tmp_path / "a")
    assert [both.item(k).names[0].split("/")[0] for k in (0, 5, 6, 11)] == ["a", "a", "b", "b"]
    assert (len(both), len(alone)) == (12, 6)


def test_a_folder_of_photographs_is_no_model(tmp_path):
    (tmp_path / "sparse").mkdir()
    Image.fromarray(texture(0)).save(tmp_path / "sparse" / "a.png")
    assert find_workspaces(tmp_path) == []
    assert isinstance(open_source(tmp_path, crop_size=64), FolderSource)
    with pytest.raises(ValueError, match="holds no COLMAP model"):
        ColmapSource(tmp_path)


def test_images_are_read_as_colmap_reads_them(tmp_path):
    """COLMAP ignores the EXIF orientation; whoever applies it looks for the points in a turned image."""
    write_model(tmp_path, Views("PINHOLE"))
    for k in range(3):
        picture = Image.fromarray(texture(k))
        exif = picture.getexif()
        exif[274] = 3  # upside down: of the same size
        picture.save(tmp_path / "images" / f"{k}.png", exif=exif)
        np.testing.assert_array_equal(
            pycolmap.Bitmap.read(tmp_path / "images" / f"{k}.png", True).to_array(), texture(k)
        )
    item = source_of(tmp_path).item(0)
    left, top, width, height = item.boxes[0]
    whole = texture(int(item.names[0].split("/")[1][0]))
    np.testing.assert_array_equal(item.images[0], whole[top : top + height, left : left + width])


def test_everything_follows_from_the_seed_and_travels(tmp_path):
    write_model(tmp_path / "here", Views("PINHOLE"))
    write_model(tmp_path / "there", Views("PINHOLE"))
    first, again = source_of(tmp_path / "here"), pickle.loads(pickle.dumps(source_of(tmp_path / "there")))
    assert first.provenance() == again.provenance()
    for k in (3, 0):
        np.testing.assert_array_equal(first.item(k).points, again.item(k).points)
    assert source_of(tmp_path / "here", seed=1).provenance() != first.provenance()
    write_model(tmp_path / "there", Views("PINHOLE"), scale=2.0)
    assert source_of(tmp_path / "there").provenance()["models"] != first.provenance()["models"]


def test_clear_words_about_bad_models(tmp_path):
    views = Views("PINHOLE")
    write_model(tmp_path / "few", views, number=30)
    with pytest.raises(ValueError, match=r"no two images of .* share 32 points"):
        source_of(tmp_path / "few")
    write_model(tmp_path / "cut", views)
    path = tmp_path / "cut" / "sparse" / "points3D.bin"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a usable COLMAP model") as error:
        source_of(tmp_path / "cut")
    assert "\n" not in str(error.value)
    write_model(tmp_path / "gone", views)
    with pytest.raises(ValueError, match="smaller than the 200x200 crop"):
        source_of(tmp_path / "gone", crop_size=(200, 200)).item(0)
    (tmp_path / "gone/images/1.png").unlink()
    source = source_of(tmp_path / "gone", pairs_per_scene=12)
    for words in (r"1.png is missing", "1.png is 80x60 but its camera 160x120"):
        items = [source.item(k) for k in range(12)]  # the pair of the other two images takes the place of the rest
        assert {name.split("#")[0] for item in items for name in item.names} == {"0/0.png", "0/2.png"}
        said = {reason for item in items for reason in item.passed_over}
        assert len(said) == 1
        assert words in said.pop()
        assert any(not item.passed_over for item in items)
        Image.fromarray(texture(1, (60, 80))).save(tmp_path / "gone/images/1.png")
    for k in (0, 2):
        (tmp_path / f"gone/images/{k}.png").unlink()
    with pytest.raises(ValueError, match="20 pairs in a row were unusable, the last one"):
        source.item(0)
    with pytest.raises(ValueError, match="min_overlap <= max_overlap"):
        source_of(tmp_path / "gone", min_overlap=0.5, max_overlap=0.1)
    with pytest.raises(ValueError, match="local folders alone"):
        ColmapSource("memory://models")
