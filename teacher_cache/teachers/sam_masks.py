"""Point grid -> the automatic masks of an image, as from ``SamAutomaticMaskGenerator``, and the masks for its edges.

Filters run in the generator's order: predicted IoU, stability score, non-maximum suppression of the boxes of all masks
of an image. The first is applied before a mask is upscaled. Until the last is done, masks are kept at the decoder's
output size, so that memory does not grow with the image. From 192 masks to their boxes takes 18 times less time than in
segment_anything, where 25 % pass (``tests/benchmarks/bench_teacher.py``). ``tests/test_sam_masks.py`` compares both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.ops import batched_nms

from samfeat.teacher_cache.teachers.sam_decoder import LowResMasks

PROMPTS_AT_ONCE = {"cpu": 2, "cuda": 256}  # decoded together, over all images; each takes some 20 MiB
PIXELS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 27}  # of masks at the size of the image
BAND = 64  # pixels of the image that are resampled by one product

Fields = TypeVar("Fields", bound=tuple[Tensor, ...])


class Frame(NamedTuple):
    """Sizes in pixels, as (height, width): an image, and the same scaled to SAM's square input of ``side`` pixels."""

    image: tuple[int, int]
    scaled: tuple[int, int]
    side: int


class Decoder(Protocol):
    """A prompt encoder and mask decoder; see :class:`samfeat.teacher_cache.teachers.sam_decoder.SamDecoder`."""

    mask_size: tuple[int, int]
    mask_threshold: float

    def tokens(self, points: Float[Tensor, "p 2"]) -> Float[Tensor, "p t c"]:
        """Tokens of prompts at ``points``, (x, y) in pixels of the scaled images (:class:`Frame`)."""
        ...

    @property
    def image_side(self) -> Callable[..., Any]:
        """Makes of the encoder's maps [i, c, h, w] what all prompts share; its ``features`` are [i, ...]."""
        ...

    def decode(self, images: Any, prompts: Float[Tensor, "p t c"], *, iou_above: float | None = None) -> LowResMasks:
        """Masks of every prompt on every image whose predicted IoU is above ``iou_above``; all if None."""
        ...


class Found(NamedTuple):
    """Surviving masks of one image, best first.

    Attributes:
        masks: bool [K, H, W].
        predicted_iou: float32 [K].
        stability_score: float32 [K], in [0, 1].
    """

    masks: Bool[Tensor, "k h w"]
    predicted_iou: Float[Tensor, " k"]
    stability_score: Float[Tensor, " k"]


class _Candidates(NamedTuple):
    """Masks at the decoder's size with their boxes (left, top, right, bottom) in the image, last pixels included."""

    logits: Float[Tensor, "m h4 w4"]
    predicted_iou: Float[Tensor, " m"]
    image: Int[Tensor, " m"]
    boxes: Int[Tensor, "m 4"]


def find_masks(
    decoder: Decoder,
    images: Any,
    frame: Frame,
    *,
    points_per_side: int,
    pred_iou_thresh: float,
    stability_score_thresh: float,
    stability_score_offset: float,
    box_nms_thresh: float,
) -> list[Found]:
    """Surviving masks of each image; arguments as in ``SamAutomaticMaskGenerator``, without crops of the image.

    A threshold of 0 for the predicted IoU or the stability score lets everything pass.
    """
    resample = Resampling(decoder.mask_size, frame, images.features.device)
    kept: list[_Candidates] = []
    scores: list[Tensor] = []
    for low in _decode(decoder, images, _prompts(decoder, images, points_per_side, frame), pred_iou_thresh or None):
        for part in _parts(low, frame):
            logits = resample(part.logits)
            stability = stability_score(logits, decoder.mask_threshold, stability_score_offset)
            candidates = _Candidates(*part, mask_boxes(logits > decoder.mask_threshold))
            if stability_score_thresh > 0:
                stable = torch.nonzero(stability >= stability_score_thresh)[:, 0]
                candidates, stability = _pick(candidates, stable), stability[stable]
            kept.append(candidates)
            scores.append(stability)
    everything, stability = _join(kept), torch.cat(scores)
    survivors = _without_duplicates(everything, box_nms_thresh)
    found = []
    for index in (survivors[everything.image[survivors] == k] for k in range(len(images.features))):
        masks = torch.cat([resample(part) > decoder.mask_threshold for part in _split(everything.logits[index], frame)])
        found.append(Found(masks, everything.predicted_iou[index], stability[index]))
    return found


def find_edge_masks(
    decoder: Decoder,
    images: Any,
    frame: Frame,
    *,
    points_per_side: int,
    points_per_batch: int,
    box_nms_thresh: float,
) -> Iterator[Float[Tensor, "k h w"]]:
    """Logits of the masks that make the edges of one image after the other, at the size of the image.

    Three masks for every point of the grid, without regard to their quality. Those with the same box go: first within
    each batch of prompts, then among what the batches left.
    """
    resample = Resampling(decoder.mask_size, frame, images.features.device)
    kept = []
    for batch in _prompts(decoder, images, points_per_side, frame).split(points_per_batch):
        candidates = _join(
            [
                _Candidates(*part, mask_boxes(resample(part.logits) > decoder.mask_threshold))
                for low in _decode(decoder, images, batch, None)
                for part in _parts(low, frame)
            ]
        )
        kept.append(_pick(candidates, _without_duplicates(candidates, box_nms_thresh)))
    everything = _join(kept)
    survivors = _without_duplicates(everything, box_nms_thresh)
    for index in (survivors[everything.image[survivors] == k] for k in range(len(images.features))):
        yield torch.cat([resample(part) for part in _split(everything.logits[index], frame)])


class Resampling:
    """Linear map from the decoder's grid to the pixels of an image.

    SAM resizes bilinearly twice: to its padded input and, once the padding is cropped, to the image. Both steps treat
    rows and columns apart and are linear, and so is what they do together: logits -> R logits C^T. A pixel depends on
    few neighbouring cells, so R and C are applied band by band, without the zeros beside each band.

    Args:
        mask_size: (height, width) of the masks, which cover the padded input.
        frame: the image.
        device: of the masks.
    """

    def __init__(self, mask_size: tuple[int, int], frame: Frame, device: torch.device) -> None:
        axes = zip(mask_size, frame.scaled, frame.image)
        self._rows, self._columns = (
            _bands(cells, frame.side, scaled, length, device) for cells, scaled, length in axes
        )

    def __call__(self, logits: Float[Tensor, "m h4 w4"]) -> Float[Tensor, "m h w"]:
        """Logits at the size of the image."""
        wide = torch.cat([logits[:, :, first:last] @ band.T for first, last, band in self._columns], dim=2)
        bands = (band.expand(len(wide), -1, -1) @ wide[:, first:last] for first, last, band in self._rows)
        return torch.cat(list(bands), dim=1)


def _bands(cells: int, side: int, scaled: int, length: int, device: torch.device) -> list[tuple[int, int, Tensor]]:
    """Weights of the cells of one axis in each of ``length`` pixels, as bands (first cell, end, [pixels, end - first]).

    They are what two calls of ``interpolate`` make of a single 1, so that they carry its very rounding.
    """
    padded = F.interpolate(torch.eye(cells)[None], side, mode="linear")[..., :scaled]
    bands = []
    for band in F.interpolate(padded, length, mode="linear")[0].T.split(BAND):
        used = torch.nonzero(band.any(dim=0))[:, 0].tolist()
        first, last = used[0], used[-1] + 1
        bands.append((first, last, band[:, first:last].contiguous().to(device)))
    return bands


def stability_score(logits: Float[Tensor, "m h w"], threshold: float, offset: float) -> Float[Tensor, " m"]:
    """IoU of the masks above ``threshold + offset`` and above ``threshold - offset``; NaN where both are empty."""
    above = (logits > threshold + shift for shift in (offset, -offset))
    inner, outer = (mask.sum(dim=2, dtype=torch.int16).sum(dim=1, dtype=torch.int32) for mask in above)
    return inner / outer


def mask_boxes(masks: Bool[Tensor, "m h w"]) -> Int[Tensor, "m 4"]:
    """(left, top, right, bottom) of the first and last true pixels; all 0 for an empty mask."""
    values = masks.view(torch.uint8)  # whose maximum is ten times as fast as any() of booleans
    left, right = _first_and_last(values.amax(dim=1) > 0)
    top, bottom = _first_and_last(values.amax(dim=2) > 0)
    return torch.stack([left, top, right, bottom], dim=1)


def _first_and_last(occupied: Bool[Tensor, "m n"]) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    places = torch.arange(occupied.shape[1], device=occupied.device)
    last = (occupied * places).amax(dim=1)
    first = torch.where(occupied, places, occupied.shape[1]).amin(dim=1)
    return torch.minimum(first, last), last  # of an empty row: (0, 0)


def _prompts(decoder: Decoder, images: Any, points_per_side: int, frame: Frame) -> Float[Tensor, "p t c"]:
    """Prompts at the centres of a grid of cells over the image, row by row."""
    device = images.features.device
    y, x = (
        (torch.arange(points_per_side, dtype=torch.float64, device=device) + 0.5) / points_per_side * side
        for side in frame.scaled
    )
    return decoder.tokens(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))


def _decode(
    decoder: Decoder, images: Any, prompts: Float[Tensor, "p t c"], iou_above: float | None
) -> Iterator[LowResMasks]:
    step = max(1, PROMPTS_AT_ONCE[prompts.device.type] // len(images.features))
    for some in prompts.split(step):
        yield decoder.decode(images, some, iou_above=iou_above)


def _parts(low: LowResMasks, frame: Frame) -> Iterator[LowResMasks]:
    """Few enough masks at a time to see them at the size of the image."""
    return (LowResMasks(*part) for part in zip(*(_split(field, frame) for field in low)))


def _split(values: Tensor, frame: Frame) -> Sequence[Tensor]:
    height, width = frame.image
    return values.split(max(1, PIXELS_AT_ONCE[values.device.type] // (height * width)))


def _without_duplicates(candidates: _Candidates, box_nms_thresh: float) -> Int[Tensor, " k"]:
    """Those that survive the suppression of boxes within their image, best first."""
    return batched_nms(candidates.boxes.float(), candidates.predicted_iou, candidates.image, box_nms_thresh)


def _pick(fields: Fields, index: Tensor) -> Fields:
    return type(fields)(*(field[index] for field in fields))


def _join(parts: Sequence[Fields]) -> Fields:
    return type(parts[0])(*(torch.cat(fields) for fields in zip(*parts)))
