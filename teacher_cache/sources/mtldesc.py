"""The released training set of MTLDesc: pairs of crops with their correspondences and detector labels."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from upath import UPath

from samfeat.images import read_bytes, read_image
from samfeat.teacher_cache.schema import POINTS
from samfeat.teacher_cache.sources.protocol import SourceItem, check_crop_size, existing_folder, names_sha256, sha256_of

_READ_ERRORS = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    TypeError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
    struct.error,
    zlib.error,
)
"""Exceptions raised by numpy and zipfile for damaged files."""


class MtldescSource:
    """The released training set of MTLDesc, read as it is.

    ``image/<id>.jpg`` holds two crops side by side, ``keypoint/<id>.npz`` their detector labels ``points_0`` and
    ``points_1`` in (y, x), and ``despoint/<id>.npz`` the correspondences: ``desp_point1`` and ``desp_point2``
    [n, 1, 2], (x, y) scaled to [-1, 1] by p = (q + 1) (size - 1) / 2, and ``valid_mask`` [n]. The public files do
    not say whether ``raw_desp_point1`` is (x, y) or (y, x); it is compared with ``desp_point1`` and must agree in
    one of the two orders, else the file is refused.

    Raises:
        FileNotFoundError: a folder or a label file is missing.
        ValueError: there is no image, or a file does not fit this description.
    """

    paired = True

    def __init__(self, root: str | Path | UPath, *, seed: int = 0) -> None:
        self.root = existing_folder(root)
        self.seed = seed
        for part in ("image", "keypoint", "despoint"):
            existing_folder(self.root / part)
        self._ids = sorted(path.stem for path in (self.root / "image").glob("*.jpg"))
        if not self._ids:
            raise ValueError(f"no *.jpg in {self.root / 'image'}; give the folder that holds image/0000000.jpg")
        height, width, _ = read_image(self.root / "image" / f"{self._ids[0]}.jpg").shape
        if width % 2:
            raise ValueError(f"{self._ids[0]}.jpg is {width} wide; two crops side by side have an even width")
        self.crop_size = check_crop_size((height, width // 2))

    def file_of(self, name: str) -> UPath:
        """The file of a crop."""
        return self.root / "image" / f"{name.rpartition('#')[0]}.jpg"

    @staticmethod
    def recognises(folder: UPath) -> bool:
        """Whether a folder has the layout of the released set."""
        return all((folder / part).is_dir() for part in ("image", "keypoint", "despoint"))

    def __len__(self) -> int:
        return len(self._ids)

    def item(self, k: int) -> SourceItem:
        """Pair ``k``, in the order of file names."""
        name = self._ids[k]
        path = self.root / "image" / f"{name}.jpg"
        data = read_bytes(path)
        image = read_image(data, name=str(path))
        height, width = self.crop_size
        if image.shape[:2] != (height, 2 * width):
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise ValueError(f"{path} is {size}, but the first is {2 * width}x{height}; leave one kind out")
        points, valid = self._correspondences(self.root / "despoint" / f"{name}.npz")
        return SourceItem(
            images=(image[:, :width].copy(), image[:, width:].copy()),
            names=(f"{name}#0", f"{name}#1"),
            boxes=((0, 0, width, height), (width, 0, width, height)),
            sha256=(sha256_of(data),) * 2,
            points=points,
            valid=valid,
            keypoints=self._keypoints(self.root / "keypoint" / f"{name}.npz"),
        )

    def provenance(self) -> dict[str, Any]:
        """Kind, number and digest of the ids."""
        return {
            "kind": "mtldesc",
            "crop_size": list(self.crop_size),
            "number": len(self),
            "names_sha256": names_sha256(self._ids),
        }

    def _correspondences(self, path: UPath) -> tuple[np.ndarray, np.ndarray]:
        found = _read_npz(path, ("desp_point1", "desp_point2", "valid_mask", "raw_desp_point1"))
        height, width = self.crop_size
        half = (np.array([width, height]) - 1) / 2
        valid = found["valid_mask"].reshape(-1).astype(bool)
        number = len(valid)
        if number > POINTS:
            raise ValueError(f"{path} holds {number} points; a store keeps {POINTS} of a pair")
        try:
            sides = [found[f"desp_point{side}"].reshape(number, 2).astype(np.float64) for side in (1, 2)]
            raw = found["raw_desp_point1"].reshape(number, 2).astype(np.float64)
        except ValueError:
            raise ValueError(f"{path}: its points differ in number from its valid_mask ({number})") from None
        pixels = np.stack([(side + 1) * half for side in sides])
        if not _agree(raw, pixels[0]):
            raise ValueError(f"{path}: raw_desp_point1 is desp_point1 neither in (x, y) nor in (y, x); file damaged?")
        inside = np.all((pixels > -1e-3) & (pixels < 2 * half + 1e-3), axis=(0, 2))  # float32 rounds at the border
        padded, mask = np.zeros((2, POINTS, 2), np.float32), np.zeros(POINTS, bool)
        padded[:, :number] = np.nan_to_num(pixels, posinf=0.0, neginf=0.0)
        mask[:number] = valid & inside
        return padded, mask

    def _keypoints(self, path: UPath) -> tuple[np.ndarray, ...]:
        found = _read_npz(path, ("points_0", "points_1"))
        labels = []
        for key in ("points_0", "points_1"):
            points_yx = found[key]
            if points_yx.ndim != 2 or points_yx.shape[1] != 2:
                raise ValueError(f"{path}: {key} has shape {points_yx.shape}, expected [K, 2] in (y, x)")
            scores = np.ones((len(points_yx), 1), np.float32)
            labels.append(np.hstack([points_yx[:, ::-1].astype(np.float32), scores]))
        return tuple(labels)


def _agree(raw: np.ndarray, points: np.ndarray) -> bool:
    """Whether ``raw`` holds ``points`` in (x, y) or in (y, x), to half a pixel."""
    return any(np.allclose(order, points, rtol=0, atol=0.5) for order in (raw, raw[:, ::-1]))


def _read_npz(path: UPath, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named arrays of an npz file; nothing is unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; every image needs one in {path.parent.name}/")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            if missing := [key for key in keys if key not in file]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            found = {key: file[key] for key in keys}
            if other := [key for key, values in found.items() if values.dtype.kind not in "biuf"]:
                raise ValueError(f"{other[0]} holds {found[other[0]].dtype} instead of numbers")
            return found
    except _READ_ERRORS as error:
        raise ValueError(f"{path} cannot be read ({error}); copy it again") from None
