"""The Segment Anything Model as a teacher: embedding, groups and edges of an image from one pass of its image encoder.

The only file that imports segment_anything, and only once a teacher is made; ``sam_encoder``, ``sam_decoder`` and
``sam_masks`` run its weights. Groups are the masks of SAM's own automatic generator with its default settings; edges
follow the zero-shot edge detection of Kirillov et al. 2023, appendix D.2 (``edges.py``). The
paper's section III-B says what the student learns from each.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from samfeat.teacher_cache.schema import TeacherOutput
from samfeat.teacher_cache.teachers.checkpoints import (
    CHECKPOINTS,
    Progress,
    fetch_checkpoint,
    file_sha256,
    official_checkpoint,
)
from samfeat.teacher_cache.teachers.edges import Style, check_finish, edge_map
from samfeat.teacher_cache.teachers.masks import describe, paint, sort_masks

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

    from samfeat.teacher_cache.teachers.sam_masks import Decoder, Found, Frame

Precision = Literal["auto", "float32", "bfloat16"]

IMAGES_AT_ONCE = {"cpu": 1, "cuda": 8}  # encoded and decoded together


@dataclass(frozen=True)
class SamParameters:
    """How SAM is prompted and filtered; part of a store's identity.

    Attributes:
        points_per_side: the mask generator prompts SAM with a grid of this many points squared.
        points_per_batch: prompts whose masks are deduplicated together before all masks are (affects only edges,
            neither groups nor speed).
        pred_iou_thresh: masks become groups only if their predicted IoU is above this.
        stability_score_thresh: masks become groups only if they are at least this stable.
        stability_score_offset: shift of the logit threshold that measures stability.
        box_nms_thresh: of two masks whose boxes overlap by more than this IoU, the better stays (groups and edges).
        edge_points_per_side: grid of the prompts for the edges; their masks are not filtered by quality.
        edge_blur: size of the Gaussian kernel, see :func:`~samfeat.teacher_cache.teachers.edges.edge_map`.
        edge_style: ``soft``, ``thinned`` or ``binary``.
        edge_border: pixels of the frame without edges.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    edge_points_per_side: int = 16
    edge_blur: int = 3
    edge_style: Style = "soft"
    edge_border: int = 1

    def __post_init__(self) -> None:
        for name in ("points_per_side", "points_per_batch", "edge_points_per_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} lies in [0, 1], got {getattr(self, name)}")
        if self.edge_border < 0:
            raise ValueError(f"edge_border is a number of pixels, got {self.edge_border}")
        check_finish(self.edge_blur, self.edge_style)


class SamTeacher:
    """SAM as a :class:`~samfeat.teacher_cache.teachers.protocol.Teacher`.

    Calls from several threads take turns on the device; the CPU work before and after runs in parallel. A GPU processes
    eight images at a time, so pass at least that many.

    Args:
        model: ``vit_h``, ``vit_l`` or ``vit_b``.
        checkpoint: file with the weights of that model.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: of the image encoder, ``float32`` or ``bfloat16``; ``auto`` is bfloat16 on a GPU and float32 on the
            CPU. Prompts and masks are float32 always.
        **parameters: fields of :class:`SamParameters`.

    Raises:
        FileNotFoundError: no such checkpoint; the message says where to get it.
        ValueError: a checkpoint of another model or of no SAM, an official name on other content, a device that is not
            there, a parameter out of range.
    """

    name = "sam"
    _model = "vit_h"
    _source = ""
    _recipe: tuple[Any, ...] | None = None  # arguments of the constructor, if it was used

    def __init__(
        self,
        model: str = "vit_h",
        *,
        checkpoint: str | Path,
        device: str = "auto",
        precision: Precision = "auto",
        **parameters: Any,
    ) -> None:
        settings, target = _parameters(parameters), _device(device)
        sam, digest = self.load(Path(checkpoint), model)
        self._hold(sam, target, model, digest, precision, settings)
        self._recipe = (model, str(Path(checkpoint).resolve()), device, precision, parameters)

    @classmethod
    def build(
        cls,
        *,
        checkpoint: str | Path | None = None,
        downloads: Path | None = None,
        device: str = "auto",
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Self:
        """The teacher with the weights in ``checkpoint``; without, SAM's are downloaded into ``downloads``.

        Raises:
            FileNotFoundError, ValueError: as the constructor; there is neither a checkpoint nor a folder for it.
            OSError: the download failed; calling again resumes it.
        """
        return cls(cls._model, checkpoint=checkpoint or cls._weights(downloads, progress), device=device, **parameters)

    @classmethod
    def _weights(cls, downloads: Path | None, progress: Progress | None) -> Path:
        raise ValueError(f"teacher {cls.name} needs its authors' weights: give --checkpoint {cls._source}")

    @classmethod
    def from_sam(
        cls, sam: Sam, *, model: str, checkpoint_sha256: str, precision: Precision = "auto", **parameters: Any
    ) -> SamTeacher:
        """A teacher around an existing network, on the network's device.

        Args:
            sam: any ``segment_anything.modeling.Sam``.
            model: what the provenance calls it.
            checkpoint_sha256: digest that identifies its weights in the provenance.
            precision: see :class:`SamTeacher`.
            **parameters: fields of :class:`SamParameters`.
        """
        teacher = cls.__new__(cls)
        teacher._hold(sam, sam.device, model, checkpoint_sha256, precision, _parameters(parameters))
        return teacher

    @classmethod
    def rebuild(cls, described: Mapping[str, Any], *, checkpoint: Path | None = None) -> SamTeacher | None:
        """The teacher whose :meth:`provenance` was ``described``; None without its checkpoint."""
        if checkpoint is None:
            return None
        parameters = {entry.name: described[entry.name] for entry in dataclasses.fields(SamParameters)}
        return cls(described["model"], checkpoint=checkpoint, precision=described["precision"], **parameters)

    @staticmethod
    def load(path: Path, model: str) -> tuple[Sam, str]:
        """The network with the weights of a file, on the CPU, and the file's SHA-256; see :func:`load_sam`."""
        return load_sam(path, model=model)

    @staticmethod
    def encoder(sam: Sam, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """The image encoder on the device of ``sam``: float32 [b, 3, s, s] -> maps [b, c, h, w], the embedding last."""
        from samfeat.teacher_cache.teachers.sam_encoder import SamEncoder

        encode = SamEncoder(sam.image_encoder, dtype=dtype)
        return lambda pixels: (encode(pixels),)

    @staticmethod
    def decoder(sam: Sam) -> Decoder:
        """The mask decoder on the device of ``sam``."""
        from samfeat.teacher_cache.teachers.sam_decoder import SamDecoder

        return SamDecoder(sam)

    def _hold(
        self,
        sam: Sam,
        device: torch.device,
        model: str,
        checkpoint_sha256: str,
        precision: Precision,
        parameters: SamParameters,
    ) -> None:
        if precision == "auto":
            precision = "bfloat16" if device.type == "cuda" else "float32"
        self.parameters = parameters
        self._identity = {"model": model, "checkpoint_sha256": checkpoint_sha256, "precision": precision}
        self._lock = threading.Lock()
        self._sam, self._device = sam.eval(), device

    @cached_property
    def _parts(self) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], Decoder]:
        """Encoder and decoder on the device, moved there for the first image."""
        sam = self._sam.to(self._device)
        with torch.inference_mode():
            return self.encoder(sam, getattr(torch, self._identity["precision"])), self.decoder(sam)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a teacher with a checkpoint as the path to load it from, which must exist where it is unpickled."""
        if self._recipe:
            return _load_again, (type(self), self._recipe, self._identity)
        return _unpack, (type(self), self._sam, self._device, *self._identity.values(), self.parameters)

    def provenance(self) -> dict[str, Any]:
        """Name, model, digest of the checkpoint, precision of the encoder, and all of :class:`SamParameters`."""
        return {"name": self.name, **self._identity, **dataclasses.asdict(self.parameters)}

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the embedding of an image of ``image_size`` = (height, width).

        SAM scales the long side to its input size (1024), pads the short side at its end and gives one cell for 16
        pixels. The cells of the padding are cropped: h and w are the scaled sides / 16, rounded half up, at least 1.
        The last cell of a side that 16 does not divide is thus up to half padding, or misses up to half a cell.
        """
        prompts, frame = self._sam.prompt_encoder, self._frame(image_size)
        stride = frame.side // prompts.image_embedding_size[0]
        rows, columns = (max(1, int(side / stride + 0.5)) for side in frame.scaled)
        return prompts.embed_dim, rows, columns

    def __call__(self, images: np.ndarray) -> list[TeacherOutput]:
        """The targets of ``images``, uint8 [B, H, W, 3] in RGB.

        The embedding is the encoder's output as float32 without its padding, see :meth:`embedding_shape`.

        Raises:
            ValueError: images of another dtype or shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
            raise ValueError(f"images are uint8 [B, H, W, 3], got {images.dtype} {images.shape}")
        step = IMAGES_AT_ONCE[self._device.type]
        return [output for k in range(0, len(images), step) for output in self._teach(images[k : k + step])]

    def _frame(self, image_size: tuple[int, int]) -> Frame:
        from segment_anything.utils.transforms import ResizeLongestSide

        from samfeat.teacher_cache.teachers.sam_masks import Frame

        side = self._sam.image_encoder.img_size
        return Frame(image_size, ResizeLongestSide.get_preprocess_shape(*image_size, side), side)

    def _teach(self, images: np.ndarray) -> list[TeacherOutput]:
        """Targets of one batch of images; the CPU work before and after runs outside the lock."""
        frame = self._frame(images.shape[1:3])
        scaled = self._scaled(images)
        with self._lock, torch.inference_mode():
            seen = self._see(scaled, frame)
        return [self._output(*each) for each in zip(*seen)]

    def _scaled(self, images: np.ndarray) -> Tensor:
        """``images``, uint8 [b, H, W, 3], with the encoder's long side: uint8 [b, 3, h, w]."""
        height, width = self._frame(images.shape[1:3]).scaled
        resized = [Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR) for image in images]
        return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)

    def _pixels(self, scaled: Tensor) -> Tensor:
        """The encoder's input, float32 [b, 3, s, s]: ``scaled``, normalised and padded."""
        return self._sam.preprocess(scaled)

    def _see(self, scaled: Tensor, frame: Frame) -> tuple[np.ndarray, list[Found], list[np.ndarray]]:
        """Embeddings, masks and edge maps of ``scaled``, see :meth:`_scaled`, on the CPU."""
        from samfeat.teacher_cache.teachers.sam_masks import Found, find_edge_masks, find_masks

        ask, (encoder, decoder) = self.parameters, self._parts
        maps = encoder(self._pixels(scaled.to(self._device)))
        images = decoder.image_side(*maps)
        found = find_masks(
            decoder,
            images,
            frame,
            points_per_side=ask.points_per_side,
            pred_iou_thresh=ask.pred_iou_thresh,
            stability_score_thresh=ask.stability_score_thresh,
            stability_score_offset=ask.stability_score_offset,
            box_nms_thresh=ask.box_nms_thresh,
        )
        edge_masks = find_edge_masks(
            decoder,
            images,
            frame,
            points_per_side=ask.edge_points_per_side,
            points_per_batch=ask.points_per_batch,
            box_nms_thresh=ask.box_nms_thresh,
        )
        edges = [
            edge_map(
                logits.sigmoid(),
                logits > decoder.mask_threshold,
                blur=ask.edge_blur,
                style=ask.edge_style,
                border=ask.edge_border,
            )
            for logits in edge_masks
        ]
        _, rows, columns = self.embedding_shape(frame.image)
        cropped = maps[-1][:, :, :rows, :columns].cpu().numpy()
        return cropped, [Found(*(field.cpu() for field in each)) for each in found], edges

    def _output(self, embedding: np.ndarray, found: Found, edges: np.ndarray) -> TeacherOutput:
        stack, predicted_iou, stability = (field.numpy() for field in found)
        table = describe(stack, predicted_iou=np.clip(predicted_iou, 0, 1), stability_score=stability)
        masks = sort_masks(stack, table)
        return TeacherOutput(embedding.copy(), masks, paint(masks.stack), edges)


class SamVitH(SamTeacher):
    """SAM's largest model, by its name on the command line; its weights are downloaded where none are given."""

    @classmethod
    def _weights(cls, downloads: Path | None, progress: Progress | None) -> Path:
        if downloads is None:
            raise ValueError(f"sam_{cls._model} needs SAM's weights: give its checkpoint")
        return fetch_checkpoint(cls._model, downloads, progress=progress)

    @classmethod
    def unfetched(cls, downloads: Path) -> str:
        """Address and size of the checkpoint if it is not in ``downloads`` yet; otherwise empty."""
        file = official_checkpoint(cls._model)
        return "" if (downloads / file.name).exists() else f"{file.url} ({file.size / 1e9:.1f} GB)"


class SamVitL(SamVitH):
    """SAM's middle model."""

    _model = "vit_l"


class SamVitB(SamVitH):
    """SAM's smallest model."""

    _model = "vit_b"


def _parameters(given: Mapping[str, Any]) -> SamParameters:
    known = [entry.name for entry in dataclasses.fields(SamParameters)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"SAM has no option {unknown[0]!r}; it has {', '.join(known)}")
    return SamParameters(**given)


def _load_again(kind: type[SamTeacher], recipe: tuple[Any, ...], identity: dict[str, str]) -> SamTeacher:
    """Load a pickled teacher on this process's device."""
    model, checkpoint, device, precision, parameters = recipe
    teacher = kind(model, checkpoint=checkpoint, device=device, precision=precision, **parameters)
    if teacher._identity != identity:
        raise ValueError(f"{checkpoint} makes another teacher here: {teacher._identity} instead of {identity}")
    return teacher


def _unpack(kind: type[SamTeacher], *state: Any) -> SamTeacher:
    teacher = kind.__new__(kind)
    teacher._hold(*state)
    return teacher


def load_sam(path: Path, *, model: str) -> tuple[Sam, str]:
    """Build ``model`` with the weights of a checkpoint, on the CPU.

    Nothing in the file is executed (``weights_only``).

    Returns:
        The network in evaluation mode and the sha256 of the file.

    Raises:
        FileNotFoundError, ValueError: see :class:`SamTeacher`.
    """
    from segment_anything import sam_model_registry

    official = official_checkpoint(model)
    if not path.is_file():
        raise FileNotFoundError(f"no SAM checkpoint at {path}: download {official.url} and pass it with --checkpoint")
    digest = file_sha256(path)
    if any(path.name == known.name and digest != known.sha256 for known in CHECKPOINTS.values()):
        raise ValueError(f"{path} is damaged: its sha256 {digest} is not that of the official file; download it again")
    state = _read_state(path)
    found = _model_of(state)
    if found != model:
        raise ValueError(f"{path} holds {found or 'no SAM of a known size'}, not {model}: pass a checkpoint of {model}")
    sam = sam_model_registry[model]()
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:  # torch lists every key on a line of its own
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{path} does not fit {model}: {reasons[0]}") from error
    return sam, digest


def _read_state(path: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler fails in many ways on bytes that are no pickle
        raise ValueError(f"{path} is not a file of weights alone: pass a SAM state dict saved by torch.save") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dict (names to tensors): pass a SAM state dict saved by torch.save")
    return state


def _model_of(state: Mapping[str, Tensor]) -> str | None:
    """The official model whose patch embedding has the shape of this one."""
    weight = state.get("image_encoder.patch_embed.proj.weight")
    widths = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
    return widths.get(weight.shape[0]) if weight is not None and weight.ndim == 4 else None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {name!r} here ({torch.cuda.device_count()} GPUs): use cpu or auto")
    return device
