"""LightGlue (Lindenberger et al., ICCV 2023), a learned matcher, with weights that were trained for these features.

The network is kornia's. Weights are those of glue-factory or of the authors' repository, whose parameters have the same
names. None ship with the package, and nothing is downloaded: train a LightGlue on this student's features, unit
descriptors and keypoints with (0, 0) at the corner of the image, which is how :class:`LightGlue` passes them on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

_LAYER = re.compile(r"transformers\.(\d+)\.")
_PREFIXES = ("module.", "matcher.", "model.")


class LightGlue:
    """Matches the features of two images, like :func:`samfeat.student.matching.match`.

    Args:
        network: kornia's ``LightGlue``.
    """

    def __init__(self, network: Any) -> None:
        self.network = network.eval()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> LightGlue:
        """The matcher with the weights of a file; sizes are those of the weights. Nothing in the file is executed.

        Args:
            path: a checkpoint of glue-factory (``checkpoint_best.tar``), or a state dict as LightGlue's authors
                release it; ``.safetensors``, or what ``torch.load`` reads.
            device: where to compute.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        return cls(_network(_state_dict(Path(path)), str(path)).to(device))

    @property
    def width(self) -> int:
        """Length of the descriptors that it takes."""
        projection = self.network.input_proj
        return int(getattr(projection, "in_features", self.network.conf.descriptor_dim))

    @torch.no_grad()
    def __call__(self, features0: Mapping[str, Any], features1: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pairs of features, at most one for each.

        Args:
            features0: result of ``SAMFeat.extract`` for one image, or the same as arrays: ``keypoints`` [N, 2],
                ``descriptors`` [N, D] of any length but 0, and ``image_size`` (width, height).
            features1: the same for another image.

        Returns:
            ``"matches"``: int64 [K, 2], indices into the first and the second features, ascending by the first;
            ``"scores"``: float32 [K], in (0, 1].

        Raises:
            ValueError: descriptors of another length than the weights take.
        """
        data = {"image0": self._input(features0), "image1": self._input(features1)}
        if 0 in (data["image0"]["keypoints"].shape[1], data["image1"]["keypoints"].shape[1]):
            return {"matches": torch.empty((0, 2), dtype=torch.int64), "scores": torch.empty(0)}
        found = self.network(data)
        return {"matches": found["matches"][0], "scores": found["scores"][0].float()}

    def _input(self, features: Mapping[str, Any]) -> dict[str, Tensor]:
        device = next(self.network.parameters()).device
        keypoints, descriptors, size = (
            torch.as_tensor(features[key], device=device).float() for key in ("keypoints", "descriptors", "image_size")
        )
        if descriptors.shape[1] != self.width:
            width = descriptors.shape[1]
            raise ValueError(f"LightGlue's weights take descriptors of {self.width} numbers, the features have {width}")
        return {
            "keypoints": keypoints[None] + 0.5,
            "descriptors": F.normalize(descriptors, dim=1)[None],
            "image_size": size[None],
        }


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, named as in kornia's network."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the weights of a LightGlue trained on these features")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            values: Any = load_file(path)
        else:
            values = torch.load(path, map_location="cpu", weights_only=True)
        values = values.get("model", values)
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    except Exception as error:  # torch raises many kinds for a foreign file
        raise ValueError(f"{path} holds no LightGlue weights ({type(error).__name__}): give a state dict") from None
    renamed = {}
    for name, value in tensors.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if not name.startswith("extractor."):
            renamed[re.sub(r"^(self_attn|cross_attn)\.(\d+)", r"transformers.\2.\1", name)] = value
    return renamed


def _network(tensors: dict[str, Tensor], source: str) -> Any:
    """kornia's network, as large as the weights say, with these weights."""
    from kornia.feature import LightGlue as Network

    layers = {int(found[1]) for name in tensors if (found := _LAYER.match(name))}
    try:
        width = tensors["log_assignment.0.final_proj.weight"].shape[0]
        inputs = tensors["input_proj.weight"].shape[1] if "input_proj.weight" in tensors else width
        heads = width // (2 * tensors["posenc.Wr.weight"].shape[0])
        sizes = {"input_dim": inputs, "descriptor_dim": width, "n_layers": max(layers) + 1, "num_heads": heads}
        network = Network(features=cast(str, None), **sizes)  # of these sizes, without a download
        missing, unexpected = network.load_state_dict(tensors, strict=False)
    except (KeyError, ValueError, RuntimeError, ZeroDivisionError, IndexError):
        raise ValueError(f"{source} holds no LightGlue weights, or those of features with scale and angle") from None
    missing = [name for name in missing if name != "confidence_thresholds"]
    if missing or unexpected:
        other = (missing or unexpected)[0]
        raise ValueError(f"{source} holds no complete LightGlue: {'missing' if missing else 'unknown'} tensor {other}")
    return network
