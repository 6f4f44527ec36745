"""Edge detectors by name: the student, OpenCV's Canny, and the teachers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from samfeat.pipelines.features.protocol import choose_device
from samfeat.student.weights import find_weights
from samfeat.teacher_cache.registry import all_members
from samfeat.teacher_cache.teachers import TEACHERS, make_teacher

LEVELS = 100  # thresholds are 1/100 to 99/100
CANNY_SIGMA, CANNY_RATIO, CANNY_RANGE = 2.0, 0.4, 400.0  # pixels; low over high threshold; high threshold of level 100


@dataclass(frozen=True)
class EdgeDetector:
    """A detector of edges: uint8 [H, W, 3] in RGB to strengths, float32 [H, W] in [0, 1].

    Attributes:
        name: short name.
        config: JSON values that identify the detector and everything its maps depend on.
        detect: the function itself.
        thinned: whether its lines are already one pixel wide.
    """

    name: str
    config: Mapping[str, Any]
    detect: Callable[[np.ndarray], np.ndarray]
    thinned: bool = False


def load_detector(name: str, *, weights: str | Path | None = None, device: str = "auto") -> EdgeDetector:
    """Load an edge detector by name.

    Args:
        name: ``samfeat`` (the edge map that the network learned), ``canny`` (OpenCV's; the strength of a pixel is the
            highest threshold at which it belongs to an edge), or a teacher, as for ``samfeat-cli teacher-cache``.
        weights: weights of ``samfeat`` (the student that ships where None), checkpoint of a SAM teacher.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU if there is one.

    Raises:
        ValueError: unknown name, or weights missing, superfluous or damaged.
        FileNotFoundError: the weights do not exist.
    """
    if name == "canny":
        if weights is not None:
            raise ValueError(f"edges of canny take no weights, got {weights}: leave them out, or choose samfeat")
        config = {"method": name, "sigma": CANNY_SIGMA, "ratio": CANNY_RATIO, "range": CANNY_RANGE}
        return EdgeDetector(name, {**config, "opencv": cv2.__version__}, _canny, thinned=True)
    if name == "samfeat":
        return _samfeat(find_weights(weights or "samfeat"), choose_device(device))
    if name not in (known := all_members("teacher", TEACHERS)) and ":" not in name:
        raise ValueError(f"unknown edge detector {name!r}: choose one of samfeat, canny, {', '.join(known)}")
    teacher = make_teacher(name, checkpoint=None if weights is None else Path(weights), device=device)
    config = {"method": name, **teacher.provenance()}
    return EdgeDetector(name, config, lambda image: teacher(image[None])[0].edges.astype(np.float32) / 255)


def _samfeat(weights: Path, device: str) -> EdgeDetector:
    import torch

    from samfeat.student.export import load_weights
    from samfeat.student.extractor import SIZE_MULTIPLE
    from samfeat.student.network import resize

    network = load_weights(weights).network().to(device).eval()

    @torch.no_grad()
    def detect(image: np.ndarray) -> np.ndarray:
        width, height = (max(1, round(side / SIZE_MULTIPLE)) * SIZE_MULTIPLE for side in image.shape[1::-1])
        pixels = torch.from_numpy(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR))
        dense = network(pixels.to(device).permute(2, 0, 1)[None].float() / 255 * 2 - 1)
        return resize(dense.edges, image.shape[:2])[0, 0].cpu().numpy()

    config = {"method": "samfeat", "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    return EdgeDetector("samfeat", config, detect)


def _canny(image: np.ndarray) -> np.ndarray:
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), CANNY_SIGMA)
    strength = np.zeros(grey.shape, np.float32)
    for level in range(1, LEVELS):
        high = level / LEVELS * CANNY_RANGE
        strength[cv2.Canny(grey, CANNY_RATIO * high, high, L2gradient=True) > 0] = level / LEVELS
    return strength
