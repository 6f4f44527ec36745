"""Any folder of photographs: one crop of each."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from upath import UPath

from samfeat.images import IMAGE_SUFFIXES, list_images, read_bytes, read_image
from samfeat.teacher_cache.sources.protocol import SourceItem, check_crop_size, existing_folder, names_sha256, sha256_of

SMALLEST = 0.25  # photographs that must be enlarged by more than 1 / SMALLEST are refused


class FolderSource:
    """One crop of every photograph below a folder.

    A photograph of more than twice the crop's size is first reduced to twice its size (area filter), and one that is
    too small is enlarged until the crop fits (up to four times). A crop is then drawn at random from the seed and the
    photograph's relative path, so adding or removing other files does not affect it.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it is not a folder, or has no photographs. Bad photographs are found by :meth:`item`.
    """

    paired = False

    def __init__(self, root: str | Path | UPath, *, crop_size: tuple[int, int], seed: int = 0) -> None:
        self.root = existing_folder(root)
        self.crop_size = check_crop_size(crop_size)
        self.seed = seed
        self.names, self.left_out, unnamed = list_images(self.root)
        self.left_out += [f"left out {each!r}: its name is not UTF-8, rename it" for each in unnamed]
        if not self.names:
            raise ValueError(f"no photograph below {root}; put {', '.join(sorted(IMAGE_SUFFIXES))} files there")

    def without(self, names: Collection[str]) -> FolderSource | None:
        """The source of all photographs but ``names``; None if none is left."""
        rest = copy.copy(self)
        rest.names = [name for name in self.names if name not in names]
        return rest if rest.names else None

    def file_of(self, name: str) -> UPath:
        """The file of a photograph."""
        return self.root / name

    @staticmethod
    def recognises(folder: UPath) -> bool:
        """Always True: any folder will do."""
        return True

    def __len__(self) -> int:
        return len(self.names)

    def item(self, k: int) -> SourceItem:
        """The crop of photograph ``k``, in the order of relative paths."""
        name = self.names[k]
        path = self.root / name
        data = read_bytes(path)
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
            "names_sha256": names_sha256(self.names),
        }


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
