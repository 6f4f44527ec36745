"""The extractor as an ONNX model: pixels in, keypoints and descriptors out, without torch or this package.

**Input** ``image``: float32 [B, 3, H, W], RGB in [0, 1], any number of images, any H and W from 16.

**Outputs**, the first four as :meth:`samfeat.student.extractor.SAMFeat.extract` returns them, but always K rows for an
image: the K best keypoints, then padding where there are fewer:

- ``keypoints``: float32 [B, K, 2], (x, y) in pixels of the input, (0, 0) being the centre of the top-left one;
  padding: 0;
- ``scores``: float32 [B, K], probability, descending; padding: 0;
- ``descriptors``: float32 [B, K, 128]; padding: 0;
- ``valid``: bool [B, K], false in the padding;
- ``heatmap``: float32 [B, 1, H', W'], detection logits, with the edges' share where the extraction adds one, where H'
  and W' are H and W rounded to multiples of 16, the size that the network sees;
- ``descriptor_map`` [B, 128, H'/4, W'/4], ``attention_map`` and ``edge_map`` [B, 1, H'/4, W'/4]: float32, as
  :class:`samfeat.student.network.DenseOutput` describes them.

A quantised model computes the convolutions of the backbone and of the descriptors in 8 bits, between pairs of
QuantizeLinear and DequantizeLinear: weights by output channel, activations by their range on calibration photographs.
What keypoints hang on stays in floating point: the first convolution and all one-channel heads.

The metadata of the model holds an entry ``samfeat-weights`` like that of a weights file (see
:mod:`samfeat.student.export`), plus the number of keypoints and the ``precision``, fp32 or int8.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional as F

from samfeat.files import write_bytes
from samfeat.student.detection import subpixel_offsets
from samfeat.student.export import FORMAT, metadata_json
from samfeat.student.extractor import SIZE_MULTIPLE, SAMFeat
from samfeat.student.network import SAMFeatNetwork, normalise, resize, sample

if TYPE_CHECKING:
    import onnx

MIN_SIDE, MAX_SIDE = SIZE_MULTIPLE, 1 << 14
MAX_BATCH = 1 << 10  # that the trace assumes; the model itself takes more
TOLERANCE = 1e-4  # of the maps, the scores and the descriptors
FLOAT_CONVOLUTIONS = ("conv1a", "heatmap", "conv_edg", "scalemap")  # beginnings of names, in a quantised model too
OUTPUTS = ("keypoints", "scores", "descriptors", "valid", "heatmap", "descriptor_map", "attention_map", "edge_map")


class Agreement(NamedTuple):
    """Differences between an ONNX model and the extractor on one image.

    Attributes:
        maps: largest difference of a map's values, in units of the largest value of that map, or of 1.
        keypoints: number of keypoints of the extractor (at most K).
        found: how many of them the model has within a tenth of a pixel.
        features: largest difference of the scores and descriptors of these.
    """

    maps: float
    keypoints: int
    found: int
    features: float


def export_onnx(
    path: str | os.PathLike[str],
    extractor: SAMFeat,
    *,
    keypoints: int | None = None,
    calibration: Sequence[np.ndarray] | None = None,
) -> None:
    """Write the extractor as an ONNX model (opset 20), atomically.

    Non-maximum suppression is exactly the extractor's, as a loop in the model. Equal contents give equal bytes.

    Args:
        path: the ``.onnx`` file; an existing one is replaced.
        extractor: network, options and provenance.
        keypoints: K; by default the extractor's ``max_keypoints``.
        calibration: photographs, uint8 [H, W, 3] RGB, from whose activations the 8-bit ranges are taken; a few dozen
            like those that the model will see are enough. Without them the model is float32.

    Raises:
        ValueError: a package is missing, no K is known or it is not positive, the extractor works on several scales or
            is itself an exported model, or there are no photographs in ``calibration``.
        OSError: the file cannot be written.
    """
    check_packages()
    if keypoints is None:
        keypoints = extractor.extraction.max_keypoints
    if keypoints is None or keypoints < 1:
        raise ValueError(f"an ONNX model returns a fixed number of keypoints: give one from 1, got {keypoints}")
    if extractor.extraction.multiscale:
        raise ValueError("an ONNX model works at one scale: choose multiscale=False, and run it on resized images")
    if not isinstance(extractor.network, SAMFeatNetwork):
        raise ValueError("an exported model cannot be exported again: start from the weights file")
    if calibration is not None and not len(calibration):
        raise ValueError("int8 needs photographs to calibrate with, got none")
    model = _FixedExtractor(extractor, keypoints)
    dynamic = {
        0: torch.export.Dim("batch", min=1, max=MAX_BATCH),
        2: torch.export.Dim("height", min=MIN_SIDE, max=MAX_SIDE),
        3: torch.export.Dim("width", min=MIN_SIDE, max=MAX_SIDE),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, 96, 128),),
            dynamo=True,
            dynamic_shapes={"image": dynamic},
            input_names=["image"],
            output_names=list(OUTPUTS),
            verbose=False,
        )
    assert program is not None  # it is None only where torch.onnx.export writes the file itself
    proto = program.model_proto
    _strip(proto)
    if calibration is not None:
        proto = _quantised(proto, calibration)
    precision = "fp32" if calibration is None else "int8"
    values = {"keypoints": keypoints, "precision": precision, "network": dataclasses.asdict(extractor.network.config)}
    extraction = dataclasses.asdict(extractor.extraction) | {"max_keypoints": keypoints}
    entry = proto.metadata_props.add()
    entry.key = FORMAT
    entry.value = metadata_json(**values, extraction=extraction, provenance=extractor.provenance)
    proto.producer_name, proto.doc_string = "samfeat", "SAMFeat: " + ", ".join(OUTPUTS)
    write_bytes(path, proto.SerializeToString(deterministic=True))


def check_packages() -> None:
    """Raise if the packages of the optional extra ``onnx`` are missing.

    Raises:
        ValueError: names the missing packages.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}, not installed here: pip install 'samfeat[onnx]'")


def compare(path: str | os.PathLike[str], extractor: SAMFeat, image: Float[Tensor, "3 h w"]) -> Agreement:
    """Compare an ONNX model, run by onnxruntime on a CPU, with its extractor on one image in [0, 1].

    Raises:
        ValueError: the file is not such a model, or a package is missing.
    """
    check_packages()
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        found = dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"image": image[None].numpy()})))
        found |= {key: found[key][0] for key in OUTPUTS[:4]}
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise ValueError(f"{os.fspath(path)} is not an ONNX model of SAMFeat ({str(error).splitlines()[0]})") from None
    wanted = {key: values.cpu().numpy() for key, values in extractor.extract(image).items()}
    count = min(len(wanted["scores"]), len(found["scores"]))
    distance = np.abs(wanted["keypoints"][:count, None] - found["keypoints"][None, found["valid"]]).max(axis=2)
    nearest = distance.argmin(axis=1) if distance.size else np.zeros(0, int)
    same = np.flatnonzero(distance[np.arange(count), nearest] < 0.1) if distance.size else np.zeros(0, int)
    differences = [
        np.abs(wanted[key][same] - found[key][found["valid"]][nearest[same]]).max(initial=0)
        for key in ("scores", "descriptors")
    ]
    dense = _FixedExtractor(extractor, 1).dense(image[None])
    maps = [
        np.abs(values.numpy() - found[key]).max() / max(1, values.abs().max())
        for key, values in zip(OUTPUTS[4:], dense)
    ]
    return Agreement(float(max(maps)), count, len(same), float(max(differences)))


class _FixedExtractor(nn.Module):
    """:meth:`SAMFeat.extract` of one scale in operations that ONNX has: a fixed number of keypoints, a loop for NMS."""

    def __init__(self, extractor: SAMFeat, keypoints: int) -> None:
        super().__init__()
        self.network = copy.deepcopy(extractor.network).float().cpu().eval()
        for level in (1, 2, 3, 4):  # runtimes have kernels for one output channel, where torch has none
            head = self.network.get_submodule(f"heatmap{level}")
            plain = nn.Conv2d(head.get_parameter("weight").shape[1], 1, 3, padding=1)
            plain.load_state_dict(head.state_dict())
            setattr(self.network, f"heatmap{level}", plain.eval())
        self.options, self.keypoints = extractor.extraction, keypoints

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, ...]:
        maps = self.dense(image)
        logits, descriptor_map, attention_map, _ = maps
        height, width = logits.shape[-2:]
        size, convention = (height, width), self.network.config.sampling
        logits = logits[:, 0]
        rank = _suppressed(logits, torch.sigmoid(logits) >= self.options.detection_threshold, self.options.nms_radius)
        y, x = torch.arange(height)[:, None], torch.arange(width)
        border = self.options.border
        inside = (y >= border) & (y < height - border) & (x >= border) & (x < width - border)
        rank, index = torch.topk(F.pad(torch.where(inside, rank, 0).flatten(1), (0, self.keypoints)), self.keypoints)
        valid = rank > 0
        index = torch.where(valid, index, 0)
        y = index // width
        points_yx = torch.stack((y, index - y * width), dim=2)
        points = points_yx.flip(2).float()
        if self.options.subpixel:
            points = points + _offsets(logits, points_yx)
        scores = torch.sigmoid(logits.flatten(1).gather(1, index))
        descriptors = normalise(sample(descriptor_map, points, size, convention=convention))
        if self.options.weighted_descriptors:
            descriptors = descriptors * sample(attention_map, points, size, convention=convention)
        points = _rescale(points, size, (image.shape[2], image.shape[3]), released=convention == "released")
        padding = ~valid
        return (
            points.masked_fill(padding[..., None], 0),
            scores.masked_fill(padding, 0),
            descriptors.masked_fill(padding[..., None], 0),
            valid,
            *maps,
        )

    @torch.no_grad()
    def dense(self, image: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Heat-map, descriptors, attention and edges of images in [0, 1], at the size that the extractor chooses."""
        size = _network_size(image.shape[2]), _network_size(image.shape[3])
        dense = self.network(F.interpolate(image * 2 - 1, size=size, mode="bilinear", align_corners=False))
        heatmap = dense.heatmap
        if self.options.edge_gain:
            heatmap = heatmap + self.options.edge_gain * resize(dense.edges, size)
        return heatmap, dense.descriptors, dense.attention, dense.edges


def _network_size(length: int) -> int:
    """Nearest multiple of 16, of two equally near the even one, by integer operations (``length`` may be symbolic)."""
    return (length + 7 + length // 16 % 2) // 16 * 16


def _rescale(points: Tensor, size: tuple[int, int], image_size: tuple[int, int], *, released: bool) -> Tensor:
    """As the extractor does, one coordinate at a time: sizes are symbolic."""
    columns = []
    for values, length, image_length in zip(points.unbind(2), reversed(size), reversed(image_size)):
        scale = image_length / length
        moved = values * scale if released else (values + 0.5) * scale - 0.5
        columns.append(moved.clamp(min=0, max=image_length - 1))
    return torch.stack(columns, dim=2)


def _offsets(logits: Float[Tensor, "b h w"], points_yx: Int[Tensor, "b k 2"]) -> Float[Tensor, "b k 2"]:
    """:func:`subpixel_offsets` of every image, as of one tall image: a border of repeated values keeps them apart."""
    count, height, width = logits.shape
    tall = F.pad(logits[:, None], (1, 1, 1, 1), mode="replicate").reshape(count * (height + 2), width + 2)
    top = torch.arange(count)[:, None] * (height + 2)
    places = torch.stack((points_yx[..., 0] + top + 1, points_yx[..., 1] + 1), dim=2)
    return subpixel_offsets(tall, places.flatten(0, 1)).unflatten(0, points_yx.shape[:2])


def _suppressed(
    scores: Float[Tensor, "b h w"], candidates: Bool[Tensor, "b h w"], radius: int
) -> Float[Tensor, "b h w"]:
    """:func:`samfeat.student.detection.greedy_nms` as maps: rank of the pixels it takes (more is better), 0 elsewhere.

    ONNX sorts equal values by their index, which is the order that the extractor asks of a stable sort.
    """
    order = torch.sort(torch.where(candidates, scores, -torch.inf).flatten(1), dim=1, descending=True).indices
    ranks = torch.arange(order.shape[1], 0, -1, dtype=scores.dtype).expand_as(order)
    rank = torch.zeros_like(scores).flatten(1).scatter(1, order, ranks).view_as(scores)
    rank = torch.where(candidates, rank, 0)[:, None]

    def remaining(rank: Tensor, taken: Tensor) -> Tensor:
        return (rank > 0).any()

    def take(rank: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        best = torch.where(rank == _window_max(rank, radius), rank, 0)
        return torch.where(_window_max(best, radius) > 0, 0, rank), taken + best

    return while_loop(remaining, take, (rank, torch.zeros_like(rank)))[1][:, 0]


def _window_max(values: Float[Tensor, "b 1 h w"], radius: int) -> Float[Tensor, "b 1 h w"]:
    """Maximum of the square of 2 ``radius`` + 1 pixels around every pixel, of values that are not negative."""
    rows = F.max_pool2d(values, (1, 2 * radius + 1), stride=1, padding=(0, radius))
    return F.max_pool2d(rows, (2 * radius + 1, 1), stride=1, padding=(radius, 0))


def _quantised(proto: onnx.ModelProto, photographs: Sequence[np.ndarray]) -> onnx.ModelProto:
    """``proto`` with 8-bit convolutions, except for :data:`FLOAT_CONVOLUTIONS`."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(photographs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            pixels = next(self.left, None)
            if pixels is None:
                return None
            return {"image": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32) / 255}

    kept = [
        node.name
        for node in proto.graph.node
        if node.op_type == "Conv" and node.input[1].removeprefix("network.").startswith(FLOAT_CONVOLUTIONS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_static(
            proto,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
        )
        quantised = onnx.load(path)
    del quantised.metadata_props[:]
    return quantised


def _strip(proto: onnx.ModelProto) -> None:
    """Remove the exporter's metadata of every node and value: stack traces with paths on this machine."""

    def clean(graph: Any) -> None:
        for group in (graph.node, graph.value_info, graph.input, graph.output, graph.initializer):
            for item in group:
                del item.metadata_props[:]
                item.doc_string = ""
        del graph.metadata_props[:]
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    clean(attribute.g)

    clean(proto.graph)
    del proto.metadata_props[:]
