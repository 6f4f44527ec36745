"""Networks of other authors, as kornia implements them.

Their weights are the authors' own files, which are not part of this project:

- ``aliked``: ALIKED (Zhao et al., IEEE TIM 2023), ``aliked-t16.pth``, ``-n16``, ``-n16rot`` or ``-n32``;
- ``disk``: DISK (Tyszkiewicz et al., NeurIPS 2020), ``depth-save.pth`` or ``epipolar-save.pth``;
- ``xfeat``: XFeat (Potje et al., CVPR 2024), ``xfeat.pt``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.protocol import MAX_KEYPOINTS, Method, choose_device
from samfeat.teacher_cache.teachers.aliked import aliked_network
from samfeat.teacher_cache.teachers.checkpoints import read_tensors

SMALLEST_SIDE = 32  # pixels; DISK normalises its coarsest map, whose cells have 16, and one cell has no variance

_FILES = {"aliked": "aliked-n16rot.pth", "disk": "depth-save.pth", "xfeat": "xfeat.pt"}
_Network = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # images [1, 3, H, W] -> keypoints, scores, descriptors


def load_peer(
    name: str, weights: str | Path | None = None, *, max_keypoints: int | None = None, device: str = "auto"
) -> Method:
    """Load another author's network, with kornia's default parameters.

    Keypoints are (x, y) with (0, 0) at the centre of the top-left pixel, as everywhere; XFeat's, which kornia scales
    from a resized image without regard to pixel centres, are shifted by (scale - 1) / 2. Descriptors have unit length.

    Args:
        name: ``aliked``, ``disk`` or ``xfeat``.
        weights: the authors' file, which also determines the variant of ALIKED.
        max_keypoints: maximum number of keypoints, the best are kept; None means ``MAX_KEYPOINTS``.
        device: ``cpu``, ``cuda``, or ``auto``, which uses a GPU if there is one.

    Raises:
        ValueError: unknown name, weights missing or superfluous, or a file that is damaged or holds something else.
        FileNotFoundError: there is no such file.
    """
    if name not in _FILES:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(_FILES)}")
    if weights is None:
        raise ValueError(f"method {name} needs its authors' weights: give the {_FILES[name]} that they released")
    device = choose_device(device)
    weights, limit = Path(weights), max_keypoints or MAX_KEYPOINTS
    tensors = read_tensors(weights)
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
    network = aliked_network(tensors, max_num_keypoints=limit).to(device)

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
