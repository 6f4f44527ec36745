"""Features and matches in the files of other tools: hloc's HDF5, D2-Net's npz, COLMAP's database, kornia's tensors.

Features are a dictionary of numpy arrays:

- ``keypoints``: float32 [K, 2], (x, y) in pixels, (0, 0) being the centre of the top-left one;
- ``scores``: float32 [K], best first;
- ``descriptors``: float32 [K, D], compared by their dot product;
- ``image_size``: int64 [2], (width, height);
- ``uncertainty``, where the image was resized: float32 [], pixels of the image that one of the resized image covers.

No keypoint at all is a normal result.

Matches are int64 [M, 2]: indices into the features of one image and of the other.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np
import pycolmap

from samfeat.files import umask
from samfeat.pipelines.colmap_database import database_errors
from samfeat.pipelines.features.parts import open_hdf5, read_config

if TYPE_CHECKING:
    from torch import Tensor

Features = dict[str, np.ndarray]

COLMAP_ORIGIN = 0.5  # where COLMAP puts the centre of the top-left pixel, in x and in y


class FeatureFile(Mapping[str, Features]):
    """Features by image name of an HDF5 file in hloc's layout, read on demand; descriptors are transposed back to [K,
    D].

    Raises:
        OSError: no such file, or not an HDF5 file.
        ValueError: it holds no local features; on access, arrays of an image that do not fit together.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        names: list[str] = []
        with open_hdf5(self.path) as file:
            file.visititems(lambda name, entry: names.append(name) if "keypoints" in _datasets(entry) else None)
            self.config = read_config(file)
        if not names:
            raise ValueError(f"{self.path} holds no features: give a file that `extract`, or hloc, wrote")
        self._names = sorted(names)

    def __getitem__(self, name: str) -> Features:
        with open_hdf5(self.path) as file:
            try:
                return read_features(file, name)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_features(file: h5py.File, name: str, features: Features) -> None:
    """Add a group as hloc reads it: keypoints [K, 2], scores [K], descriptors [D, K] (transposed), image_size [2].

    Precision is kept; hloc's own files may hold half floats, which are up to half a pixel off beyond 1024.
    ``keypoints`` carries hloc's attribute ``uncertainty``, the localisation error in pixels.
    """
    group = file.create_group(name)
    for key, values in features.items():
        if key != "uncertainty":
            group.create_dataset(key, data=values.T if key == "descriptors" else values)
    group["keypoints"].attrs["uncertainty"] = float(features.get("uncertainty", 1.0))


def read_features(file: h5py.File, name: str) -> Features:
    """Features of one image from a file in hloc's layout, descriptors transposed back to [K, D].

    Raises:
        KeyError: the file has no such image.
        ValueError: arrays are missing, or of other shapes or types.
    """
    group = file[name]
    if not isinstance(group, h5py.Group):
        raise ValueError(f"{name} is not a group of arrays, as hloc's layout has them")
    features = {key: np.asarray(dataset[()]) for key, dataset in group.items() if isinstance(dataset, h5py.Dataset)}
    for key in ("keypoints", "descriptors", "scores"):
        if key in features and features[key].dtype.kind not in "fiu":
            raise ValueError(f"{name} holds no local features: {key} are not numbers but {features[key].dtype}")
    if "descriptors" in features:
        features["descriptors"] = np.ascontiguousarray(features["descriptors"].T)
    shapes = {key: values.shape for key, values in features.items()}
    count = (shapes.get("keypoints") or (0,))[0]
    width = (shapes.get("descriptors") or (0, 0))[-1]
    wanted = {"keypoints": (count, 2), "descriptors": (count, width), "image_size": (2,)}
    wrong = [key for key, shape in wanted.items() if shapes.get(key) != shape]
    if wrong:
        raise ValueError(
            f"{name} holds no local features of hloc's layout: {wrong[0]} is {shapes.get(wrong[0], 'missing')}"
        )
    return features


def _datasets(entry: h5py.Group | h5py.Dataset) -> list[str]:
    return list(entry) if isinstance(entry, h5py.Group) else []


def write_matches(file: h5py.File, pair: tuple[str, str], found: Mapping[str, np.ndarray], count0: int) -> None:
    """Add a group that hloc reads as the matches of two images. Its name joins both image names, with ``-`` for ``/``,
    by ``/``. ``matches0`` int32 [count0] is the feature of the second image for each of the first, or -1;
    ``matching_scores0`` float32 [count0] the dot product, or 0.

    Args:
        file: open for writing.
        pair: names of the two images.
        found: ``matches`` int64 [M, 2] and ``scores`` float32 [M].
        count0: number of features of the first image.
    """
    group = file.create_group(pair_group(pair))
    index0, index1 = found["matches"].T
    matches0, scores0 = np.full(count0, -1, np.int32), np.zeros(count0, np.float32)
    matches0[index0], scores0[index0] = index1, found["scores"]
    group.create_dataset("matches0", data=matches0)
    group.create_dataset("matching_scores0", data=scores0)


def pair_group(pair: tuple[str, str]) -> str:
    """The group of a pair's matches in hloc's layout."""
    return "/".join(name.replace("/", "-") for name in pair)


def d2net_bytes(features: Features) -> bytes:
    """Write an npz file like D2-Net's: ``keypoints`` [K, 2], ``scores`` [K], ``descriptors`` [K, D]."""
    buffer = io.BytesIO()
    keypoints, scores, descriptors = (features[key] for key in ("keypoints", "scores", "descriptors"))
    np.savez(buffer, keypoints=keypoints, scores=scores, descriptors=descriptors)
    return buffer.getvalue()


class KorniaFeatures(NamedTuple):
    """The tensors that kornia's matchers and ``LocalFeature`` modules exchange.

    Attributes:
        lafs: local affine frames, float32 [1, K, 2, 3].
        responses: float32 [1, K].
        descriptors: float32 [1, K, D].
    """

    lafs: Tensor
    responses: Tensor
    descriptors: Tensor


def to_kornia(features: Mapping[str, Any], *, scale: float = 1.0) -> KorniaFeatures:
    """Features, arrays or tensors, as kornia's local affine frames: upright, and all of one size.

    Args:
        features: as returned by ``SAMFeat.extract``, a method or :class:`FeatureFile`.
        scale: scale of every frame, in pixels; SAMFeat's keypoints have none.
    """
    import torch
    from kornia.feature import laf_from_center_scale_ori

    keypoints, scores, descriptors = (
        torch.as_tensor(features[key]).float()[None] for key in ("keypoints", "scores", "descriptors")
    )
    count = keypoints.shape[1]
    scales = torch.full((1, count, 1, 1), scale, device=keypoints.device)
    lafs = laf_from_center_scale_ori(keypoints, scales, torch.zeros_like(scales[..., 0]))
    return KorniaFeatures(lafs, scores, descriptors)


def write_colmap_database(
    path: str | Path,
    images: Mapping[str, str | Path],
    *,
    features: Mapping[str, Features],
    matches: Mapping[tuple[str, str], np.ndarray],
    cameras: Mapping[str, pycolmap.Camera] | None = None,
    verify: bool = True,
) -> dict[str, int]:
    """Write a database for COLMAP's mapper: cameras, images, keypoints, descriptors, matches, verified geometry.

    The file is written atomically; an existing one is replaced. Keypoints are moved by half a pixel, to COLMAP's
    origin at the corner of the image. Descriptors are float32 of the type ``UNDEFINED``: COLMAP keeps them, but its
    matchers cannot use them, so matches must be given.

    Args:
        path: the ``.db`` file.
        images: file by name, in the order of their numbers; opened for the focal length in its EXIF data, unless
            ``cameras`` has the image.
        features: features by name, of every image; read one image at a time.
        matches: int [M, 2] by the names of the two images, every pair once, in either order.
        cameras: known cameras by image name; images with the very same object share one camera. Any other image gets
            a ``SIMPLE_RADIAL`` camera of its own, with the focal length of its EXIF data or 1.2 times its longer side.
        verify: estimate the two-view geometry of every pair, which mapping needs, by COLMAP's own RANSAC (seed 0).

    Returns:
        COLMAP's number of each image.

    Raises:
        ValueError: matches of an unknown image, of features that do not exist, or of a pair that occurs twice; a camera
            of another size than its image.
        KeyError: an image without features.
        OSError: an image cannot be read, or the database not written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    try:
        with database_errors(partial), _quiet(), pycolmap.Database.open(partial) as database:
            numbers = _write_images(database, images, features, cameras or {})
            _write_matches(database, numbers, matches)
        if verify:
            with database_errors(partial), _quiet():
                options = pycolmap.TwoViewGeometryOptions()
                options.ransac.random_seed = 0
                pycolmap.geometric_verification(partial, two_view_geometry_options=options)
        os.chmod(partial, 0o666 & ~umask())
        os.replace(partial, path)
    except BaseException:
        for leftover in (partial, f"{partial}-wal", f"{partial}-shm", f"{partial}-journal"):
            Path(leftover).unlink(missing_ok=True)
        raise
    return numbers


def _write_images(
    database: pycolmap.Database,
    images: Mapping[str, str | Path],
    features: Mapping[str, Features],
    cameras: Mapping[str, pycolmap.Camera],
) -> dict[str, int]:
    numbers: dict[str, int] = {}
    rigs: dict[int, tuple[int, pycolmap.sensor_t]] = {}  # camera identity -> number of its rig, its sensor
    for name, image_path in images.items():
        stored = features[name]
        width, height = (int(length) for length in stored["image_size"])
        camera = cameras[name] if name in cameras else _guess_camera(Path(image_path), width, height)
        if (camera.width, camera.height) != (width, height):
            raise ValueError(
                f"the camera of {name} is for {camera.width}x{camera.height} pixels, but the image has {width}x{height}"
            )
        with pycolmap.DatabaseTransaction(database):
            rig, sensor = rigs.get(id(camera)) or _write_camera(database, camera)
            if name in cameras:  # a guessed camera is used once; its id may be reused
                rigs[id(camera)] = rig, sensor
            number = database.write_image(pycolmap.Image(name=name, camera_id=sensor.id))
            frame = pycolmap.Frame()
            frame.rig_id = rig
            frame.add_data_id(pycolmap.data_t(sensor, number))
            database.write_frame(frame)
            keypoints = np.asarray(stored["keypoints"], np.float32).reshape(-1, 2) + np.float32(COLMAP_ORIGIN)
            database.write_keypoints(number, keypoints)
            descriptors = np.ascontiguousarray(stored["descriptors"], np.float32)
            database.write_descriptors(
                number,
                pycolmap.FeatureDescriptors(pycolmap.FeatureExtractorType.UNDEFINED, descriptors.view(np.uint8)),
            )
        numbers[name] = number
    return numbers


def _write_camera(database: pycolmap.Database, camera: pycolmap.Camera) -> tuple[int, pycolmap.sensor_t]:
    """A camera and its trivial rig, as COLMAP makes them for single images."""
    sensor = pycolmap.sensor_t(pycolmap.SensorType.CAMERA, database.write_camera(camera))
    rig = pycolmap.Rig()
    rig.add_ref_sensor(sensor)
    return database.write_rig(rig), sensor


def _guess_camera(path: Path, width: int, height: int) -> pycolmap.Camera:
    """COLMAP's guess for a photograph, at the size of the upright image."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the images' folder, or a camera for every image")
    try:
        guess = pycolmap.infer_camera_from_image(path)
    except ValueError:
        raise OSError(f"COLMAP cannot read {path}: give a camera for it, or convert the image") from None
    camera = pycolmap.Camera.create_from_model_name(0, "SIMPLE_RADIAL", guess.mean_focal_length(), width, height)
    camera.has_prior_focal_length = guess.has_prior_focal_length
    return camera


def _write_matches(
    database: pycolmap.Database, numbers: Mapping[str, int], matches: Mapping[tuple[str, str], np.ndarray]
) -> None:
    seen: set[frozenset[str]] = set()
    with pycolmap.DatabaseTransaction(database):
        for pair, indices in matches.items():
            unknown = [name for name in pair if name not in numbers]
            if unknown:
                raise ValueError(f"matches of {pair[0]} and {pair[1]}: there is no image {unknown[0]}")
            if pair[0] == pair[1] or frozenset(pair) in seen:
                raise ValueError(f"matches of {pair[0]} and {pair[1]}: give two images, and every pair once")
            seen.add(frozenset(pair))
            indices = np.asarray(indices).reshape(-1, 2)
            for name, column in zip(pair, indices.T):
                count = database.num_keypoints_for_image(numbers[name])
                if len(column) and not (column.min() >= 0 and column.max() < count):
                    raise ValueError(f"matches of {pair[0]} and {pair[1]}: {name} has only {count} features")
            database.write_matches(numbers[pair[0]], numbers[pair[1]], indices.astype(np.uint32))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence COLMAP's log, and turn its database errors into OSError."""
    level = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = pycolmap.logging.Level.FATAL.value
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"COLMAP cannot write its database ({reason}): is the disk full?") from error
    finally:
        pycolmap.logging.minloglevel = level
