"""Mutual nearest neighbours between the descriptors of two images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

BLOCK_ELEMENTS = 1 << 22  # similarities held at a time: 16 MiB of float32


@torch.no_grad()
def match(
    features0: Mapping[str, Any], features1: Mapping[str, Any], *, ratio: float | None = None, cosine: bool = False
) -> dict[str, Tensor]:
    """Pairs of features that are each other's best by the dot product of their descriptors.

    Descriptors are used as they are. With attention-weighted ones, as in the released evaluation, features of high
    attention win over those of low attention; unit ones give cosine matching. The first of equal candidates wins. At
    most ``BLOCK_ELEMENTS`` similarities (16 MiB) are held at a time, whatever the number of features.

    Args:
        features0: result of ``SAMFeat.extract`` for one image; uses ``"descriptors"``, [N, D], torch or numpy.
        features1: the same for another image, [M, D].
        ratio: keep a match only if its Euclidean distance is below ``ratio`` times that from the same feature of image
            0 to its second best in image 1 (0.8 is common; Lowe, IJCV 2004, section 7.1). It requires **unit**
            descriptors: ``cosine=True``, or features extracted with ``weighted_descriptors=False``.
        cosine: divide the descriptors by their length first.

    Returns:
        ``"matches"``: int64 [K, 2], indices into the first and the second features, ascending by the first;
        ``"scores"``: float32 [K], the dot products. Both on the device of ``features0``.

    Raises:
        ValueError: no descriptors, not two matrices of finite numbers of equal width, a ratio outside (0, 1], or a
            ratio for descriptors that are not of unit length.
    """
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1] or be None, got {ratio}")
    descriptors0, descriptors1 = _descriptors(features0, "features0"), _descriptors(features1, "features1")
    if descriptors0.shape[1] != descriptors1.shape[1]:
        raise ValueError(f"descriptors must be of one length, got {descriptors0.shape[1]} and {descriptors1.shape[1]}")
    descriptors1 = descriptors1.to(descriptors0)
    if len(descriptors0) == 0 or len(descriptors1) == 0:
        empty = torch.empty((0, 2), dtype=torch.int64, device=descriptors0.device)
        return {"matches": empty, "scores": torch.empty(0, device=descriptors0.device)}
    if cosine:
        descriptors0, descriptors1 = F.normalize(descriptors0, dim=1), F.normalize(descriptors1, dim=1)
    elif ratio is not None and not (_unit_length(descriptors0) and _unit_length(descriptors1)):
        raise ValueError("a ratio needs descriptors of unit length: match with cosine=True")

    best = _best(descriptors0, descriptors1, with_second=ratio is not None)
    mutual = best.scores == best.scores1[best.indices]
    if ratio is not None and len(descriptors1) > 1:
        distances, seconds = ((2 - 2 * cosines).clamp(min=0) for cosines in (best.scores, best.seconds))  # squared
        mutual &= distances < ratio**2 * seconds
    index0 = mutual.nonzero().squeeze(1)
    index1 = best.indices[index0]
    first = torch.full_like(best.scores1, len(descriptors0), dtype=torch.int64)  # first of equally good ones
    first.scatter_reduce_(0, index1, index0, "amin")
    index0 = index0[first[index1] == index0]
    return {"matches": torch.stack((index0, best.indices[index0]), dim=1), "scores": best.scores[index0].float()}


class _Best(NamedTuple):
    """Best dot product, its index and the second best for every feature of image 0; best dot product for image 1.

    ``seconds`` is only meaningful if requested.
    """

    scores: Tensor
    indices: Tensor
    seconds: Tensor
    scores1: Tensor


def _best(descriptors0: Float[Tensor, "n d"], descriptors1: Float[Tensor, "m d"], *, with_second: bool) -> _Best:
    """Goes through the similarities row block by row block, in one reused buffer."""
    count0, count1 = len(descriptors0), len(descriptors1)
    rows = min(count0, max(1, BLOCK_ELEMENTS // count1))
    buffer = descriptors0.new_empty((rows, count1))
    scores, seconds = descriptors0.new_empty((2, count0))
    indices = torch.empty(count0, dtype=torch.int64, device=descriptors0.device)
    scores1 = descriptors0.new_full((count1,), -torch.inf)
    for start in range(0, count0, rows):
        block = slice(start, min(start + rows, count0))
        similarity = buffer[: block.stop - start]
        torch.mm(descriptors0[block], descriptors1.T, out=similarity)
        torch.max(similarity, 1, out=(scores[block], indices[block]))
        torch.maximum(scores1, similarity.amax(0), out=scores1)
        if with_second:
            similarity.scatter_(1, indices[block, None], -torch.inf)
            torch.amax(similarity, 1, out=seconds[block])
    return _Best(scores, indices, seconds, scores1)


def _unit_length(descriptors: Float[Tensor, "n d"]) -> bool:
    """Whether descriptors have unit length to half precision, as feature files may be stored in it."""
    return bool(((descriptors.norm(dim=1) - 1).abs() < 1e-2).all())


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
