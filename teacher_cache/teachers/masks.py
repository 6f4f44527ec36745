"""Overlapping masks -> their order, their table and their label map.

Masks overlap (whole, part, part of a part); a label map needs one mask per pixel. The smallest mask wins: it is the
finest component that covers the pixel, the level used for the paper's grouping (section III-B).
"""

from __future__ import annotations

import numpy as np

from samfeat.teacher_cache.schema import MASK_COLUMNS, MAX_MASKS, Masks


def paint(stack: np.ndarray) -> np.ndarray:
    """One label per pixel: the smallest mask that covers it; of equally large masks the one with the lower index.

    Args:
        stack: bool [K, H, W], K < 65536.

    Returns:
        uint16 [H, W]: k + 1 where ``stack[k]`` wins, 0 where there is no mask.

    Raises:
        ValueError: ``stack`` is not bool [K, H, W], or holds more masks than uint16 has labels.
    """
    _check_stack(stack)
    if len(stack) > np.iinfo(np.uint16).max:
        raise ValueError(f"uint16 has labels for 65535 masks, got {len(stack)}: keep fewer masks")
    areas = np.count_nonzero(stack, axis=(1, 2))
    labels = np.zeros(stack.shape[1:], np.uint16)
    for k in np.lexsort((np.arange(len(stack)), areas))[::-1]:  # the winner is painted last
        labels[stack[k]] = k + 1
    return labels


def sort_masks(stack: np.ndarray, table: np.ndarray) -> Masks:
    """Select and sort the masks to store.

    Empty masks are dropped. Of more than ``MAX_MASKS`` masks, those with the highest predicted IoU are kept (the first
    of equal ones). They are sorted by area, largest first, so that later masks are on top of earlier ones, and equally
    large masks by predicted IoU, highest first, then as given: the better one wins in :func:`paint`.

    Args:
        stack: bool [K, H, W].
        table: float32 [K, 7], columns ``MASK_COLUMNS``; see :func:`describe`.

    Raises:
        ValueError: the shapes do not agree.
    """
    _check_stack(stack)
    if table.shape != (len(stack), len(MASK_COLUMNS)):
        raise ValueError(f"{len(stack)} masks need a table of shape {(len(stack), 7)}, got {table.shape}")
    areas = np.count_nonzero(stack, axis=(1, 2))
    predicted_iou = table[:, MASK_COLUMNS.index("predicted_iou")]
    kept = np.flatnonzero(areas)
    kept = kept[np.argsort(-predicted_iou[kept], kind="stable")][:MAX_MASKS]
    kept = kept[np.lexsort((kept, -predicted_iou[kept], -areas[kept]))]
    return Masks(stack[kept], table[kept].astype(np.float32))


def describe(stack: np.ndarray, *, predicted_iou: np.ndarray, stability_score: np.ndarray) -> np.ndarray:
    """The table of a stack of masks: float32 [K, 7], columns ``MASK_COLUMNS``.

    The box is the smallest one that holds the mask: its pixels are left <= x < left + width, top <= y < top + height.
    The box of an empty mask is all zero.

    Args:
        stack: bool [K, H, W].
        predicted_iou: float [K], quality of each mask in [0, 1].
        stability_score: float [K], in [0, 1].
    """
    _check_stack(stack)
    left, width = _extent(np.any(stack, axis=1))
    top, height = _extent(np.any(stack, axis=2))
    area = np.count_nonzero(stack, axis=(1, 2))
    return np.stack([area, predicted_iou, stability_score, left, top, width, height], axis=1).astype(np.float32)


def _extent(occupied: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First true position and length up to the last one, of every row of bool [K, N]; (0, 0) for an empty row."""
    first = occupied.argmax(axis=1)
    last = occupied.shape[1] - occupied[:, ::-1].argmax(axis=1)
    return first, np.where(occupied.any(axis=1), last - first, 0)


def _check_stack(stack: np.ndarray) -> None:
    """Raise ``ValueError`` unless ``stack`` is bool [K, H, W]."""
    if stack.dtype != bool or stack.ndim != 3:
        raise ValueError(f"masks are bool [K, H, W], got {stack.dtype} {stack.shape}")
