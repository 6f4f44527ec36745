"""Feature extractors by name, behind one interface: the student, OpenCV's, other authors' networks, stored features.

What features are, :mod:`samfeat.pipelines.features.formats` says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from samfeat.pipelines.features.formats import Features

PEERS = ("aliked", "disk", "xfeat")
METHODS = ("samfeat", "sift", "orb", *PEERS)
FEATURE_FILES = (".h5", ".hdf5")
OPENCV_KEYPOINTS = 10_000


@dataclass(frozen=True)
class Method:
    """A feature extractor: uint8 [H, W, 3] in RGB to features.

    Attributes:
        name: short name, part of file names.
        config: JSON values that identify the method and all that its features depend on.
        extract: the function itself.
        maps: dense maps of uint8 [H, W, 3], by their name in :data:`samfeat.pipelines.pictures.overlays.MAPS`;
            None where a method has none to show.
    """

    name: str
    config: Mapping[str, Any]
    extract: Callable[[np.ndarray], Features]
    maps: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None

    def __call__(self, image: np.ndarray) -> Features:
        """Features of uint8 [H, W, 3]."""
        return self.extract(image)


def load_method(
    name: str,
    *,
    weights: str | Path | None = None,
    max_keypoints: int | None = None,
    device: str = "auto",
    **options: Any,
) -> Method:
    """A method by its name.

    Args:
        name: ``samfeat``, ``sift`` (unit L2 descriptors, not RootSIFT), ``orb`` (bits as +-1/16, so that the dot
            product orders like the Hamming distance), or what :func:`samfeat.pipelines.features.peers.load_peer` knows.
        weights: weights file of ``samfeat`` or of a peer; OpenCV's methods have none.
        max_keypoints: the best so many keypoints are kept. None leaves it to the weights file; 10,000 for the others.
        device: where networks run: ``cpu``, ``cuda``, or ``auto``, which takes a GPU where there is one.
        **options: extraction options of ``samfeat`` that differ from those in the weights file, such as ``multiscale``
            (:class:`samfeat.student.extractor.ExtractionConfig`).

    Raises:
        ValueError: unknown name, weights or options missing, superfluous or damaged, or no keypoint allowed.
        FileNotFoundError: the weights do not exist.
    """
    if name not in METHODS and not name.endswith(FEATURE_FILES):
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}, or a .h5 file of features")
    if max_keypoints is not None and max_keypoints < 1:
        raise ValueError(f"max_keypoints must be at least 1, got {max_keypoints}")
    if name in PEERS or name.endswith(FEATURE_FILES):
        from samfeat.pipelines.features.peers import load_peer

        return load_peer(name, weights, max_keypoints=max_keypoints, device=device)
    if name == "samfeat":
        if weights is None:
            raise ValueError("method samfeat needs trained weights: give the .safetensors file that training wrote")
        if max_keypoints is not None:
            options["max_keypoints"] = max_keypoints
        return _samfeat(Path(weights), device, options)
    if options:
        raise ValueError(f"method {name} has no options, got {', '.join(options)}: leave them out, or choose samfeat")
    if weights is not None:
        raise ValueError(f"method {name} takes no weights, got {weights}: leave them out, or choose samfeat")
    return _opencv(name, max_keypoints or OPENCV_KEYPOINTS)


def choose_device(device: str) -> str:
    """A torch device: the given one, or for ``auto`` a GPU where there is one.

    Raises:
        ValueError: a GPU that is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: no GPU is usable here, choose cpu or auto")
    return device


def shrunk(method: Method, max_size: int) -> Method:
    """The same method on images of at most ``max_size`` pixels on their longer side, with keypoints at full size.

    Larger images are resized by area, as hloc's ``resize_max`` does; points are mapped back by pixel centres.

    Raises:
        ValueError: no pixel allowed.
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


def _samfeat(weights: Path, device: str, options: Mapping[str, Any]) -> Method:
    from samfeat.student.extractor import SAMFeat

    extractor = SAMFeat.from_pretrained(weights, **options).to(choose_device(device))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    config = {"method": "samfeat", "weights_sha256": digest, **asdict(extractor.extraction)}

    def extract(image: np.ndarray) -> Features:
        return {key: values.cpu().numpy() for key, values in extractor.extract(image).items()}

    def maps(image: np.ndarray) -> dict[str, np.ndarray]:
        return {key: values.cpu().numpy() for key, values in extractor.maps(image).items()}

    return Method("samfeat", config, extract, maps)


def _opencv(name: str, max_keypoints: int) -> Method:
    detector: cv2.Feature2D
    if name == "sift":
        detector = cv2.SIFT.create(nfeatures=max_keypoints, enable_precise_upscale=True)
    else:
        detector = cv2.ORB.create(nfeatures=max_keypoints)

    def extract(image: np.ndarray) -> Features:
        found, codes = detector.detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)
        if codes is None:
            codes = np.zeros((0, detector.descriptorSize()), np.uint8)
        descriptors = _unit_length(codes) if name == "sift" else _unit_bits(codes)
        return _from_opencv(found, descriptors, image, max_keypoints)

    return Method(name, {"method": name, "max_keypoints": max_keypoints, "opencv": cv2.__version__}, extract)


def _unit_length(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def _unit_bits(codes: np.ndarray) -> np.ndarray:
    """Bits as +-1 / sqrt(bits): the dot product of two is 1 - 2 / bits times their Hamming distance."""
    bits = np.unpackbits(codes, axis=1).astype(np.float32)
    return (2 * bits - 1) / np.sqrt(np.float32(bits.shape[1]))


def _from_opencv(
    found: Sequence[cv2.KeyPoint], descriptors: np.ndarray, image: np.ndarray, max_keypoints: int
) -> Features:
    scores = np.array([keypoint.response for keypoint in found], np.float32)
    best = np.argsort(-scores, kind="stable")[:max_keypoints]
    points = np.array([keypoint.pt for keypoint in found], np.float32).reshape(-1, 2)
    return {
        "keypoints": points[best],
        "scores": scores[best],
        "descriptors": descriptors[best],
        "image_size": np.array(image.shape[1::-1], np.int64),
    }
