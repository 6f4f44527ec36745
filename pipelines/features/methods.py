"""The registry of feature extractors: the student, OpenCV's, other authors' networks, and feature files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from samfeat.pipelines.features import opencv, stored
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.protocol import MAX_KEYPOINTS, Method, choose_device

PEERS = ("aliked", "disk", "xfeat")  # of samfeat.pipelines.features.peers, which imports kornia
METHODS = ("samfeat", *opencv.NAMES, *PEERS)


def load_method(
    name: str,
    *,
    weights: str | Path | None = None,
    max_keypoints: int | None = None,
    device: str = "auto",
    **options: Any,
) -> Method:
    """Load a method by name.

    Args:
        name: ``samfeat``; ``sift`` or ``orb`` (:func:`samfeat.pipelines.features.opencv.load_opencv`); ``aliked``,
            ``disk`` or ``xfeat`` (:func:`samfeat.pipelines.features.peers.load_peer`); or the path of an HDF5 file of
            features (:func:`samfeat.pipelines.features.stored.stored_features`).
        weights: for ``samfeat``, a file or a name (None: the shipped student); for a peer, its file; the others have
            none.
        max_keypoints: maximum number of keypoints per image, the best are kept. None leaves it to the weights file,
            keeps all keypoints of a feature file, and means 10,000 for the others.
        device: ``cpu``, ``cuda``, ``mps``, or ``auto`` for a CUDA GPU if there is one.
        **options: extraction options of ``samfeat`` that differ from those in the weights file, such as ``multiscale``
            (:class:`samfeat.student.extractor.ExtractionConfig`).

    Raises:
        ValueError: unknown name, weights or options missing, superfluous or damaged, or no keypoint allowed.
        FileNotFoundError: the weights do not exist.
    """
    from_file = name.endswith(stored.SUFFIXES)
    if name not in METHODS and not from_file:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}, or a .h5 file of features")
    if max_keypoints is not None and max_keypoints < 1:
        raise ValueError(f"max_keypoints must be at least 1, got {max_keypoints}")
    if name == "samfeat":
        from samfeat.student.weights import find_weights

        if max_keypoints is not None:
            options["max_keypoints"] = max_keypoints
        return _samfeat(find_weights(weights or "samfeat"), device, options)
    if options:
        raise ValueError(f"method {name} has no options, got {', '.join(options)}: leave them out, or choose samfeat")
    if name in PEERS:
        from samfeat.pipelines.features.peers import load_peer

        return load_peer(name, weights, max_keypoints=max_keypoints, device=device)
    if weights is not None:
        raise ValueError(f"method {name} takes no weights, got {weights}: leave them out, or choose samfeat")
    if from_file:
        return stored.stored_features(name, max_keypoints=max_keypoints)
    return opencv.load_opencv(name, max_keypoints=max_keypoints or MAX_KEYPOINTS)


def peer_weights(folder: Path) -> dict[str, Path]:
    """The peers' weights in a folder, by the peer's name: files whose names begin with it.

    Raises:
        FileNotFoundError: the folder holds no such file.
    """
    found = {name: path for name in PEERS for path in sorted(folder.glob(f"{name}*"))[:1]}
    if not found:
        raise FileNotFoundError(f"{folder} holds no weights: put files there whose names begin with {', '.join(PEERS)}")
    return found


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
