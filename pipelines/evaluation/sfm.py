"""Structure from motion by COLMAP on stored features: a database of verified matches, mapping, triangulation.

Everything random is seeded with ``SEED`` and single-threaded, so results are reproducible; outputs record their
configuration, so they are computed once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

from samfeat.files import write_json
from samfeat.pipelines.evaluation.camera_poses import Pose, PosedCamera
from samfeat.pipelines.extract import Progress
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.metrics import mutual_matches

SEED = 0
PIXEL_CENTRE = 0.5  # COLMAP's (0, 0) is the corner of the top-left pixel, ours its centre
DATABASE = "database.db"

Pairs = Sequence[tuple[str, str]]


def pinhole(camera: PosedCamera) -> pycolmap.Camera:
    """COLMAP's camera with the calibration of ``camera``."""
    matrix, (height, width) = camera.matrix, camera.size
    centre = matrix[:2, 2] + PIXEL_CENTRE
    return pycolmap.Camera(
        model="PINHOLE",
        width=width,
        height=height,
        params=[matrix[0, 0], matrix[1, 1], *centre],
        has_prior_focal_length=True,
    )


def guess_camera(path: Path, size: tuple[int, int]) -> pycolmap.Camera:
    """A photograph's camera as COLMAP guesses it: SIMPLE_RADIAL, the focal length from EXIF or 1.2 x longer side.

    Args:
        path: the photograph.
        size: (height, width) size at which features were extracted, after any EXIF rotation.
    """
    camera = pycolmap.infer_camera_from_image(path)
    camera.height, camera.width = size
    camera.params = [camera.params[0], size[1] / 2, size[0] / 2, 0.0]
    return camera


def camera_pose(image: pycolmap.Image) -> Pose:
    """Pose of a registered image."""
    matrix = image.cam_from_world().matrix()
    return Pose(matrix[:, :3], matrix[:, 3])


def rigid(pose: Pose) -> pycolmap.Rigid3d:
    """COLMAP's form of a pose."""
    return pycolmap.Rigid3d(pycolmap.Rotation3d(pose.rotation), pose.translation)


def create_database(
    folder: str | Path,
    cameras: Mapping[str, pycolmap.Camera],
    features: Callable[[str], Features],
    *,
    config: Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write a COLMAP database of cameras, images and keypoints; an existing one is kept.

    Args:
        folder: gets ``database.db``, and ``database.json`` with the configuration. ``overwrite`` empties the whole
            folder, since everything in it was made from the database.
        cameras: camera by image name. Images have the numbers 1, 2, ... in this order.
        features: features by image name.
        config: JSON values: everything the content of the database depends on.
        overwrite: start anew.

    Raises:
        ValueError: the database was made with another configuration.
    """
    folder = Path(folder)
    path, record = folder / DATABASE, folder / "database.json"
    wanted = json.loads(json.dumps(dict(config)))
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    elif path.exists():
        stored = json.loads(record.read_text()) if record.exists() else {}
        if stored != wanted:
            changed = ", ".join(sorted(k for k in stored | wanted if stored.get(k) != wanted.get(k)))
            raise ValueError(f"{folder} was made with other settings ({changed}): choose another folder, or overwrite")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{DATABASE}.partial"
    for leftover in folder.glob(f"{partial.name}*"):
        leftover.unlink()
    with closing(pycolmap.Database.open(partial)) as database:
        for name, camera in cameras.items():
            number = database.write_image(pycolmap.Image(name=name, camera_id=database.write_camera(camera)))
            database.write_keypoints(number, _colmap_keypoints(features(name)))
    write_json(record, wanted)
    partial.rename(path)
    return path


def _colmap_keypoints(features: Features) -> np.ndarray:
    return features["keypoints"].astype(np.float32) + np.float32(PIXEL_CENTRE)


def match_database(
    path: str | Path,
    features: Callable[[str], Features],
    pairs: Pairs,
    *,
    ratio: float | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> None:
    """Matches image pairs of a database, and verifies them by COLMAP's two-view geometry; pairs that have it are kept.

    Mutual nearest neighbours of descriptors at unit length. The verification is COLMAP's own for cameras with (E or H)
    and without (F or H) a known focal length, with its default thresholds.

    Args:
        path: the database.
        features: features by image name.
        pairs: names of images. Each pair once; the order within a pair matters to ``ratio``.
        ratio: see :func:`samfeat.student.matching.match`.
        verify: estimate the geometry; otherwise only raw matches are written.
        progress: called with (done, total) after every pair.
    """
    unit = lru_cache(maxsize=32)(lambda name: _unit_features(features(name)))
    options = pycolmap.TwoViewGeometryOptions()
    options.ransac.random_seed = SEED
    with quiet(), closing(pycolmap.Database.open(path)) as database:
        images = {image.name: image for image in database.read_all_images()}
        cameras = {camera.camera_id: camera for camera in database.read_all_cameras()}
        for done, names in enumerate(pairs, start=1):
            first, second = (images[name] for name in names)
            numbers = first.image_id, second.image_id
            if not database.exists_matches(*numbers):
                matches = mutual_matches(*(unit(name) for name in names), ratio=ratio)
                database.write_matches(*numbers, matches.astype(np.uint32))
            if verify and not database.exists_two_view_geometry(*numbers):
                geometry = pycolmap.estimate_two_view_geometry(
                    cameras[first.camera_id],
                    database.read_keypoints(first.image_id)[:, :2].astype(np.float64),
                    cameras[second.camera_id],
                    database.read_keypoints(second.image_id)[:, :2].astype(np.float64),
                    database.read_matches(*numbers),
                    options,
                )
                database.write_two_view_geometry(*numbers, geometry)
            if progress:
                progress(done, len(pairs))


def _unit_features(features: Features) -> Features:
    descriptors = features["descriptors"]
    lengths = np.linalg.norm(descriptors, axis=1, keepdims=True)
    return {"descriptors": descriptors / np.maximum(lengths, 1e-12)}


def map_database(
    path: str | Path,
    images: str | Path,
    *,
    fixed_intrinsics: bool,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> pycolmap.Reconstruction:
    """Run COLMAP's incremental mapping; returns the model with the most images (if tied, the most points).

    The model is written to ``sparse`` beside the database (empty if nothing can be mapped) and read from there the next
    time.

    Args:
        path: the database.
        images: folder that the image names are relative to, for the colours of the points.
        fixed_intrinsics: keep the cameras of the database; otherwise refine focal length and distortion.
        threads: 1 is reproducible; more are faster, but results differ in the last digits.
        progress: called with the number of images registered so far.
    """
    output = Path(path).with_name("sparse")
    if output.exists():
        return pycolmap.Reconstruction(output)
    options = _pipeline_options(threads)
    options.min_model_size = 3  # only one model is kept in the end, so small ones are allowed
    options.ba_refine_focal_length = options.ba_refine_extra_params = not fixed_intrinsics
    options.mapper.abs_pose_refine_focal_length = options.mapper.abs_pose_refine_extra_params = not fixed_intrinsics
    registered = 2

    def count() -> None:
        nonlocal registered
        registered += 1
        if progress:
            progress(registered)

    with quiet(), _appearing(output) as partial:
        models = pycolmap.incremental_mapping(path, images, partial, options, next_image_callback=count)
        for leftover in partial.iterdir():
            shutil.rmtree(leftover)
        best = max(models.values(), key=_model_size, default=pycolmap.Reconstruction())
        best.write(partial)
    return pycolmap.Reconstruction(output)  # as another run reads it, in the same order


def _model_size(model: pycolmap.Reconstruction) -> tuple[int, int]:
    return model.num_reg_images(), model.num_points3D()


def triangulate_database(
    path: str | Path, images: str | Path, cameras: Mapping[str, pycolmap.Camera], poses: Mapping[str, Pose]
) -> pycolmap.Reconstruction:
    """Triangulate the verified matches of a database at known poses; written to ``map`` beside it.

    Cameras and poses are kept (COLMAP's ``point_triangulator``). Read from there the next time.

    Args:
        path: the database.
        images: folder that the image names are relative to, for the colours of the points.
        cameras: camera by image name, as in the database.
        poses: pose by name of the images to triangulate from.
    """
    output = Path(path).with_name("map")
    if output.exists():
        return pycolmap.Reconstruction(output)
    with closing(pycolmap.Database.open(path)) as database:
        stored = {image.name: image for image in database.read_all_images()}
    model = pycolmap.Reconstruction()
    for name, pose in poses.items():
        camera, image = pycolmap.Camera(cameras[name].todict()), stored[name]
        camera.camera_id = image.camera_id
        model.add_camera_with_trivial_rig(camera)
        posed = pycolmap.Image(name=name, camera_id=image.camera_id, image_id=image.image_id)
        model.add_image_with_trivial_frame(posed, rigid(pose))
    with quiet(), _appearing(output) as partial:
        pycolmap.triangulate_points(model, path, images, partial, options=_pipeline_options(1))
    return pycolmap.Reconstruction(output)


def count_verified(path: str | Path) -> int:
    """Number of image pairs of a database with verified matches."""
    with closing(pycolmap.Database.open(path)) as database:
        return database.num_verified_image_pairs()


def count_dense_points(path: str | Path, images: str | Path) -> int | None:
    """Number of points of a dense reconstruction (multi-view stereo) of the model written by :func:`map_database`.

    With the settings of the ETH benchmark's script: images of at most 1200 pixels, photometric depth maps, at least 5
    pixels a point. Written to ``dense/fused.ply`` beside the database, and read from there the next time.

    Returns:
        0 for an empty model; None if COLMAP was built without CUDA, which the depth maps need.
    """
    if not pycolmap.has_cuda:
        return None
    sparse, dense = (Path(path).with_name(name) for name in ("sparse", "dense"))
    if pycolmap.Reconstruction(sparse).num_reg_images() == 0:
        return 0
    if not dense.exists():
        undistortion = pycolmap.UndistortCameraOptions(max_image_size=1200)
        stereo = pycolmap.PatchMatchOptions(geom_consistency=False)
        fusion = pycolmap.StereoFusionOptions(min_num_pixels=5)
        with quiet(), _appearing(dense) as partial:
            pycolmap.undistort_images(partial, sparse, images, undistort_options=undistortion)
            pycolmap.patch_match_stereo(partial, options=stereo)
            ply = partial / "fused.ply"
            pycolmap.stereo_fusion(ply, partial, input_type="photometric", options=fusion, output_type="ply")
    cloud = pycolmap.Reconstruction()
    cloud.import_PLY(dense / "fused.ply")
    return cloud.num_points3D()


def posed_cameras(model: pycolmap.Reconstruction) -> dict[str, PosedCamera]:
    """The registered cameras of a model by image name, in alphabetical order, without their distortion."""
    images = sorted((image for image in model.images.values() if image.has_pose), key=lambda image: image.name)
    return {image.name: posed_camera(model.cameras[image.camera_id], camera_pose(image)) for image in images}


def posed_camera(camera: pycolmap.Camera, pose: Pose) -> PosedCamera:
    """A camera of COLMAP at a pose, without its distortion."""
    matrix = camera.calibration_matrix()
    matrix[:2, 2] -= PIXEL_CENTRE
    return PosedCamera(matrix, (camera.height, camera.width), pose)


def points_and_colors(model: pycolmap.Reconstruction) -> tuple[np.ndarray, np.ndarray]:
    """Points of a model, float64 [N, 3], and their colours, uint8 [N, 3]."""
    points = model.points3D.values()
    return np.array([p.xyz for p in points]).reshape(-1, 3), np.array([p.color for p in points], np.uint8).reshape(
        -1, 3
    )


def _pipeline_options(threads: int) -> pycolmap.IncrementalPipelineOptions:
    pycolmap.set_random_seed(SEED)
    options = pycolmap.IncrementalPipelineOptions()
    options.num_threads = options.mapper.num_threads = threads
    options.random_seed = options.mapper.random_seed = options.triangulation.random_seed = SEED
    return options


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``output`` at the end."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    partial.rename(output)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence COLMAP's log: failures raise, and an empty model is a valid result."""
    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = pycolmap.logging.FATAL.value
    try:
        yield
    finally:
        pycolmap.logging.minloglevel = before


def digest(value: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
