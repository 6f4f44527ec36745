"""SAMFeat, the user-facing extractor: an image in, keypoints and descriptors out.

Follows the authors' released evaluation where the ``released`` preset is chosen: sizes rounded to multiples of 16, edge
probability added to the detection logit, threshold, greedy non-maximum suppression, attention-weighted descriptors.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, overload

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from samfeat.student.detection import detect, subpixel_offsets
from samfeat.student.export import load_weights, save_weights
from samfeat.student.exported import ExportedNetwork
from samfeat.student.inference import InferenceNetwork, Maps
from samfeat.student.network import (
    DESCRIPTOR_DIM,
    NetworkConfig,
    SAMFeatNetwork,
    network_preset,
    normalise,
    sample,
)
from samfeat.student.pixels import as_rgb
from samfeat.student.weights import find_weights

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TORCH_NAMES: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SIZE_MULTIPLE = 16
MAX_KEYPOINTS = 10_000_000
PYRAMID_FACTOR, PYRAMID_END = 2**0.25, 0.3


@dataclass(frozen=True)
class ExtractionConfig:
    """How features are extracted from the dense maps. :data:`EXTRACTION_PRESETS` holds the presets.

    Attributes:
        max_keypoints: maximum number of keypoints, best first; ``None`` for all.
        detection_threshold: minimum probability of a keypoint, in [0, 1].
        nms_radius: no two keypoints of a scale are within this many pixels of each other in both x and y.
        border: pixels along each side (of the resized image) without keypoints.
        edge_gain: factor of the edge probability that is added to the detection logit.
        weighted_descriptors: multiply unit descriptors by their attention (``True``) or leave them at unit length.
        subpixel: refine keypoints by a quadratic fit to the logits around them, by at most half a pixel.
        multiscale: extract from a pyramid of scales 1 to 0.3 in steps of 2^(1/4) as well.
        precision: arithmetic of the network's convolutions. ``"fp32"`` gives the exact features; ``"bf16"`` is for CPUs
            with AVX-512 BF16 or AMX and for GPUs, ``"fp16"`` for GPUs; torch's names, such as ``"float16"``, are
            accepted. The weights stay as they are, and detection
            logits and whatever follows them are float32 in any case.

    Raises:
        ValueError: a value out of range.
    """

    max_keypoints: int | None = 4096
    detection_threshold: float = 0.9
    nms_radius: int = 4
    border: int = 4
    edge_gain: float = 0.0
    weighted_descriptors: bool = True
    subpixel: bool = True
    multiscale: bool = False
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        for name in ("weighted_descriptors", "subpixel", "multiscale"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, least, most in (("max_keypoints", 1, MAX_KEYPOINTS), ("nms_radius", 0, 1024), ("border", 0, 1024)):
            value = getattr(self, name)
            if name == "max_keypoints" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
        for name in ("detection_threshold", "edge_gain"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if not 0 <= self.detection_threshold <= 1:
            raise ValueError(f"detection_threshold must lie in [0, 1], got {self.detection_threshold}")
        if isinstance(self.precision, str):
            object.__setattr__(self, "precision", TORCH_NAMES.get(self.precision, self.precision))
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {get_args(Precision)}, got {self.precision!r}")


EXTRACTION_PRESETS: dict[str, ExtractionConfig] = {
    "released": ExtractionConfig(max_keypoints=10_000, edge_gain=1.0, subpixel=False),
    "paper": ExtractionConfig(max_keypoints=10_000, subpixel=False),
    "default": ExtractionConfig(max_keypoints=2048, detection_threshold=0.0, nms_radius=2),
    "slim": ExtractionConfig(max_keypoints=2048, detection_threshold=0.0, nms_radius=2),
}


class _Features(NamedTuple):
    keypoints: Tensor
    scores: Tensor
    descriptors: Tensor


class SAMFeat(nn.Module):
    """Keypoints and descriptors of images.

    The network runs in the folded form of :mod:`samfeat.student.inference`, built from ``network`` on first use and
    rebuilt when the weights change.

    Args:
        preset: ``"default"``, ``"slim"``, ``"paper"`` or ``"released"``: the network and the values of all options.
        weights: a weights file matching the preset. Without one (and without ``network``) the network is untrained,
            with the same initial weights every time.
        network: a network to use instead of the preset's.
        **options: fields of :class:`ExtractionConfig` that override the preset's.

    Attributes:
        network: the dense network, a torch module (:class:`samfeat.student.network.SAMFeatNetwork`; of an ONNX file
            :class:`samfeat.student.exported.ExportedNetwork`).
        extraction: the :class:`ExtractionConfig` in force.
        provenance: the origin recorded in the weights file; empty without one.

    Raises:
        ValueError: an unknown preset or option, a value out of range, or weights of another network.
        FileNotFoundError: there is no such weights file.
    """

    def __init__(
        self,
        preset: str = "default",
        *,
        weights: str | os.PathLike[str] | None = None,
        network: SAMFeatNetwork | ExportedNetwork | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        config = network_preset(preset)
        self.extraction = _with_options(EXTRACTION_PRESETS[preset], options)
        self.provenance: dict[str, Any] = {}
        if weights is not None and network is not None:
            raise ValueError("give either weights or a network, not both")
        if weights is not None:
            loaded = load_weights(find_weights(weights))
            if _function(loaded.config) != _function(config):
                raise ValueError(
                    f"{weights} belongs to another network than preset {preset!r} ({loaded.config}); "
                    "SAMFeat.from_pretrained builds the right one"
                )
            network, self.provenance = loaded.network(), loaded.provenance
        if network is None:
            warnings.warn(
                "SAMFeat without weights is untrained and its features are meaningless: use SAMFeat.from_pretrained()",
                stacklevel=2,
            )
        self.network: Any = network or SAMFeatNetwork(config, generator=torch.Generator().manual_seed(0))
        self._folded: _Folded | None = None
        self._compile_options: dict[str, Any] | None = None
        self.eval()

    @classmethod
    def from_pretrained(cls, weights: str | os.PathLike[str] = "samfeat", **overrides: Any) -> SAMFeat:
        """Load a trained extractor: one shipped with the package, or one from a weights file.

        Args:
            weights: the name of a shipped student, a file written by :meth:`save`, the authors' released ``.pt``
                state dict (preset ``"released"``), or an address, see :func:`samfeat.student.weights.find_weights`.
                Only an address causes a download. Or an ``.onnx`` file of ``samfeat-cli export``, float32 or int8,
                which OpenVINO runs on the CPU: its precision and edge gain are those of the file.
            **overrides: fields of :class:`ExtractionConfig` that override those in the file.

        Raises:
            ValueError: a damaged or foreign file, an unknown option or one that an ONNX file has fixed, or OpenVINO is
                missing.
            FileNotFoundError: there is no such file.
        """
        path = find_weights(weights)
        if path.suffix == ".onnx":
            exported = ExportedNetwork(path)
            model = cls(network=exported, **(exported.extraction | overrides))
            model.provenance = exported.provenance
            for name in ("precision", "edge_gain"):
                if name in overrides and getattr(model.extraction, name) != exported.extraction[name]:
                    raise ValueError(f"{path}: {name} is fixed in an ONNX model; choose it when exporting")
            return model
        loaded = load_weights(path)
        options = dataclasses.asdict(EXTRACTION_PRESETS["released"]) if loaded.extraction is None else loaded.extraction
        model = cls(network=loaded.network(), **(options | overrides))
        model.provenance = loaded.provenance
        return model

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write weights, configuration, options and provenance to one safetensors file.

        Args:
            path: the file.
            dtype: type to round the weights to, such as ``torch.float16`` to halve the file size.

        Raises:
            ValueError: the extractor was loaded from an ONNX file.
        """
        if isinstance(self.network, ExportedNetwork):
            raise ValueError("an ONNX model holds no weights to save: start from the weights file")
        extraction = dataclasses.asdict(self.extraction)
        save_weights(path, self.network, extraction=extraction, provenance=self.provenance, dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        parameter = next(self.network.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def compile(self, **options: Any) -> None:
        """Compile the dense network with ``torch.compile`` on its next run.

        Useful for many images of one size: every new size is recompiled, which takes about ten seconds. If compilation
        fails (on a CPU it needs a C++ compiler), extraction warns and continues without it.

        Args:
            **options: passed to ``torch.compile``. ``mode="reduce-overhead"`` records CUDA graphs,
                ``mode="max-autotune"`` also benchmarks kernels.
        """
        self._compile_options, self._folded = options, None

    @overload
    def extract(self, image: Sequence[Any]) -> list[dict[str, Tensor]]: ...
    @overload
    def extract(self, image: Any) -> Any: ...
    @torch.no_grad()
    def extract(self, image: Any) -> Any:
        """Features of one image, or of every image of a list, best first.

        Args:
            image: the path of a file, or a PIL image (both upright by their EXIF orientation, transparency over white,
                as :func:`samfeat.load_image` reads them); numpy [H, W, 3] (RGB), [H, W, 4] (with alpha, laid over
                white) or [H, W] (grey), uint8 or float in [0, 1]; or a torch tensor [3, H, W], [1, H, W] or
                [1, 3, H, W], uint8 or float in [0, 1]. Or several of them: a list, or a tensor [B, 3, H, W] with B > 1.
                On a GPU images of equal size run as one batch, so give as many as memory allows, not more.

        Returns:
            A dictionary (for several images: a list of them, in their order). On the device of the network, K features
            (0 is a normal result, and the only one below about 16 pixels):

            - ``"keypoints"``: float32 [K, 2], (x, y) in pixels of ``image``; (0, 0) is the centre of the top-left one;
            - ``"scores"``: float32 [K], probability in [0, 1], descending;
            - ``"descriptors"``: float32 [K, 128], multiplied by their attention unless ``weighted_descriptors`` is off;
            - ``"image_size"``: int64 [2], (width, height) of ``image``.

        Raises:
            ValueError: not an image as above, or an image that is empty or has NaN or out-of-range values.
            OSError: the file cannot be opened.
        """
        if isinstance(image, Tensor) and image.ndim == 4 and len(image) > 1:
            image = list(image)
        if not isinstance(image, list | tuple):
            return self._extract_equal([as_rgb(image)])[0]
        images = [as_rgb(one) for one in image]
        groups: dict[Any, list[int]] = {}
        for number, pixels in enumerate(images):
            on_cpu = self.device.type == "cpu"  # where batches only cost memory
            groups.setdefault(number if on_cpu else (pixels.shape, pixels.dtype), []).append(number)
        found: dict[int, dict[str, Tensor]] = {}
        for numbers in groups.values():
            found |= zip(numbers, self._extract_equal([images[number] for number in numbers]), strict=True)
        return [found[number] for number in range(len(images))]

    @torch.no_grad()
    def maps(self, image: Any) -> dict[str, Tensor]:
        """The dense maps behind the features of one image, for inspection.

        Args:
            image: as in :meth:`extract`.

        Returns:
            float32 tensors on the device of the network, of the image resized to [H, W], multiples of 16:

            - ``"heatmap"``: [H, W], probability of a keypoint, its edge gain included;
            - ``"attention"``: [H / 4, W / 4], positive, what descriptors are multiplied by;
            - ``"edges"``: [H / 4, W / 4], probability of an edge.

        Raises:
            ValueError: as in :meth:`extract`, or an image too small for the network.
        """
        pixels = as_rgb(image)
        size = _network_size(pixels.shape[0]), _network_size(pixels.shape[1])
        if 0 in size:
            raise ValueError(f"the image is too small: {pixels.shape[0]} x {pixels.shape[1]}, minimum 16 x 16 pixels")
        pixels = cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
        found = self._fold().run(torch.from_numpy(pixels)[None].to(self.device))
        maps = {"heatmap": found.logits.sigmoid()[0], "attention": found.attention[0, 0], "edges": found.edges[0, 0]}
        return {name: values.float() for name, values in maps.items()}

    def forward(self, image: Any) -> Any:
        """The same as :meth:`extract`."""
        return self.extract(image)

    def _extract_equal(self, images: list[np.ndarray]) -> list[dict[str, Tensor]]:
        """Features of images [H, W, 3] of one size and type."""
        size = images[0].shape[0], images[0].shape[1]
        pyramids = [_pyramid(pixels) if self.extraction.multiscale else [pixels] for pixels in images]
        levels = [self._extract_level(level, size) for level in zip(*pyramids, strict=True)]
        results = []
        for parts in zip(*levels, strict=True):
            keypoints, scores, descriptors = (torch.cat(values) for values in zip(*parts, strict=True))
            best = torch.sort(scores, descending=True, stable=True).indices[: self.extraction.max_keypoints]
            features = {"keypoints": keypoints[best], "scores": scores[best], "descriptors": descriptors[best]}
            results.append(features | {"image_size": torch.tensor((size[1], size[0]), device=keypoints.device)})
        return results

    def _extract_level(self, images: Sequence[np.ndarray], image_size: tuple[int, int]) -> list[_Features]:
        """Features of images [h, w, 3], with keypoints in the coordinates of images of ``image_size``."""
        options, convention = self.extraction, self.network.config.sampling
        device = self.device
        shape = images[0].shape[:2]
        size = _network_size(shape[0]), _network_size(shape[1])
        if 0 in size:
            empty = (torch.zeros(dimensions, device=device) for dimensions in ((0, 2), (0,), (0, DESCRIPTOR_DIM)))
            return [_Features(*empty)] * len(images)

        if size != shape:
            images = [cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR) for pixels in images]
        folded = self._fold()
        maps = folded.run(torch.from_numpy(np.stack(images)).to(device))

        points, scores = [], []
        found = detect(
            maps.logits,
            options.detection_threshold,
            radius=options.nms_radius,
            border=options.border,
            limit=options.max_keypoints,
        )
        for logits, kept in zip(maps.logits, found):
            offsets = subpixel_offsets(logits, kept) if options.subpixel else 0
            points.append(kept.flip(1).float() + offsets)
            scores.append(torch.sigmoid(logits[kept[:, 0], kept[:, 1]]).float())
        descriptors = [
            normalise(values) for values in folded.network.descriptors(maps, points, size, convention=convention)
        ]
        if options.weighted_descriptors:
            weights = [
                sample(attention[None], p[None], size, convention=convention)[0]
                for attention, p in zip(maps.attention, points)
            ]
            descriptors = [values * weight for values, weight in zip(descriptors, weights)]
        rescaled = (_rescale(p.float(), size, image_size, convention) for p in points)
        return [_Features(p, s, d.float()) for p, s, d in zip(rescaled, scores, descriptors, strict=True)]

    def _fold(self) -> _Folded:
        """The folded network of the current weights."""
        parameters = list(self.network.parameters())
        if isinstance(self.network, ExportedNetwork):
            return _Folded(self.network, parameters, None)
        if self._folded is None or not self._folded.holds(parameters):
            dtype = parameters[0].dtype
            if dtype == torch.float32:
                dtype = DTYPES[self.extraction.precision]
            network = InferenceNetwork(self.network, dtype=dtype, edge_gain=self.extraction.edge_gain)
            self._folded = _Folded(network, parameters, self._compile_options)
        return self._folded


class _Folded:
    """A folded network and the weights it was built from."""

    def __init__(
        self,
        network: InferenceNetwork | ExportedNetwork,
        parameters: Sequence[Tensor],
        options: dict[str, Any] | None,
    ) -> None:
        self.network = network
        self.source = [(parameter.detach(), parameter._version) for parameter in parameters]
        self.compiled: Callable[..., Maps] | None = None if options is None else torch.compile(network, **options)

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the same weights, unchanged."""
        return len(parameters) == len(self.source) and all(
            parameter.data_ptr() == kept.data_ptr() and parameter._version == version and parameter.dtype == kept.dtype
            for parameter, (kept, version) in zip(parameters, self.source)
        )

    def run(self, pixels: Tensor) -> Maps:
        """Maps of uint8 or float [B, H, W, 3]; compiled if requested and possible."""
        if self.compiled is not None:
            try:
                return self.compiled(pixels)
            except RuntimeError as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(f"torch.compile failed ({reason}): extraction continues without it", stacklevel=2)
                self.compiled = None
        return self.network(pixels)


def _pyramid(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """``pixels`` at scale 1, then each level resized from the one before."""
    height, width = pixels.shape[:2]
    scale = 1.0
    while scale + 0.001 >= PYRAMID_END and min(pixels.shape[:2]) > 0:
        yield pixels
        scale /= PYRAMID_FACTOR
        size = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def _network_size(length: int) -> int:
    """Nearest multiple of 16; ties go to the even one."""
    return round(length / SIZE_MULTIPLE) * SIZE_MULTIPLE


def _rescale(points: Tensor, size: tuple[int, int], image_size: tuple[int, int], convention: str) -> Tensor:
    """``points`` (x, y) of an image of ``size`` in one of ``image_size``; the released weights ignore pixel centres."""
    target = torch.tensor((image_size[1], image_size[0]), dtype=points.dtype, device=points.device)
    scale = target / torch.tensor((size[1], size[0]), dtype=points.dtype, device=points.device)
    moved = points * scale if convention == "released" else (points + 0.5) * scale - 0.5
    return torch.minimum(moved.clamp(min=0), target - 1)


def _with_options(config: ExtractionConfig, options: dict[str, Any]) -> ExtractionConfig:
    known = [field.name for field in dataclasses.fields(ExtractionConfig)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"there is no option {', '.join(unknown)}; the options are {', '.join(known)}")
    return dataclasses.replace(config, **options)


def _function(config: NetworkConfig) -> NetworkConfig:
    """The part of a network configuration that matters after training."""
    return dataclasses.replace(config, initialisation="released")
