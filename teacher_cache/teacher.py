"""The Segment Anything Model as a teacher: embedding, groups and edges of an image from one pass of its image encoder.

The only file that imports segment_anything, and only once a teacher is made. Groups are the masks of SAM's own
automatic generator with its default settings; edges follow the zero-shot edge detection of Kirillov et al. 2023,
appendix D.2 (``samfeat.teacher_cache.edges``). The paper's section III-B says what the student learns from each.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from samfeat.teacher_cache.checkpoints import CHECKPOINTS, file_sha256, official_checkpoint
from samfeat.teacher_cache.edges import Style, check_finish, edge_map
from samfeat.teacher_cache.grouping import describe, paint, sort_masks
from samfeat.teacher_cache.schema import Gifts, Masks

if TYPE_CHECKING:
    from segment_anything import SamPredictor
    from segment_anything.modeling import Sam

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class SamParameters:
    """How SAM is asked; part of a store's identity.

    Attributes:
        points_per_side: the mask generator prompts SAM with a grid of this many points squared.
        points_per_batch: prompts that are decoded together, by the generator and for the edges.
        pred_iou_thresh: masks whose predicted IoU is not above this are no groups.
        stability_score_thresh: masks less stable than this are no groups.
        stability_score_offset: shift of the logit threshold that measures stability.
        box_nms_thresh: of two masks whose boxes overlap by more than this IoU, the better stays (groups and edges).
        edge_points_per_side: grid of the prompts for the edges; their masks are not filtered by quality.
        edge_blur: size of the Gaussian kernel, see :func:`~samfeat.teacher_cache.edges.edge_map`.
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
    """SAM as a :class:`~samfeat.teacher_cache.schema.Teacher`.

    Calls from several threads are served one after the other: the model knows one image at a time.

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

    def __init__(
        self,
        model: str = "vit_h",
        *,
        checkpoint: str | Path,
        device: str = "auto",
        precision: Precision = "auto",
        **parameters: Any,
    ) -> None:
        settings, target = SamParameters(**parameters), _device(device)
        sam, digest = load_sam(Path(checkpoint), model=model)
        self._hold(sam.to(target), model, digest, precision, settings)

    @classmethod
    def from_sam(
        cls, sam: Sam, *, model: str, checkpoint_sha256: str, precision: Precision = "auto", **parameters: Any
    ) -> SamTeacher:
        """A teacher around a network that is already built, on the device where it lies.

        Args:
            sam: any ``segment_anything.modeling.Sam``.
            model: what the provenance calls it.
            checkpoint_sha256: digest that identifies its weights in the provenance.
            precision: see :class:`SamTeacher`.
            **parameters: fields of :class:`SamParameters`.
        """
        teacher = cls.__new__(cls)
        teacher._hold(sam, model, checkpoint_sha256, precision, SamParameters(**parameters))
        return teacher

    def _hold(
        self, sam: Sam, model: str, checkpoint_sha256: str, precision: Precision, parameters: SamParameters
    ) -> None:
        from segment_anything import SamAutomaticMaskGenerator
        from segment_anything.utils.amg import build_point_grid

        self.parameters = parameters
        self._sam = sam.eval()
        self._lock = threading.Lock()
        self._edge_points = build_point_grid(parameters.edge_points_per_side)
        self._generator = SamAutomaticMaskGenerator(
            sam,
            points_per_side=parameters.points_per_side,
            points_per_batch=parameters.points_per_batch,
            pred_iou_thresh=parameters.pred_iou_thresh,
            stability_score_thresh=parameters.stability_score_thresh,
            stability_score_offset=parameters.stability_score_offset,
            box_nms_thresh=parameters.box_nms_thresh,
        )
        if precision == "auto":
            precision = "bfloat16" if sam.device.type == "cuda" else "float32"
        self._generator.predictor = self._predictor = _one_pass_predictor(sam, half=precision == "bfloat16")
        self._identity = {"model": model, "checkpoint_sha256": checkpoint_sha256, "precision": precision}

    def provenance(self) -> dict[str, Any]:
        """Name, model, digest of the checkpoint, precision of the encoder, and all of :class:`SamParameters`."""
        return {"name": self.name, **self._identity, **dataclasses.asdict(self.parameters)}

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the embedding of an image of ``image_size`` = (height, width).

        SAM scales the long side to its input size (1024), pads the short side at its end and gives one cell for 16
        pixels. The cells of the padding are cropped: h and w are the scaled sides / 16, rounded half up, at least 1.
        The last cell of a side that 16 does not divide is thus up to half padding, or misses up to half a cell.
        """
        encoder, prompts = self._sam.image_encoder, self._sam.prompt_encoder
        input_size = self._predictor.transform.get_preprocess_shape(*image_size, encoder.img_size)
        stride = encoder.img_size // prompts.image_embedding_size[0]
        rows, columns = (max(1, int(side / stride + 0.5)) for side in input_size)
        return prompts.embed_dim, rows, columns

    def __call__(self, images: np.ndarray) -> list[Gifts]:
        """Gifts of ``images``, uint8 [B, H, W, 3] in RGB.

        The embedding is the encoder's output as float32 without its padding, see :meth:`embedding_shape`.

        Raises:
            ValueError: images of another dtype or shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
            raise ValueError(f"images are uint8 [B, H, W, 3], got {images.dtype} {images.shape}")
        with self._lock, torch.inference_mode():
            return [self._teach(image) for image in images]

    def _teach(self, image: np.ndarray) -> Gifts:
        masks = self._masks(image)  # encodes the image; the predictor keeps it for the rest
        _, rows, columns = self.embedding_shape(image.shape[:2])
        embedding = self._predictor.get_image_embedding()[0, :, :rows, :columns]
        return Gifts(embedding.cpu().numpy().copy(), masks, paint(masks.stack), self._edges(image.shape[:2]))

    def _masks(self, image: np.ndarray) -> Masks:
        records = self._generator.generate(image)
        if not records:
            return Masks(np.zeros((0, *image.shape[:2]), bool), np.zeros((0, 7), np.float32))
        stack = np.stack([record["segmentation"] for record in records])
        table = describe(
            stack,
            predicted_iou=np.clip([record["predicted_iou"] for record in records], 0, 1),  # SAM's guess overshoots
            stability_score=np.array([record["stability_score"] for record in records]),
        )
        return sort_masks(stack, table)

    def _edges(self, size: tuple[int, int]) -> np.ndarray:
        """The edge map of the image that the predictor knows."""
        batches = [self._without_duplicates(*batch) for batch in self._edge_masks(size)]
        logits, _ = self._without_duplicates(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))
        return edge_map(
            logits.sigmoid(),
            logits > self._sam.mask_threshold,
            blur=self.parameters.edge_blur,
            style=self.parameters.edge_style,
            border=self.parameters.edge_border,
        )

    def _edge_masks(self, size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [K, H, W] and predicted IoU [K] of every batch of prompts, three masks a prompt."""
        points = self._predictor.transform.apply_coords(self._edge_points * np.array(size)[::-1], size)
        for batch in torch.as_tensor(points, device=self._sam.device).split(self.parameters.points_per_batch):
            labels = torch.ones((len(batch), 1), dtype=torch.int, device=batch.device)
            logits, predicted_iou, _ = self._predictor.predict_torch(batch[:, None], labels, return_logits=True)
            yield logits.flatten(0, 1), predicted_iou.flatten(0, 1)

    def _without_duplicates(self, logits: Tensor, predicted_iou: Tensor) -> tuple[Tensor, Tensor]:
        """Those that survive non-maximum suppression of their boxes, best first."""
        from segment_anything.utils.amg import batched_mask_to_box
        from torchvision.ops import nms

        boxes = batched_mask_to_box(logits > self._sam.mask_threshold).float()
        kept = nms(boxes, predicted_iou, self.parameters.box_nms_thresh)
        return logits[kept], predicted_iou[kept]


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


def _one_pass_predictor(sam: Sam, *, half: bool) -> SamPredictor:
    """A predictor that still knows its image after the mask generator is done with it, so that one pass serves all."""
    from segment_anything import SamPredictor

    class OnePassPredictor(SamPredictor):
        is_image_set = False
        features: Tensor

        def reset_image(self) -> None:
            """Keep the image until the next one is set; the generator would forget it here."""

        def set_torch_image(self, transformed_image: Tensor, original_image_size: tuple[int, ...]) -> None:
            """Encode in bfloat16 where wanted; the rest, positional codes above all, needs float32."""
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
                super().set_torch_image(transformed_image, original_image_size)
            self.features = self.features.float()

    return OnePassPredictor(sam)
