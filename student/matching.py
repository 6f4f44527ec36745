"""Mutual nearest neighbours between the descriptors of two images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_ELEMENTS = 1 << 22  # similarities held at a time: 16 MiB of float32


@torch.no_grad()
def match(
    features0: Mapping[str, Any], features1: Mapping[str, Any], *, ratio: float | None = None
) -> dict[str, Tensor]:
    """Pairs of features that are each other's best by the dot product of their descriptors.

    The descriptors are taken as they come and never normalised: attention-weighted ones, as the released evaluation
    matches them, let a feature of high attention win over one of low attention; unit ones give cosine matching. Of
    equal candidates the first wins. Memory does not grow with the product of the two numbers of features.

    Args:
        features0: what ``SAMFeat.extract`` returned for an image; of it ``"descriptors"``, [N, D], torch or numpy.
        features1: the same for another image, [M, D].
        ratio: keep a match only if its Euclidean distance is below ``ratio`` times that from the same feature of image
            0 to its second best in image 1 (0.8 is common). A ratio of distances means something for **unit**
            descriptors alone: extract with ``weighted_descriptors=False``.

    Returns:
        ``"matches"``: int64 [K, 2], indices into the first and the second features, ascending by the first;
        ``"scores"``: float32 [K], the dot products. Both on the device of ``features0``.

    Raises:
        ValueError: no descriptors, not two matrices of finite numbers of equal width, or a ratio outside (0, 1].
    """
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1] or be None, got {ratio}")
    descriptors0, descriptors1 = _descriptors(features0, "features0"), _descriptors(features1, "features1")
    if descriptors0.shape[1] != descriptors1.shape[1]:
        raise ValueError(f"descriptors must be of one width, got {descriptors0.shape[1]} and {descriptors1.shape[1]}")
    descriptors1 = descriptors1.to(descriptors0.device)
    count0, count1 = len(descriptors0), len(descriptors1)
    if count0 == 0 or count1 == 0:
        empty = torch.empty((0, 2), dtype=torch.int64, device=descriptors0.device)
        return {"matches": empty, "scores": torch.empty(0, device=descriptors0.device)}

    best1 = torch.empty(count0, dtype=torch.int64, device=descriptors0.device)  # best of image 1 for each of image 0
    best0 = torch.zeros(count1, dtype=torch.int64, device=descriptors0.device)  # and the other way round
    scores = descriptors0.new_empty(count0)
    scores0 = descriptors0.new_full((count1,), -torch.inf)
    distinct = torch.ones(count0, dtype=torch.bool, device=descriptors0.device)
    rows = max(1, BLOCK_ELEMENTS // count1)
    for start in range(0, count0, rows):
        block = slice(start, start + rows)
        similarity = descriptors0[block] @ descriptors1.T
        scores[block], best1[block] = similarity.max(dim=1)
        column_scores, column_best = similarity.max(dim=0)
        better = column_scores > scores0
        scores0 = torch.where(better, column_scores, scores0)
        best0 = torch.where(better, column_best + start, best0)
        if ratio is not None and count1 > 1:
            distinct[block] = _passes_ratio(similarity, ratio)

    index0 = torch.arange(count0, device=descriptors0.device)
    mutual = (best0[best1] == index0) & distinct
    return {"matches": torch.stack((index0[mutual], best1[mutual]), dim=1), "scores": scores[mutual].float()}


def _passes_ratio(similarity: Float[Tensor, "n m"], ratio: float) -> Tensor:
    """Lowe's test on unit descriptors, whose squared distance is 2 - 2 cos."""
    squared = (2 - 2 * similarity.topk(2, dim=1).values).clamp(min=0)
    return squared[:, 0] < ratio**2 * squared[:, 1]


def _descriptors(features: Mapping[str, Any], name: str) -> Tensor:
    if "descriptors" not in features:
        raise ValueError(f'{name} must hold "descriptors", got {sorted(features)}')
    values = features["descriptors"]
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.array(values))
    if not isinstance(values, Tensor) or values.ndim != 2 or not values.is_floating_point():
        given = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"descriptors of {name} must be a float tensor or array [N, D], got {given}")
    if not values.isfinite().all():
        raise ValueError(f"descriptors of {name} must be finite, got NaN or infinity")
    return values.to(torch.promote_types(values.dtype, torch.float32))
