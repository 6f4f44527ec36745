"""Feature files of other programs, behind the interface of a method."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from samfeat.pipelines.features.formats import Features, read_features
from samfeat.pipelines.features.parts import open_hdf5
from samfeat.pipelines.features.protocol import Method

SUFFIXES = (".h5", ".hdf5")


@dataclass(frozen=True, kw_only=True)
class StoredFeatures(Method):
    """Features of another program in hloc's HDF5 layout, by image name.

    They are looked up by name, not computed from an image; ``extract`` raises an error.

    Attributes:
        path: the file.
        max_keypoints: maximum keypoints per image, by score; None keeps all, in the file's order.
    """

    path: Path
    max_keypoints: int | None

    def stored_names(self, names: Iterable[str]) -> dict[str, str]:
        """The name in the file of each of ``names``.

        An image named ``church/a.jpg`` may lack the folder of its scene in the file, as ``extract church/`` names it,
        if no other one of ``names`` could be meant.

        Raises:
            ValueError: features of some are missing or ambiguous.
            OSError: the file is damaged.
        """
        names = list(names)
        plain = {name: name.partition("/")[2] for name in names}
        sharing = Counter(plain.values()) + Counter(names)
        with open_hdf5(self.path) as file:
            found = {name: next((n for n in (name, plain[name]) if _has_keypoints(file, n)), None) for name in names}
        missing = [name for name in names if found[name] is None]
        if missing:
            raise ValueError(
                f"{self.path} has no features of {len(missing)} of {len(names)} images, the first is {missing[0]!r}: "
                "extract them too, and name them so"
            )
        for name in names:
            if found[name] != name and sharing[plain[name]] > 1:
                other = next(other for other in names if other != name and plain[name] in (other, plain[other]))
                raise ValueError(
                    f"{self.path} has features of {plain[name]!r}, which may be {name!r} or {other!r}: name the images "
                    "with the folders of their scenes"
                )
        return {name: stored for name, stored in found.items() if stored is not None}

    def read(self, name: str) -> Features:
        """Features of an image: keypoints and descriptors, plus scores and image_size if the file has them.

        Raises:
            ValueError: no features of that name, or shapes other than [K, 2], [D, K] and scores [K] with the same K.
            OSError: the file is damaged.
        """
        with open_hdf5(self.path) as file:
            if not _has_keypoints(file, name):
                raise ValueError(
                    f"{self.path} has no keypoints and descriptors of {name!r}: extract that image, and name it so"
                )
            try:
                features = read_features(file, name)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from None
        keypoints, descriptors = features["keypoints"], features["descriptors"]
        if (
            keypoints.ndim != 2
            or keypoints.shape[1] != 2
            or descriptors.ndim != 2
            or len(descriptors) != len(keypoints)
        ):
            raise ValueError(
                f"{self.path} holds keypoints {keypoints.shape} and descriptors {descriptors.shape[::-1]} of {name!r}: "
                "hloc's layout is [K, 2] and [D, K]"
            )
        if "scores" in features and features["scores"].shape != keypoints.shape[:1]:
            raise ValueError(
                f"{self.path} holds scores {features['scores'].shape} of the {len(keypoints)} keypoints of {name!r}: "
                "hloc's layout is [K]"
            )
        chosen: Any = slice(None)
        if self.max_keypoints is not None and len(keypoints) > self.max_keypoints:
            if "scores" not in features:
                raise ValueError(f"{self.path} has no scores to choose the best {self.max_keypoints} keypoints by")
            chosen = np.argsort(-features["scores"], kind="stable")[: self.max_keypoints]
        per_keypoint = ("keypoints", "scores", "descriptors")
        return {
            key: np.asarray(values[chosen], np.float32) if key in per_keypoint else values
            for key, values in features.items()
            if key in (*per_keypoint, "image_size")
        }


def _has_keypoints(file: h5py.File, name: str) -> bool:
    if not name or name not in file:
        return False
    entry = file[name]
    return isinstance(entry, h5py.Group) and "keypoints" in entry


def stored_features(path: str | Path, *, max_keypoints: int | None = None) -> StoredFeatures:
    """A method backed by a feature file, named after the file.

    Args:
        path: HDF5 in hloc's layout: one group per image with ``keypoints`` [K, 2], (x, y) with (0, 0) at the centre of
            the top-left pixel, and ``descriptors`` [D, K], which are compared by their dot product.
        max_keypoints: maximum keypoints per image, by score; None keeps all.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is no HDF5 file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no feature file {path}")
    if not h5py.is_hdf5(path):
        raise OSError(f"{path} is not an HDF5 file: give features in hloc's layout")

    def refuse(image: np.ndarray) -> Features:
        raise ValueError(
            f"{path} holds features by the names of images and computes none: evaluate reads it, "
            "extract and match need a method that computes"
        )

    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    config = {"method": path.name, "features_sha256": digest, "max_keypoints": max_keypoints}
    return StoredFeatures(path.stem, config, refuse, path=path, max_keypoints=max_keypoints)
