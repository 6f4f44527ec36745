"""An exported ONNX model as the network of an extractor, run by OpenVINO on a CPU.

OpenVINO executes the 8-bit convolutions of a quantised model on the CPU's integer units. Where the CPU has bfloat16
units it uses those for the rest of the network. Suppression and everything after it are the extractor's own. The model
is compiled for every new size of images, which takes a fraction of a second.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from samfeat.student.export import FORMAT
from samfeat.student.inference import Maps
from samfeat.student.network import NetworkConfig, Sampling, sample

DENSE_OUTPUTS = ("heatmap", "descriptor_map", "attention_map", "edge_map")
MOST_SHAPES = 8  # compiled at a time: a pyramid has seven


class ExportedNetwork(nn.Module):
    """The dense maps of an ONNX file of :func:`samfeat.student.onnx.export_onnx`. It has no parameters.

    Args:
        path: the ``.onnx`` file, float32 or int8.

    Attributes:
        config: the network that was exported.
        extraction: options of ``SAMFeat`` that it was exported with.
        provenance: where its weights come from.
        precision: ``"fp32"`` or ``"int8"``.

    Raises:
        ValueError: OpenVINO is not installed, or the file is no such model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        if find_spec("openvino") is None:
            raise ValueError("an ONNX model needs openvino, not installed here: pip install 'samfeat[openvino]'")
        import openvino

        self._path, self._requests = os.fspath(path), dict[tuple[int, ...], Any]()
        try:
            model = openvino.Core().read_model(self._path)
            values = json.loads(model.get_rt_info(["framework", FORMAT]).astype(str))
            self.config = NetworkConfig(**values["network"])
            self.extraction: dict[str, Any] = values["extraction"]
            self.provenance: dict[str, Any] = values["provenance"]
            self.precision: str = values.get("precision", "fp32")
            outputs = [model.output(name).get_node().input_value(0) for name in DENSE_OUTPUTS]
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{self._path} is not an ONNX model of SAMFeat ({reason})") from None
        self._model = openvino.Model(outputs, model.get_parameters())  # without suppression, which is slow as a loop

    def forward(self, pixels: UInt8[Tensor, "b h w 3"] | Float[Tensor, "b h w 3"]) -> Maps:
        """Compute the maps of a batch of images, with as many threads as torch has.

        Args:
            pixels: RGB in [0, 255]. Height and width are multiples of 16.
        """
        images = (pixels.permute(0, 3, 1, 2).float() / 255).contiguous()
        found = self._compiled(tuple(images.shape)).infer([images.numpy()])
        logits, descriptors, attention, edges = (torch.from_numpy(found[k].copy()) for k in range(4))
        return Maps(logits[:, 0], descriptors, attention, edges)

    def descriptors(
        self, maps: Maps, points: list[Tensor], image_size: tuple[int, int], *, convention: Sampling
    ) -> list[Tensor]:
        """Descriptors, not normalised, at points of every image: as :meth:`InferenceNetwork.descriptors`."""
        return [
            sample(maps.features[k : k + 1], p[None], image_size, convention=convention)[0]
            for k, p in enumerate(points)
        ]

    def _compiled(self, shape: tuple[int, ...]) -> Any:
        """The model compiled for images of one shape, which makes it a third faster than for any shape."""
        import openvino

        key = (*shape, torch.get_num_threads())
        if key not in self._requests:
            if len(self._requests) == MOST_SHAPES:
                self._requests.pop(next(iter(self._requests)))
            model = self._model.clone()
            model.reshape({0: list(shape)})
            options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
            self._requests[key] = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
        return self._requests[key]
