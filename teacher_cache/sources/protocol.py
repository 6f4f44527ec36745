"""The interface of a source: an ordered collection of crops, each a pure function of an index and a seed.

A source returns :class:`SourceItem` values: one crop, or the two crops of a pair with their ground-truth
correspondences and, if the data include them, detector labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from upath import UPath

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
        passed_over: why previously drawn items could not be used, one line each.
    """

    images: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    sha256: tuple[str, ...]
    points: np.ndarray | None = None
    valid: np.ndarray | None = None
    keypoints: tuple[np.ndarray, ...] | None = None
    passed_over: tuple[str, ...] = ()


class ImageSource(Protocol):
    """An ordered collection of crops of one size. Reading is thread-safe and depends only on the index.

    A source is constructed from a folder and, by name, those of ``seed``, ``crop_size`` and ``pairs_per_scene`` that it
    accepts. Built-in sources also have ``recognises(folder)``, which tells whether a folder has their layout.

    Two members are optional: ``left_out``, one line per kind of file that is not read, and ``file_of(name)``, the file
    from which the crop of that name is cut, so that changed photographs are detected. A source whose items do not
    depend on each other may be a :class:`ListedSource`.
    """

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
        """Item ``k``; a one-line ``ValueError`` if its files cannot be used."""
        ...

    def provenance(self) -> dict[str, Any]:
        """JSON values: kind, parameters, number of items and digest of their names; never the folder's path."""
        ...


@runtime_checkable
class ListedSource(ImageSource, Protocol):
    """A source that can leave out some of its items, so that new photographs can go to a second store.

    Attributes:
        names: names of all crops, in order, one per item.
    """

    names: list[str]

    def without(self, names: Collection[str]) -> ListedSource | None:
        """The source of all crops but those; None if none is left."""
        ...


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


def existing_folder(root: str | Path | UPath) -> UPath:
    """``root``; ``FileNotFoundError`` or ``ValueError`` if it is not a folder."""
    path = UPath(root)
    if not path.exists():
        raise FileNotFoundError(f"{root} does not exist; give the folder that holds the images")
    if not path.is_dir():
        raise ValueError(f"{root} is not a folder; give the folder that holds the images")
    return path
