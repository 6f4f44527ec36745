"""The interface of a feature extractor, and code shared by all methods.

Features are described in :mod:`samfeat.pipelines.features.formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from samfeat.pipelines.features.formats import Features

MAX_KEYPOINTS = 10_000  # of every method but samfeat, where the caller sets no limit


@dataclass(frozen=True)
class Method:
    """A feature extractor, from uint8 [H, W, 3] in RGB to features.

    Attributes:
        name: short name, part of file names.
        config: JSON values that identify the method and everything its features depend on.
        extract: the function itself.
        maps: dense maps of uint8 [H, W, 3], by their name in :data:`samfeat.pipelines.pictures.overlays.MAPS`;
            None if the method has none.
    """

    name: str
    config: Mapping[str, Any]
    extract: Callable[[np.ndarray], Features]
    maps: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None

    def __call__(self, image: np.ndarray) -> Features:
        """Features of uint8 [H, W, 3]."""
        return self.extract(image)


def choose_device(device: str) -> str:
    """A torch device: the given one, or for ``auto`` a GPU if there is one.

    Raises:
        ValueError: a GPU that is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps': no Apple GPU is usable here, choose cpu or auto")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: no GPU is usable here, choose cpu or auto")
    return device


def shrunk(method: Method, max_size: int) -> Method:
    """The same method on images shrunk to ``max_size`` pixels on the longer side, with keypoints at full size.

    Larger images are resized by area, as hloc's ``resize_max`` does; points are mapped back by pixel centres.

    Raises:
        ValueError: ``max_size`` below 1.
    """
    if max_size < 1:
        raise ValueError(f"max_size must be at least 1, got {max_size}")

    def extract(image: np.ndarray) -> Features:
        full = np.array(image.shape[1::-1], np.int64)
        factor = max_size / full.max()
        if factor >= 1:
            return method(image)
        size = np.maximum(1, np.round(full * factor)).astype(int)
        features = method(cv2.resize(image, size.tolist(), interpolation=cv2.INTER_AREA))
        scale = (full / size).astype(np.float32)
        keypoints = ((features["keypoints"] + 0.5) * scale - 0.5).astype(np.float32)
        uncertainty = np.array(scale.mean() * features.get("uncertainty", 1), np.float32)
        return features | {"keypoints": keypoints, "image_size": full, "uncertainty": uncertainty}

    return Method(method.name, {**method.config, "max_size": max_size}, extract)
