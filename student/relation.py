"""Distillation of the teacher's embedding: by its relations (equations 7 and 8) or by the features themselves.

The relation matrices of an image have (h w)^2 entries, 6.25 million at 400 x 400 pixels, and are never stored whole.
With unit features s and t, the difference is ``D = R' - R = [s, t] [s, -t]^T``, the loss sum(e^W |D|) / Z and its
gradient with respect to s simply 2 / Z (e^W sign(D)) s. So one pass over row tiles gives both, and as D and W are
symmetric, it takes only the tiles on and right of the diagonal. On CUDA the pass is
:mod:`samfeat.student.relation_triton`.

One thread of a CPU with AVX-512 and AMX takes 3.4 times less time than with whole matrices and autograd, 5.6 times less
in bfloat16, and none of their 477 MB (``tests/benchmarks/bench_relation.py``, 4 images of 50 x 50 positions).
``tests/test_relation.py`` compares both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from samfeat.student.losses import Reduction, masked_mean, mean_over_images, widen

_TILE = 256  # rows of a tile


def relation_loss(
    student: Float[Tensor, "b c h w"],
    teacher: Tensor,
    *,
    scale: Float[Tensor, "b h2 w2"] | None = None,
    attention: Float[Tensor, "b 1 h3 w3"] | None = None,
    valid: Bool[Tensor, "b h4 w4"] | None = None,
    reduction: Reduction = mean_over_images,
) -> Float[Tensor, ""]:
    """Mean difference between the cosines of all pairs of positions in the student and in the teacher.

    With attention, pair (i, j) has the weight e^(a_i a_j) (equations 7 and 8), normalised over the image. Without, all
    pairs weigh the same. That is also what the released code computes: it multiplies the features by the attention
    *before* it normalises them, which cancels.

    The attention gets no gradient: a position never differs from itself, so that all weight on one position would bring
    the loss to zero. Under autocast the matrix products run in its dtype, everything else in float32.

    Args:
        student: distillation feature of the student; its h x w positions are compared.
        teacher: embedding of the teacher [B, C2, h2, w2], any size and channels, float16 or wider, or int8 as a cache
            stores it; resized bilinearly, image by image, so that it is never widened as a whole.
        scale: of an int8 teacher, whose embedding is ``teacher * scale``; None for floats.
        attention: attention map, any size; resized bilinearly.
        valid: where the targets hold, at any resolution; None for everywhere. A position takes part if all of its
            pixels are valid, a pair if both of its positions do; images without any drop out.
        reduction: of the images' losses.

    Raises:
        ValueError: an int8 teacher without its scale, or floats with one.
    """
    if (scale is None) == (teacher.dtype == torch.int8):
        raise ValueError(
            f"the teacher is {str(teacher.dtype).removeprefix('torch.')} with{'out' if scale is None else ''} a scale: "
            "give int8 with the scale of each position, or floats without one"
        )
    mask = _valid_positions(valid, student)
    weights = None if attention is None else _resized(attention.detach(), student).flatten(1) * mask.flatten(1)
    device = student.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else widen(student[:0]).dtype
    with torch.autocast(device, enabled=False):
        losses = _RelationGap.apply(student, teacher.detach(), scale, weights, mask, dtype)
    return reduction(losses, mask.flatten(1).any(1))


def feature_distillation_loss(
    student: Float[Tensor, "b c h w"],
    teacher: Float[Tensor, "b c h2 w2"],
    *,
    valid: Bool[Tensor, "b h3 w3"] | None = None,
    reduction: Reduction = mean_over_images,
) -> Float[Tensor, ""]:
    """Mean absolute difference between the features (direct semantic feature distillation, Table V).

    The features are compared as they are, without normalisation, as an unused loss of the released code does: the
        student's last layer is linear, so it can match the teacher's scale.

    Args:
        student: distillation feature of the student.
        teacher: embedding of the teacher with the same channels, any size; resized bilinearly.
        valid, reduction: as for :func:`relation_loss`.

    Raises:
        ValueError: if the channels differ.
    """
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student's feature has {student.shape[1]} channels and the teacher's {teacher.shape[1]}: "
            "give both the same number, or use relation_loss, which takes any"
        )
    error = (widen(student) - _resized(teacher, student)).abs().mean(1)
    return masked_mean(error, _valid_positions(valid, student), reduction)


class _RelationGap(torch.autograd.Function):
    """Loss of every image, [b], from features [b, c, h, w]; computes their gradient in the same pass."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        targets: Tensor,
        scale: Tensor | None,
        attention: Tensor | None,
        mask: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        gap = _fused_gap(features, targets, dtype) or _gap_of_images
        half_totals, half_weights, gradient = gap(features, targets, scale, attention, mask, dtype)
        ctx.save_for_backward(gradient.mT.unflatten(2, mask.shape[1:]), half_weights)
        ctx.dtype = features.dtype
        return half_totals / half_weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        gradient, half_weights = ctx.saved_tensors
        gradient = (upstream[0] / half_weights)[:, None, None, None] * gradient
        return gradient.to(ctx.dtype), None, None, None, None, None


def _fused_gap(features: Tensor, targets: Tensor, dtype: torch.dtype) -> Callable[..., Any] | None:
    """The fused form of ``_gap_of_images``; None without CUDA or Triton, or with too many channels."""
    if not features.is_cuda or torch.version.hip is not None:
        return None
    try:
        from samfeat.student import relation_triton
    except ImportError:
        return None
    limits = relation_triton.limits_of(features.device)
    fits = relation_triton.fused_tile(features.shape[1], targets.shape[1], dtype, limits)
    return relation_triton.gap_of_images if fits else None


def _gap_of_images(
    features: Float[Tensor, "b c h w"],
    targets: Tensor,
    scale: Tensor | None,
    attention: Float[Tensor, "b n"] | None,
    mask: Bool[Tensor, "b h w"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Float[Tensor, "b n c"]]:
    """Halves of sum(e^W |D|) and of Z of every image, and half of the sum's derivative with respect to the features.

    Args:
        features: of the student, any float dtype.
        targets: of the teacher [B, C2, h2, w2], any float dtype, or int8 with a scale [B, h2, w2].
        scale: see ``targets``.
        attention: 0 where the mask is False; None for equal weights.
        mask: positions that take part.
        dtype: of the matrix products.
    """
    images, channels = features.shape[:2]
    half_totals = torch.empty(images, dtype=widen(features[:0]).dtype, device=features.device)
    half_weights = torch.empty_like(half_totals)
    gradient = half_totals.new_empty((images, mask[0].numel(), channels))
    for b in range(images):
        counted = mask[b].flatten()
        unit, length = _unit(widen(features[b]), counted)
        target, _ = _unit(_target(targets[b], None if scale is None else scale[b], features), counted)
        weights = None if attention is None else attention[b].to(unit.dtype)
        half_totals[b], half_weights[b], pull = _gap_of_image(unit, target, weights, counted, dtype)
        pull -= unit * torch.linalg.vecdot(unit, pull)[:, None]  # the loss ignores lengths
        torch.mul(pull, (counted / length)[:, None], out=gradient[b])
    return half_totals, half_weights, gradient


def _gap_of_image(
    features: Tensor, targets: Tensor, attention: Tensor | None, mask: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same halves for unit features [n, c] that are zero where the mask is; the derivative is by these, [n, c].

    The products of the features run in ``dtype``. A tile reaches from the diagonal to the right; its mirror image
    below the diagonal is added along with it, for which its square on the diagonal, its own mirror image, is halved.
    """
    counted = mask.to(features.dtype)
    half_total, half_weights = features.new_zeros(()), counted.sum().square() / 2
    if attention is not None:
        half_weights = features.new_zeros(())
        binary = attention / math.log(2)  # e^x = 2^(x / log 2), which is three times faster here
        most = (attention * binary).amax()
    narrow, other = features.to(dtype), targets.to(dtype)
    left, right = torch.cat([narrow, other], 1), torch.cat([narrow, -other], 1)
    gradient = torch.zeros_like(features)
    for start in range(0, len(features), _TILE):
        rows, columns = slice(start, start + _TILE), slice(start, None)
        gap = left[rows] @ right[columns].T
        square = slice(0, len(gap))
        if attention is None:
            pull = gap.sign()
            pull[:, square] *= 0.5
        else:
            weight = torch.outer(binary[rows], attention[columns]).sub_(most).exp2_()
            weight[:, square] *= 0.5
            half_weights += counted[rows] @ (weight @ counted[columns])
            pull = weight.to(dtype).copysign_(gap)  # at gap 0 any subgradient is right
        if dtype == features.dtype:
            gradient[rows].addmm_(pull, narrow[columns])
            gradient[columns].addmm_(pull.T, narrow[rows])
            half_total += gap.flatten() @ pull.flatten()
        else:
            gradient[rows] += pull @ narrow[columns]
            gradient[columns] += pull.T @ narrow[rows]
            half_total += gap.mul_(pull).sum(dtype=features.dtype)
    return half_total, half_weights.clamp(min=0.5), gradient  # where anything is valid, the largest weight is 1


def _unit(
    features: Float[Tensor, "c h w"], mask: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, "n c"], Float[Tensor, " n"]]:
    """Features of length 1, positions before channels, zero where the mask is; and their lengths before."""
    rows = features.flatten(1).T.contiguous()  # may share memory with ``features``
    length = torch.linalg.vector_norm(rows, dim=1) + 1e-7
    return (rows / length[:, None]).mul_(mask[:, None]), length


def _target(values: Tensor, scale: Tensor | None, like: Tensor) -> Float[Tensor, "c2 h w"]:
    """The embedding of one image on the grid of ``like``; its lengths are free."""
    values = values[None].contiguous(memory_format=torch.channels_last)  # then resizing makes rows, twice as fast
    if scale is not None:
        values = values.float()
        if scale.shape != like.shape[2:]:  # otherwise it cancels
            values *= scale
    return _resized(values, like)[0]


def _resized(maps: Float[Tensor, "b c2 h2 w2"], like: Float[Tensor, "_ _ h w"]) -> Float[Tensor, "b c2 h w"]:
    return F.interpolate(widen(maps), size=tuple(like.shape[2:]), mode="bilinear", align_corners=False)


def _valid_positions(valid: Bool[Tensor, "b h2 w2"] | None, like: Float[Tensor, "b c h w"]) -> Bool[Tensor, "b h w"]:
    size = (like.shape[2], like.shape[3])
    if valid is None:
        return torch.ones((len(like), *size), dtype=torch.bool, device=like.device)
    return F.adaptive_max_pool2d((~valid)[:, None].float(), size)[:, 0] == 0
