"""From a detection map to keypoints: threshold, greedy non-maximum suppression, border, subpixel refinement."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

CANDIDATES_PER_KEYPOINT = 8  # pixels looked at first


def detect(
    logits: Float[Tensor, "b h w"], threshold: float, *, radius: int, border: int, limit: int | None = None
) -> list[Int[Tensor, "k 2"]]:
    """Keypoints of detection maps: threshold, suppression, border, limit, in this order.

    A pixel is suppressed by better ones only, so the best keypoints are found among the best pixels: with a limit, a
    few times as many of them as keypoints are looked at, and more only if these were too few.

    Args:
        logits: [B, H, W].
        threshold: minimum probability, compared with the sigmoid of ``logits``.
        radius: see :func:`greedy_nms`.
        border: pixels along each side without keypoints.
        limit: maximum number of keypoints of a map, the best ones; ``None`` for all.

    Returns:
        for every map int64 [K, 2], (y, x), by descending logit. Logits order like probabilities, but do not saturate.
    """
    height, width = logits.shape[1:]
    pixels, tried = height * width, CANDIDATES_PER_KEYPOINT * (limit or height * width)
    allowed = torch.sigmoid(logits) >= threshold
    while True:
        candidates = allowed
        if tried < pixels:
            worst = logits.flatten(1).kthvalue(pixels - tried + 1, dim=1).values
            candidates = allowed & (logits >= worst[:, None, None])
        found = []
        for kept in greedy_nms(logits, candidates, radius=radius):
            y, x = kept // width, kept % width
            inside = (x >= border) & (x < width - border) & (y >= border) & (y < height - border)
            found.append(torch.stack((y, x), dim=1)[inside][:limit])
        if tried >= pixels or min(map(len, found)) == limit or torch.equal(candidates, allowed):
            return found
        tried *= 4


def greedy_nms(
    scores: Float[Tensor, "b h w"], candidates: Bool[Tensor, "b h w"], *, radius: int
) -> list[Int[Tensor, " k"]]:
    """Greedy non-maximum suppression: take the best candidate, drop all within ``radius`` of it, repeat.

    Gives exactly the result of that loop, in a few passes over whole maps: a candidate that is the best remaining one
    in its own window will be taken by the loop whatever happens elsewhere.

    Args:
        scores: [B, H, W]; of equal scores the first in raster order is the better one.
        candidates: [B, H, W], the pixels to consider.
        radius: of the infinity norm: the window is the square of 2 radius + 1 pixels.

    Returns:
        for every map int64 [K], y W + x of the selected pixels, in that order.
    """
    indices = candidates.flatten().nonzero().squeeze(1)
    order = indices[torch.sort(scores.flatten()[indices], descending=True, stable=True).indices]
    exact = torch.float32 if len(order) < 1 << 24 else torch.float64  # represents these integers exactly
    rank = torch.zeros(scores.numel(), dtype=exact, device=scores.device)
    rank[order] = torch.arange(len(order), 0, -1, dtype=exact, device=scores.device)
    rank = rank.view_as(scores)
    taken = torch.zeros_like(candidates)
    while True:
        best = (rank > 0) & (rank == window_max(rank, radius))
        if not best.any():
            break
        taken |= best
        rank[window_max(best, radius)] = 0
    kept = order[taken.flatten()[order]]
    pixels = scores[0].numel()
    if len(scores) == 1:
        return [kept]
    numbers, positions = torch.sort(kept // pixels, stable=True)
    counts = torch.bincount(numbers, minlength=len(scores)).tolist()
    return list((kept % pixels)[positions].split(counts))


def window_max(values: Tensor, radius: int) -> Tensor:
    """Maximum of the square of 2 ``radius`` + 1 pixels around every pixel, of float or bool maps [B, H, W]."""
    if values.device.type != "cpu":
        return _pooled_max(values, radius)
    arrays = values.view(torch.uint8).numpy() if values.dtype == torch.bool else values.numpy()
    window = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    found = np.stack([cv2.dilate(array, window) for array in arrays])  # many times faster than pooling on a CPU
    return torch.from_numpy(found).view(values.dtype)


def _pooled_max(values: Tensor, radius: int) -> Tensor:
    numbers = values.float() if values.dtype == torch.bool else values
    rows = F.max_pool2d(numbers[:, None], (1, 2 * radius + 1), stride=1, padding=(0, radius))
    return F.max_pool2d(rows, (2 * radius + 1, 1), stride=1, padding=(radius, 0))[:, 0].to(values.dtype)


def subpixel_offsets(logits: Float[Tensor, "h w"], points_yx: Int[Tensor, "k 2"]) -> Float[Tensor, "k 2"]:
    """Offset from each pixel to the peak of the quadratic fit to its 3 x 3 neighbourhood, (x, y) in [-0.5, 0.5].

    The derivatives of the quadratic are central differences of ``logits`` (a Newton step). Only points where it has a
    maximum are moved; border values are repeated outside the map.
    """
    height, width = logits.shape
    y, x = points_yx.unbind(1)

    def at(dy: int, dx: int) -> Tensor:
        return logits[(y + dy).clamp(0, height - 1), (x + dx).clamp(0, width - 1)]

    centre = at(0, 0)
    gx, gy = (at(0, 1) - at(0, -1)) / 2, (at(1, 0) - at(-1, 0)) / 2
    xx, yy = at(0, 1) - 2 * centre + at(0, -1), at(1, 0) - 2 * centre + at(-1, 0)
    xy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    determinant = xx * yy - xy * xy
    peak = (xx < 0) & (determinant > 0)
    safe = torch.where(peak, determinant, 1)
    step = torch.stack(((xy * gy - yy * gx) / safe, (xy * gx - xx * gy) / safe), dim=1)
    return torch.where(peak[:, None], step.clamp(-0.5, 0.5), 0)
