"""Features of other authors behind the interface of ``methods.py``: networks, and files made elsewhere.

The networks are kornia's; their weights are the authors' own files, which are not part of this project:

- ``aliked``: ALIKED (Zhao et al., IEEE TIM 2023), ``aliked-t16.pth``, ``-n16``, ``-n16rot`` or ``-n32``;
- ``disk``: DISK (Tyszkiewicz et al., NeurIPS 2020), ``depth-save.pth`` or ``epipolar-save.pth``;
- ``xfeat``: XFeat (Potje et al., CVPR 2024), ``xfeat.pt``.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from samfeat.pipelines.features.formats import Features, read_features
from samfeat.pipelines.features.methods import FEATURE_FILES, PEERS, Method, choose_device

MAX_KEYPOINTS = 10_000  # where the caller sets no limit, as for OpenCV's methods
SMALLEST_SIDE = 32  # pixels; DISK normalises its coarsest map, whose cells have 16, and one cell has no variance

_FILES = {"aliked": "aliked-n16rot.pth", "disk": "depth-save.pth", "xfeat": "xfeat.pt"}
_Network = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # images [1, 3, H, W] -> keypoints, scores, descriptors


def load_peer(
    name: str, weights: str | Path | None = None, *, max_keypoints: int | None = None, device: str = "auto"
) -> Method:
    """A network of other authors with the parameters that kornia publishes it with, or the features of a file.

    Keypoints are (x, y) with (0, 0) at the centre of the top-left pixel, as everywhere; XFeat's, which kornia scales
    from a resized image without regard to pixel centres, are moved by (scale - 1) / 2. Descriptors have unit length.

    Args:
        name: ``aliked``, ``disk``, ``xfeat``, or the path of an HDF5 file, see :func:`stored_features`.
        weights: the authors' file. It says which ALIKED it is.
        max_keypoints: the best so many keypoints are kept. None: ``MAX_KEYPOINTS``, and all of a file.
        device: ``cpu``, ``cuda``, or ``auto``, which takes a GPU where there is one.

    Raises:
        ValueError: unknown name, weights missing or superfluous, or a file that is damaged or holds something else.
        FileNotFoundError: there is no such file.
    """
    if name.endswith(FEATURE_FILES):
        if weights is not None:
            raise ValueError(f"features of a file need no weights, got {weights}: leave them out")
        return stored_features(name, max_keypoints=max_keypoints)
    if name not in PEERS:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(PEERS)}")
    if weights is None:
        raise ValueError(f"method {name} needs its authors' weights: give the {_FILES[name]} that they released")
    device = choose_device(device)
    weights, limit = Path(weights), max_keypoints or MAX_KEYPOINTS
    tensors = _read_tensors(weights)
    try:
        network = {"aliked": _aliked, "disk": _disk, "xfeat": _xfeat}[name](tensors, limit, device)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{weights} does not hold weights of {name}: give the {_FILES[name]} that its authors released"
        ) from None

    @torch.no_grad()
    def extract(image: np.ndarray) -> Features:
        pixels = torch.from_numpy(image.copy()).to(device).permute(2, 0, 1)[None].float() / 255
        keypoints, scores, descriptors = (values.float().cpu().numpy() for values in network(pixels))
        best = np.argsort(-scores, kind="stable")[:limit]
        return {
            "keypoints": keypoints[best],
            "scores": scores[best],
            "descriptors": descriptors[best],
            "image_size": np.array(image.shape[1::-1], np.int64),
        }

    config = {
        "method": name,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "max_keypoints": limit,
        "kornia": version("kornia"),
    }
    return Method(name, config, extract)


def _aliked(tensors: dict[str, Any], limit: int, device: str) -> _Network:
    from kornia.feature import ALIKED

    positions, channels = tensors["desc_head.agg_weights"].shape[:2]
    model = "aliked-t16" if channels == 64 else f"aliked-n{positions}"  # n16rot is an n16, trained on rotated images
    network = ALIKED(model, max_num_keypoints=limit)
    _load(network, {**network.dkd.state_dict(prefix="dkd."), **tensors}, device)  # the grid there is a constant

    def run(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = network(image)[0]
        return found.keypoints, found.keypoint_scores, found.descriptors

    return run


def _disk(tensors: dict[str, Any], limit: int, device: str) -> _Network:
    from kornia.feature import DISK

    network = DISK()
    _load(network, tensors["extractor"], device)

    def run(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = image.shape[2:]
        padding = (0, max(0, SMALLEST_SIDE - width), 0, max(0, SMALLEST_SIDE - height))
        found = network(nn.functional.pad(image, padding), n=limit, pad_if_not_divisible=True)[0]
        inside = (found.keypoints < found.keypoints.new_tensor((width, height))).all(dim=1)
        return found.keypoints[inside], found.detection_scores[inside], found.descriptors[inside]

    return run


def _xfeat(tensors: dict[str, Any], limit: int, device: str) -> _Network:
    from kornia.feature import XFeat

    network = XFeat(top_k=limit)
    _load(network.net, tensors, device)

    def run(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = network.eval().detectAndCompute(image)[0]
        size = image.new_tensor((image.shape[3], image.shape[2]))
        scale = size / torch.clamp(size // 32 * 32, min=32)  # kornia resizes to whole cells and scales back
        keypoints = found["keypoints"] + (scale - 1) / 2
        return torch.minimum(keypoints.clamp(min=0), size - 1), found["scores"], found["descriptors"]

    return run


def _load(network: nn.Module, tensors: dict[str, Any], device: str) -> None:
    network.load_state_dict(tensors)
    network.eval().to(device)


def _read_tensors(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, read as tensors only."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError):
        raise ValueError(f"{path} is not a PyTorch checkpoint of tensors, or is damaged: download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a state dict: give the file that the network's authors released")
    return values


@dataclass(frozen=True, kw_only=True)
class StoredFeatures(Method):
    """Features that another program wrote, in hloc's HDF5 layout, by the names of the images.

    They are looked up by name, not computed from an image; ``extract`` refuses.

    Attributes:
        path: the file.
        max_keypoints: the best so many keypoints are kept, by their scores; None keeps all, in the file's order.
    """

    path: Path
    max_keypoints: int | None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that the file has no features of."""
        with h5py.File(self.path, "r") as file:
            return [name for name in names if name not in file or "keypoints" not in file[name]]

    def read(self, name: str) -> Features:
        """Features of an image: keypoints and descriptors, and scores and image_size where the file has them.

        Raises:
            ValueError: the file has none of that name, or they are not [K, 2] and [D, K] of one K.
        """
        with h5py.File(self.path, "r") as file:
            try:
                features = read_features(file, name)
                keypoints, descriptors = features["keypoints"], features["descriptors"]
            except (KeyError, AttributeError):
                raise ValueError(
                    f"{self.path} has no keypoints and descriptors of {name!r}: extract that image, and name it so"
                ) from None
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


def stored_features(path: str | Path, *, max_keypoints: int | None = None) -> StoredFeatures:
    """The method that a file of features stands for, named after the file.

    Args:
        path: HDF5 in hloc's layout: one group an image with ``keypoints`` [K, 2], (x, y) with (0, 0) at the centre of
            the top-left pixel, and ``descriptors`` [D, K], which are compared by their dot product.
        max_keypoints: the best so many keypoints are kept.

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
