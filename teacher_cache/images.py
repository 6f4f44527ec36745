"""Where images come from: ordered sources of crops, each a pure function of an index and a seed.

A source hands out :class:`SourceItem` values: one crop, or the two crops of a pair together with their ground-truth
correspondences and, where the data carry them, detector labels. Raw MegaDepth and COLMAP's models live in
``samfeat.pipelines.sources``; here are a plain folder of photographs and the released training set of MTLDesc.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from upath import UPath

from samfeat.teacher_cache.schema import POINTS

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"})
MAX_PIXELS = 80_000_000  # below Pillow's own alarm; 240 MB once decoded
SMALLEST = 0.25  # photographs that must be enlarged by more than 1 / SMALLEST are refused

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SourceItem:
    """One crop, or the two crops of a pair.

    Attributes:
        images: 1 or 2 crops, uint8 [H, W, 3], RGB.
        names: a unique name for every crop, such as ``scene/photo.jpg#12``.
        boxes: (left, top, width, height) of every crop in its source image, in source pixels.
        sha256: hex digest of the file that every crop was cut from.
        points: float32 [2, POINTS, 2], (x, y) in pixels of crop 0 and crop 1, or None without correspondences. Rows
            that are not valid are finite and mean nothing.
        valid: bool [POINTS], or None without correspondences.
        keypoints: detector labels that came with the data, float32 [K, 3], (x, y, score) for every crop, or None.
    """

    images: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    sha256: tuple[str, ...]
    points: np.ndarray | None = None
    valid: np.ndarray | None = None
    keypoints: tuple[np.ndarray, ...] | None = None


class ImageSource(Protocol):
    """An ordered collection of crops of one size. Reading is thread-safe and depends on nothing but the index."""

    @property
    def paired(self) -> bool:
        """Whether items hold two crops with correspondences."""
        ...

    @property
    def crop_size(self) -> tuple[int, int]:
        """(height, width) of every crop."""
        ...

    def __len__(self) -> int:
        """Number of items."""
        ...

    def item(self, k: int) -> SourceItem:
        """Item ``k``; ``ValueError`` in one line where its files cannot be used."""
        ...

    def provenance(self) -> dict[str, Any]:
        """JSON values: kind, parameters, number of items and digest of their names; never where the folder lies."""
        ...


def read_image(
    source: str | Path | UPath | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS, upright: bool = True
) -> np.ndarray:
    """Reads a photograph as uint8 [H, W, 3] in RGB, upright by default.

    Grey, palette and CMYK images become RGB, 16 bits are scaled to 8, transparency is laid over white, the EXIF
    orientation is applied, and of several frames the first is read.

    Args:
        source: a path, or the bytes of a file.
        name: what error messages call the image; by default its path.
        max_pixels: larger images are refused before they are decoded.
        upright: whether the EXIF orientation is applied; COLMAP, for one, does not.

    Raises:
        ValueError: the file is empty, truncated, too large or not an image.
        OSError: the file cannot be opened.
    """
    if not isinstance(source, bytes):
        name, source = name or str(source), _read_bytes(UPath(source))
    name = name or f"an image of {len(source)} bytes"
    if not source:
        raise ValueError(f"{name} is empty (0 bytes); copy the photograph again or remove it")
    try:
        with Image.open(io.BytesIO(source)) as image:
            if image.width * image.height > max_pixels:
                raise _too_large(name, f"{image.width}x{image.height}", max_pixels)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image) if upright else image, name)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that Pillow reads; use JPEG, PNG, WebP, TIFF or BMP") from None
    except Image.DecompressionBombError:
        raise _too_large(name, "huge", max_pixels) from None
    except (OSError, SyntaxError, EOFError, struct.error, IndexError) as error:
        raise ValueError(f"{name} is damaged or truncated ({error}); copy the photograph again or remove it") from None


def _read_bytes(path: UPath) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image; name one of the files in it")
    return path.read_bytes()


def _too_large(name: str, size: str, max_pixels: int) -> ValueError:
    return ValueError(f"{name} is {size}, more than the {max_pixels} pixels allowed; scale it down first")


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey, as "I;16" or widened to 32 bits
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name} holds 32-bit values; convert it to 8 or 16 bits a channel")
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError(f"{name} holds floating-point values; convert it to 8 or 16 bits a channel")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def sha256_of(data: bytes) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(data).hexdigest()


def names_sha256(names: Iterable[str]) -> str:
    """Hex digest of a list of names, in the given order."""
    return sha256_of(json.dumps(list(names)).encode())


def check_crop_size(crop_size: tuple[int, int]) -> tuple[int, int]:
    """``crop_size`` as two integers of at least 16; ``ValueError`` otherwise."""
    height, width = (int(side) for side in crop_size)
    if min(height, width) < 16:
        raise ValueError(f"crop_size is (height, width), both at least 16, got {tuple(crop_size)}")
    return height, width


class FolderSource:
    """One crop of every photograph below a folder.

    A photograph of more than twice the crop's size is first reduced to twice its size (area filter), one that is too
    small is enlarged until the crop fits (up to four times); then a crop is drawn at random, by the seed and the
    photograph's own relative path, so that adding or removing other files changes nothing.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it is not a folder, or holds no photograph. Bad photographs are found by :meth:`item`.
    """

    paired = False

    def __init__(self, root: str | Path | UPath, *, crop_size: tuple[int, int], seed: int = 0) -> None:
        self.root = _existing_folder(root)
        self.crop_size = check_crop_size(crop_size)
        self.seed = seed
        found = (path for path in self.root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        self._names = sorted(path.relative_to(self.root).as_posix() for path in found)
        if not self._names:
            raise ValueError(f"no photograph below {root}; put {', '.join(sorted(IMAGE_SUFFIXES))} files there")

    def __len__(self) -> int:
        return len(self._names)

    def item(self, k: int) -> SourceItem:
        """The crop of photograph ``k``, in the order of relative paths."""
        name = self._names[k]
        path = self.root / name
        data = _read_bytes(path)
        image, scale = _fit(read_image(data, name=str(path)), self.crop_size, path)
        height, width = self.crop_size
        digest = hashlib.sha256(os.fsencode(f"{self.seed}:{name}")).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        top = int(rng.integers(image.shape[0] - height + 1))
        left = int(rng.integers(image.shape[1] - width + 1))
        crop = np.ascontiguousarray(image[top : top + height, left : left + width])
        left, top, width, height = (round(value / scale) for value in (left, top, width, height))
        return SourceItem((crop,), (name,), ((left, top, width, height),), (sha256_of(data),))

    def provenance(self) -> dict[str, Any]:
        """Kind, crop size, seed, number and digest of the relative paths."""
        return {
            "kind": "folder",
            "crop_size": list(self.crop_size),
            "seed": self.seed,
            "number": len(self),
            "names_sha256": names_sha256(self._names),
        }


def _existing_folder(root: str | Path | UPath) -> UPath:
    path = UPath(root)
    if not path.exists():
        raise FileNotFoundError(f"{root} does not exist; give the folder that holds the images")
    if not path.is_dir():
        raise ValueError(f"{root} is not a folder; give the folder that holds the images")
    return path


def _fit(image: np.ndarray, crop_size: tuple[int, int], path: UPath) -> tuple[np.ndarray, float]:
    """``image`` scaled so that the crop fits in it once to twice, and the scale."""
    sides = np.array(image.shape[:2])
    ratio = float((sides / crop_size).min())
    if ratio < SMALLEST:
        raise ValueError(
            f"{path} is {sides[1]}x{sides[0]}, too small for {crop_size[1]}x{crop_size[0]} crops even enlarged "
            f"{1 / SMALLEST:g} times; remove it or choose smaller crops"
        )
    if 1 <= ratio <= 2:
        return image, 1.0
    scale = (2 if ratio > 2 else 1) / ratio
    height, width = np.maximum(np.round(sides * scale).astype(int), crop_size)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, (int(width), int(height)), interpolation=method), scale


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
        self.root = _existing_folder(root)
        self.seed = seed
        for part in ("image", "keypoint", "despoint"):
            _existing_folder(self.root / part)
        self._ids = sorted(path.stem for path in (self.root / "image").glob("*.jpg"))
        if not self._ids:
            raise ValueError(f"no *.jpg in {self.root / 'image'}; give the folder that holds image/0000000.jpg")
        height, width, _ = read_image(self.root / "image" / f"{self._ids[0]}.jpg").shape
        if width % 2:
            raise ValueError(f"{self._ids[0]}.jpg is {width} wide; two crops side by side have an even width")
        self.crop_size = check_crop_size((height, width // 2))

    def __len__(self) -> int:
        return len(self._ids)

    def item(self, k: int) -> SourceItem:
        """Pair ``k``, in the order of file names."""
        name = self._ids[k]
        path = self.root / "image" / f"{name}.jpg"
        data = _read_bytes(path)
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
            return {key: file[key] for key in keys}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, struct.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy it again") from None
