"""SIFT and ORB as OpenCV computes them."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.protocol import Method

NAMES = ("sift", "orb")


def load_opencv(name: str, *, max_keypoints: int) -> Method:
    """``sift`` (unit L2 descriptors, not RootSIFT) or ``orb`` (bits as +-1/16, so that the dot product orders like the
    Hamming distance), with at most ``max_keypoints`` keypoints, best first.
    """
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
