"""Find and read COLMAP's output: models (cameras, poses, tracks) as text or binary, and depth maps.

In COLMAP's files (0.5, 0.5) is the centre of the top-left pixel. In everything returned from this file it is (0, 0).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import cv2
import numpy as np
from upath import UPath

from samfeat.teacher_cache.sources.correspondences import PIXEL_TOLERANCE, depth_at

if TYPE_CHECKING:
    import pycolmap

_HALF_PIXEL = 0.5
_TRIAL = """
import resource, sys, pycolmap
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), resource.RLIM_INFINITY))
pycolmap.Reconstruction(sys.argv[1])
"""  # pycolmap aborts on truncated files, or allocates all memory
_PROGRAM_BYTES, _MODEL_FACTOR = 2**31, 100  # address space for a trial: for the program, and for each byte of a model
_FEWEST = 16  # points that tell the unit of a depth map
_SPREAD = 0.1  # median relative deviation of a depth map from the model, once scaled; more is another scene


@dataclass(frozen=True)
class Workspace:
    """Locations of the parts of a reconstruction.

    Attributes:
        name: path of the model below the data folder, without ``sparse``; it does not say where that folder lies.
        model: folder of ``cameras``, ``images``, ``points3D``, ``.bin`` or ``.txt``.
        images: folder that the names of the model's images start from.
        stereo: folder of COLMAP's depth maps, ``<image name>.geometric.bin``; it need not exist.
        depth: folder of measured depth, ``<image name without suffix>.png``; it need not exist.
    """

    name: str
    model: UPath
    images: UPath
    stereo: UPath
    depth: UPath

    def depth_file(self, image: str) -> UPath | None:
        """The depth map of an image, preferring COLMAP's to a measured one; None if there is none."""
        choices = (self.stereo / f"{image}.geometric.bin", self.depth / str(PurePosixPath(image).with_suffix(".png")))
        return next((path for path in choices if path.is_file()), None)


@dataclass(frozen=True)
class ColmapCamera:
    """Any COLMAP camera, including distortion, with (0, 0) the centre of the top-left pixel."""

    model: str
    size: tuple[int, int]  # (height, width)
    params: tuple[float, ...]

    @cached_property
    def _camera(self) -> pycolmap.Camera:
        import pycolmap

        return pycolmap.Camera(model=self.model, height=self.size[0], width=self.size[1], params=self.params)

    def rays(self, points: np.ndarray) -> np.ndarray:
        """Directions [n, 3], z = 1, of pixels [n, 2]; NaN where there is none."""
        directions = np.asarray(self._camera.cam_from_img(np.ascontiguousarray(points, np.float64) + _HALF_PIXEL))
        return np.hstack([directions, np.ones((len(points), 1))])

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Pixels [n, 2] of points [n, 3]; NaN behind the camera."""
        return np.asarray(self._camera.img_from_cam(np.ascontiguousarray(points, np.float64))) - _HALF_PIXEL


@dataclass(frozen=True)
class PosedImage:
    """An image of a model and the 3-D points it observes.

    Attributes:
        name: of its file, below the workspace's images.
        camera: its intrinsics.
        pose: float64 [4, 4], world to camera.
        ids: int64 [n], the points it observes, ascending.
        points: float64 [n, 2], (x, y) where it observes them.
        depths: float64 [n], their depth along its optical axis.
    """

    name: str
    camera: ColmapCamera
    pose: np.ndarray
    ids: np.ndarray
    points: np.ndarray
    depths: np.ndarray


@dataclass(frozen=True)
class Model:
    """The registered images of a model, by name, and a digest of its files."""

    images: tuple[PosedImage, ...]
    sha256: str


def find_workspaces(folder: str | Path | UPath) -> list[Workspace]:
    """The reconstructions in a folder, or else in its sub-folders; empty if there are none.

    A model is in ``sparse/<number>/``, in ``sparse/`` or in the folder itself; its images are in ``images/`` or in the
    folder itself, or where :func:`beside_its_images` finds them.
    """
    root = UPath(folder)
    if found := list(_workspaces_in(root, root)):
        return found
    inner = sorted(path for path in root.iterdir() if path.is_dir())
    return [workspace for path in inner for workspace in _workspaces_in(path, root)]


def _workspaces_in(folder: UPath, root: UPath) -> Iterator[Workspace]:
    sparse = folder / "sparse"
    numbered = [path for path in sparse.iterdir() if path.name.isdecimal()] if sparse.is_dir() else []
    models = sorted((path for path in numbered if _is_model(path)), key=lambda path: int(path.name))
    if not models:
        models = [path for path in (sparse, folder) if _is_model(path)][:1]
    images = folder / "images" if (folder / "images").is_dir() else folder
    for model in models:
        parts = [part for part in model.relative_to(root).parts if part != "sparse"]
        yield Workspace("/".join(parts) or "0", model, images, folder / "stereo" / "depth_maps", folder / "depth")


def beside_its_images(workspace: Workspace, model: Model) -> Workspace:
    """The workspace with the folder that holds most of the model's images.

    That is usually the one it has. Other programs write ``colmap/sparse/0`` and the images beside ``colmap``: so
    ``images/`` in each folder around the model, and these folders themselves, are looked at too.
    """

    def held(folder: UPath) -> int:
        return sum((folder / image.name).is_file() for image in model.images)

    if not model.images or (workspace.images / model.images[0].name).is_file():
        return workspace
    around = list(workspace.model.parents)[:3]
    choices = [workspace.images, *(folder / "images" for folder in around), *around]
    return replace(workspace, images=max(choices, key=held))


def _is_model(folder: UPath) -> bool:
    return any(all((folder / f"{part}.{kind}").is_file() for part in ("cameras", "images")) for kind in ("bin", "txt"))


def read_model(folder: str | Path) -> Model:
    """Read a model, leaving out observations that are ``PIXEL_TOLERANCE`` or more off their 3-D point.

    Raises:
        ValueError: the model is damaged or incomplete.
    """
    import pycolmap

    path = Path(folder)
    files = sorted(file for file in path.iterdir() if file.suffix in (".bin", ".txt"))
    limit = _PROGRAM_BYTES + _MODEL_FACTOR * sum(file.stat().st_size for file in files)
    trial = subprocess.run([sys.executable, "-c", _TRIAL, str(path), str(limit)], capture_output=True)
    if trial.returncode != 0:
        raise ValueError(f"{path} is not a usable COLMAP model, a file is damaged or missing; export it again")
    reconstruction = pycolmap.Reconstruction(path)
    ids = np.array(sorted(reconstruction.points3D), np.int64)
    world = np.array([reconstruction.points3D[int(k)].xyz for k in ids]).reshape(-1, 3)
    cameras = {
        number: ColmapCamera(camera.model_name, (camera.height, camera.width), tuple(camera.params.tolist()))
        for number, camera in reconstruction.cameras.items()
    }
    images = [
        _posed_image(image, cameras[image.camera_id], ids, world)
        for image in reconstruction.images.values()
        if image.has_pose
    ]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return Model(tuple(sorted(images, key=lambda image: image.name)), digest.hexdigest())


def _posed_image(image: pycolmap.Image, camera: ColmapCamera, ids: np.ndarray, world: np.ndarray) -> PosedImage:
    observed = image.get_observation_points2D()
    seen, first = np.unique(np.array([each.point3D_id for each in observed], np.int64), return_index=True)
    points = np.array([each.xy for each in observed]).reshape(-1, 2)[first] - _HALF_PIXEL
    pose = np.vstack([image.cam_from_world().matrix(), (0, 0, 0, 1)])
    local = world[np.searchsorted(ids, seen)] @ pose[:3, :3].T + pose[:3, 3]
    height, width = camera.size
    with np.errstate(invalid="ignore"):
        good = np.linalg.norm(camera.pixels(local) - points, axis=1) < PIXEL_TOLERANCE
    good &= np.all((points >= 0) & (points <= (width - 1, height - 1)), axis=1)  # undistortion crops
    return PosedImage(image.name, camera, pose, seen[good], points[good], local[good, 2])


def read_depth(path: str | Path | UPath, image: PosedImage) -> np.ndarray:
    """The depth map of an image, float32 [H, W] at the image's own size and in the model's unit; 0 where unknown.

    COLMAP's ``.bin`` has the model's unit. A measured depth map, a PNG of 16 bits, may have any (usually it is a
    millimetre): the median over the points that the image observes tells its ratio to the model's. Smaller and larger
    depth maps take the value of the nearest pixel.

    Raises:
        ValueError: the file is damaged, of another shape, or shows something else than the model.
    """
    where = UPath(path)
    depth = read_array(where) if where.suffix == ".bin" else _read_png(where)
    depth = np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)
    (height, width), (rows, columns) = image.camera.size, depth.shape
    if abs(rows * width - columns * height) > max(width, height, rows, columns):  # a pixel of either
        raise ValueError(f"{where} is {columns}x{rows}, of another shape than its image ({width}x{height})")
    if (rows, columns) != (height, width):
        depth = cv2.resize(depth, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return depth if where.suffix == ".bin" else depth / np.float32(_unit(depth, image, where))


def _unit(depth: np.ndarray, image: PosedImage, where: UPath) -> float:
    """Units of the depth map in one unit of the model."""
    ratios = depth_at(depth, image.points) / image.depths
    ratios = ratios[np.isfinite(ratios)]
    if len(ratios) < _FEWEST:
        raise ValueError(f"{where} has depth at {len(ratios)} points of the model, {_FEWEST} tell its unit; remove it")
    unit = float(np.median(ratios))
    if np.median(np.abs(ratios / unit - 1)) > _SPREAD:
        raise ValueError(f"{where} disagrees with the model's points; is it registered with {image.name}?")
    return unit


def read_array(path: str | Path | UPath) -> np.ndarray:
    """The first channel, float32 [H, W], of an array of COLMAP's stereo: text ``width&height&channels&``, then float32.

    The numbers are little-endian; x runs fastest, then y, then the channel.

    Raises:
        ValueError: the file is not one, or is truncated.
    """
    data = UPath(path).read_bytes()
    try:
        *header, values = data.split(b"&", 3)
        width, height, channels = (int(text) for text in header)
        if min(width, height, channels) < 1:
            raise ValueError(f"its size is {width}x{height}x{channels}")
        return np.frombuffer(values, "<f4").reshape(channels, height, width)[0].copy()
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a depth map of COLMAP's ({error}); write it again") from None


def _read_png(path: UPath) -> np.ndarray:
    data = np.frombuffer(path.read_bytes(), np.uint8)
    depth = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if depth is None or depth.dtype != np.uint16 or depth.ndim != 2:
        raise ValueError(f"{path} is not a PNG of 16 bits and one channel; write depth so, in millimetres")
    return depth
