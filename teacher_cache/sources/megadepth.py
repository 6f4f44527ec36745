"""Raw MegaDepth: pairs of its images, its depth maps, and the scene files of D2-Net's and LoFTR's preprocessing.

Scene files are npz with, for each image of a scene, ``image_paths``, ``depth_paths``, ``intrinsics`` (3 x 3, pixels),
and ``poses`` (4 x 4, world to camera); None if an image has no depth. D2-Net adds ``overlap_matrix`` (the
share of the row image's 3-D points that the column image sees too, -1 where unknown) and ``scale_ratio_matrix``; LoFTR
lists ``pair_infos``, rows of ((i, j), overlap, ...). Most of these are pickled object arrays. A pickle can run any
program, so they are rebuilt by an unpickler that knows numpy's arrays and scalars and refuses everything else.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import IO, Any

import h5py
import numpy as np
from upath import UPath

from samfeat.images import MAX_PIXELS, read_image
from samfeat.teacher_cache.sources.correspondences import Pinhole
from samfeat.teacher_cache.sources.pairs import CoVisible, DepthPair, PairSource, PosedPhotograph
from samfeat.teacher_cache.sources.protocol import names_sha256, sha256_of

_NUMPY_PARTS = frozenset(
    f"numpy.{core}.{name}"
    for core in ("core", "_core")
    for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
) | {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}
_ARCHIVE_FOLDERS = ("", "phoenix/S6/zl548/", "phoenix/S6/zl548/MegaDepth_v1/")
_READ_ERRORS = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ImportError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class MegaDepthSource(PairSource):
    """Pairs of raw MegaDepth, described by D2-Net's or LoFTR's scene files.

    ``root`` holds ``scene_info/*.npz``, the undistorted images (``Undistorted_SfM/<scene>/images/``) and the depth maps
    (``phoenix/S6/zl548/MegaDepth_v1/<scene>/dense0/depths/*.h5``, with or without the first folders).

    The pairs (i, j) with ``min_overlap <= overlap <= max_overlap`` are eligible. Intrinsics are used as they are, as is
    common, without COLMAP's half pixel.

    Args:
        root: the folder described above.
        crop_size: (height, width) of the crops.
        pairs_per_scene: items per scene (D2-Net: 100).
        min_overlap: minimum share of image i visible in image j (D2-Net: 0.5).
        max_overlap: maximum such share (D2-Net: 1).
        max_scale_ratio: maximum ratio of apparent sizes; infinite accepts all (D2-Net's default).
        seed: seed of every draw.
        scenes: names of the scene files to use (without ``.npz``); all of them by default.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a scene file is damaged, or no pair passes the limits. Bad images are found by :meth:`item`.
    """

    def __init__(
        self,
        root: str | Path | UPath,
        *,
        crop_size: tuple[int, int] = (400, 400),
        pairs_per_scene: int = 100,
        min_overlap: float = 0.5,
        max_overlap: float = 1.0,
        max_scale_ratio: float = float("inf"),
        seed: int = 4212,
        scenes: Collection[str] | None = None,
    ) -> None:
        if not 0 <= min_overlap <= max_overlap <= 1 or max_scale_ratio < 1:
            raise ValueError(
                "0 <= min_overlap <= max_overlap <= 1 and max_scale_ratio >= 1 are needed, got "
                f"{min_overlap}, {max_overlap}, {max_scale_ratio}"
            )
        self.root = UPath(root)
        self._limits = (min_overlap, max_overlap, max_scale_ratio)
        self._scenes: dict[str, SceneInfo] = {}
        eligible: dict[str, np.ndarray] = {}
        for path in scene_files(self.root, scenes):
            info = read_scene_info(path)
            pairs = self._within_limits(info)
            if len(pairs):
                self._scenes[info.name], eligible[info.name] = info, pairs
        if not self._scenes:
            raise ValueError(
                f"no pair of {self.root / 'scene_info'} has an overlap in [{min_overlap}, {max_overlap}] and a scale "
                f"ratio up to {max_scale_ratio}; widen the limits"
            )
        super().__init__(eligible, crop_size=crop_size, pairs_per_scene=pairs_per_scene, seed=seed)

    def file_of(self, name: str) -> UPath | None:
        """The file of a crop; None if no scene file names it, or it is missing."""
        path = self._files.get(name.rpartition("#")[0])
        try:
            return None if path is None else find_file(self.root, path)
        except ValueError:
            return None

    @cached_property
    def _files(self) -> dict[str, str]:
        scenes = self._scenes.items()
        return {f"{name}/{Path(path).name}": path for name, info in scenes for path in info.image_paths if path}

    @staticmethod
    def recognises(folder: UPath) -> bool:
        """Whether a folder has the layout of raw MegaDepth."""
        return (folder / "scene_info").is_dir()

    def provenance(self) -> dict[str, Any]:
        """Kind, parameters, number and digest of the drawn pairs."""
        min_overlap, max_overlap, max_scale_ratio = self._limits
        paths = {name: info.image_paths for name, info in self._scenes.items()}
        names = [f"{name} {paths[name][i]} {paths[name][j]}" for name, i, j in self._items]
        return {
            "kind": "megadepth",
            "crop_size": list(self.crop_size),
            "pairs_per_scene": self.pairs_per_scene,
            "overlap": [min_overlap, max_overlap],
            "max_scale_ratio": max_scale_ratio if np.isfinite(max_scale_ratio) else None,
            "seed": self.seed,
            "number": len(self),
            "names_sha256": names_sha256(names),
        }

    def _within_limits(self, info: SceneInfo) -> np.ndarray:
        min_overlap, max_overlap, max_scale_ratio = self._limits
        keep = (info.overlap >= min_overlap) & (info.overlap <= max_overlap)
        if np.isfinite(max_scale_ratio):
            if info.scale_ratio is None:
                raise ValueError(f"scene file {info.name} has no scale_ratio_matrix; leave max_scale_ratio infinite")
            keep &= info.scale_ratio <= max_scale_ratio
        return info.pairs[keep]

    def _co_visible(self, scene: str, first: int, second: int) -> CoVisible:
        return DepthPair((self._view(self._scenes[scene], first), self._view(self._scenes[scene], second)))

    def _view(self, info: SceneInfo, index: int) -> PosedPhotograph:
        image_path, depth_path = info.image_paths[index], info.depth_paths[index]
        K, pose = info.intrinsics[index], info.poses[index]
        if image_path is None or depth_path is None or K is None or pose is None:
            raise ValueError(f"scene {info.name}: image {index} has no depth; make the scene file again")
        data = find_file(self.root, image_path).read_bytes()
        image = read_image(data, name=str(self.root / image_path))
        depth = read_depth(find_file(self.root, depth_path))
        if depth.shape != image.shape[:2]:
            raise ValueError(
                f"{self.root / image_path} is {image.shape[1]}x{image.shape[0]} but its depth {depth_path} is "
                f"{depth.shape[1]}x{depth.shape[0]}; undistort the images with D2-Net's script"
            )
        return PosedPhotograph(Path(image_path).name, image_path, sha256_of(data), image, Pinhole(K), pose, depth)


@dataclass(frozen=True)
class SceneInfo:
    """The images of a scene and the pairs among them.

    Attributes:
        name: stem of the scene file.
        image_paths, depth_paths: relative to the data set's root; None where an image has no depth.
        intrinsics: K of every image, float64 [3, 3], in pixels, or None.
        poses: world to camera of every image, float64 [4, 4], or None.
        pairs: int64 [n, 2], ordered pairs (i, j) of images that both have depth.
        overlap: float64 [n], share of image i that image j sees, in [0, 1].
        scale_ratio: float64 [n], apparent size of what both see, at least 1; None where the file does not say.
    """

    name: str
    image_paths: list[str | None]
    depth_paths: list[str | None]
    intrinsics: list[np.ndarray | None]
    poses: list[np.ndarray | None]
    pairs: np.ndarray
    overlap: np.ndarray
    scale_ratio: np.ndarray | None


def read_scene_info(path: str | Path | UPath) -> SceneInfo:
    """Read one scene file of either kind.

    Raises:
        ValueError: the file is damaged, lacks a member, holds members of wrong shape, or a pickle of anything but
            numpy arrays, numbers, strings and containers of these.
    """
    where = UPath(path)
    try:
        members = _Members(where)
        images, depths = (_texts(members.read(key)) for key in ("image_paths", "depth_paths"))
        intrinsics = _matrices(members.read("intrinsics"), 3)
        poses = _matrices(members.read("poses"), 4)
        lengths = {len(images), len(depths), len(intrinsics), len(poses)}
        if len(lengths) > 1:
            raise ValueError(f"image_paths, depth_paths, intrinsics and poses differ in length ({sorted(lengths)})")
        whole = np.array([all(x is not None for x in row) for row in zip(images, depths, intrinsics, poses)], bool)
        pairs, overlap, ratio = _pair_infos(members) if "pair_infos" in members else _pair_matrices(members, len(whole))
        if pairs.size and (pairs.min() < 0 or pairs.max() >= len(whole)):
            raise ValueError(f"a pair names image {pairs.max()} of {len(whole)}")
    except (*_READ_ERRORS, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a usable scene file ({error}); make it again with D2-Net's scripts") from None
    keep = whole[pairs].all(axis=1) & (pairs[:, 0] != pairs[:, 1])
    ratio = None if ratio is None else ratio[keep]
    return SceneInfo(where.stem, images, depths, intrinsics, poses, pairs[keep], overlap[keep], ratio)


def scene_files(root: UPath, scenes: Collection[str] | None = None) -> list[UPath]:
    """The scene files ``root/scene_info/*.npz``, sorted; those named in ``scenes`` alone if given.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is empty, or lacks a scene.
    """
    folder = root / "scene_info"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; give the MegaDepth folder that holds scene_info/*.npz")
    files = {path.stem: path for path in sorted(folder.glob("*.npz"))}
    if not files:
        raise ValueError(f"{folder} is empty; put D2-Net's or LoFTR's scene files (*.npz) there")
    unknown = sorted(set(scenes or ()) - set(files))
    if unknown:
        raise ValueError(f"{folder} has no {unknown[0]}.npz; it has {', '.join(list(files)[:10])}")
    return [path for name, path in files.items() if scenes is None or name in scenes]


def find_file(root: UPath, relative: str) -> UPath:
    """The file named ``relative`` in a scene file, even if the archive's leading folders were left out.

    Raises:
        ValueError: it is missing.
    """
    for prefix in _ARCHIVE_FOLDERS:
        if relative.startswith(prefix) and (root / relative.removeprefix(prefix)).is_file():
            return root / relative.removeprefix(prefix)
    raise ValueError(f"{root / relative} is missing; the scene file names it, so copy it there or leave the scene out")


def read_depth(path: str | Path | UPath) -> np.ndarray:
    """The depth map [H, W] of an HDF5 file, dataset ``depth``; 0 where unknown.

    Raises:
        ValueError: the file is damaged, has no two-dimensional ``depth``, or holds negative depth.
    """
    try:
        with h5py.File(io.BytesIO(UPath(path).read_bytes()), "r") as file:
            stored = file["depth"]
            if stored.ndim == 2 and stored.size > MAX_PIXELS:  # a damaged header may claim any size
                raise ValueError(f"{stored.shape[1]}x{stored.shape[0]} is more than {MAX_PIXELS} pixels")
            depth = np.asarray(stored[()])
    except _READ_ERRORS as error:
        raise ValueError(f"{path} is not a depth map ({error}); copy it again") from None
    if depth.ndim != 2 or not np.issubdtype(depth.dtype, np.number) or np.any(depth < 0):
        raise ValueError(f"{path}: depth must be a map of numbers of at least 0, got {depth.dtype} {depth.shape}")
    return depth


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays and plain containers; every other name in a pickle is refused, so nothing is run."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if f"{module_name}.{global_name}" not in _NUMPY_PARTS:
            raise pickle.UnpicklingError(f"it wants to load {module_name}.{global_name}, which is refused")
        return super().find_class(module_name, global_name)


class _Members:
    """The members of a scene file: an npz archive, or a bare pickled dict, which numpy reads under the same name."""

    def __init__(self, path: UPath) -> None:
        self._file = io.BytesIO(path.read_bytes())
        self._dict: dict[str, Any] | None = None
        if zipfile.is_zipfile(self._file):
            with zipfile.ZipFile(self._file) as archive:
                self._names = {name.removesuffix(".npy") for name in archive.namelist()}
            return
        self._file.seek(0)
        self._dict = _ArrayUnpickler(self._file).load()
        if not isinstance(self._dict, dict):
            raise ValueError(f"it holds a {type(self._dict).__name__}, expected named arrays")
        self._names = set(self._dict)

    def __contains__(self, key: str) -> bool:
        return key in self._names

    def read(self, key: str) -> Any:
        """An array, or whatever stands for one in a pickled dict."""
        if key not in self._names:
            raise ValueError(f"it lacks {key}; it has {', '.join(sorted(self._names)) or 'nothing'}")
        if self._dict is not None:
            return self._dict[key]
        with zipfile.ZipFile(self._file) as archive, archive.open(f"{key}.npy") as file:
            return _read_npy(file)


def _read_npy(file: IO[bytes]) -> np.ndarray:
    """One npy file; object arrays go through the unpickler above."""
    version = np.lib.format.read_magic(file)
    readers: dict[tuple[int, int], Callable[..., Any]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"npy format {version} is not known")
    shape, fortran_order, dtype = readers[version](file)
    if dtype.hasobject:
        return np.asarray(_ArrayUnpickler(file).load()).reshape(shape)
    count = int(np.prod(shape, dtype=np.int64))
    data = file.read(count * dtype.itemsize)
    return np.frombuffer(data, dtype, count).reshape(shape, order="F" if fortran_order else "C")


def _texts(values: Iterable[Any]) -> list[str | None]:
    """Relative paths with forward slashes; a path that leaves the data set's root is refused."""
    texts = [None if value is None else str(value) for value in values]
    for text in texts:
        if text is not None and (text.startswith("/") or ".." in PureWindowsPath(text).parts):
            raise ValueError(f"{text!r} is not a path inside the data set")
    return texts


def _matrices(values: Iterable[Any], side: int) -> list[np.ndarray | None]:
    return [None if value is None else np.array(value, np.float64).reshape(side, side) for value in values]


def _pair_matrices(members: _Members, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ordered pairs of D2-Net's matrices. A ratio below 1 (first version of its script) is turned round."""
    overlap, ratio = (np.asarray(members.read(key), np.float64) for key in ("overlap_matrix", "scale_ratio_matrix"))
    for values in (overlap, ratio):
        if values.shape != (number, number):
            raise ValueError(f"overlap_matrix and scale_ratio_matrix must be {number}x{number}, one is {values.shape}")
    pairs = np.argwhere(overlap > 0)
    rows, columns = pairs.T
    ratio = ratio[rows, columns]
    return pairs, overlap[rows, columns], np.maximum(ratio, 1 / np.where(ratio > 0, ratio, np.nan))


def _pair_infos(members: _Members) -> tuple[np.ndarray, np.ndarray, None]:
    """LoFTR's list, each pair in both orders."""
    rows = list(members.read("pair_infos"))
    pairs = np.array([np.asarray(row[0], np.int64).reshape(2) for row in rows], np.int64).reshape(-1, 2)
    overlap = np.array([float(row[1]) for row in rows])
    return np.concatenate([pairs, pairs[:, ::-1]]), np.concatenate([overlap, overlap]), None
