"""Distillation of the teacher's embedding: by its relations (equations 7 and 8) or by the features themselves.

The relation matrices of an image have (h w)^2 entries, 6.25 million at 400 x 400 pixels, and are never stored whole.
With unit features s and t, the difference is D = R' - R = [s, t] [s, -t]^T, the loss sum(e^W |D|) / Z and its gradient
by s simply 2 / Z (e^W sign(D)) s. So one pass over row tiles gives both, and as D and W are symmetric, it takes only
the tiles on and right of the diagonal.
"""

from __future__ import annotations

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
    teacher: Float[Tensor, "b c2 h2 w2"],
    *,
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
        teacher: embedding of the teacher, any size and channels, float16 as stored or wider; resized bilinearly.
        attention: attention map, any size; resized bilinearly.
        valid: where the targets hold, at any resolution; None for everywhere. A position takes part if all of its
            pixels are valid, a pair if both of its positions do; images without any drop out.
        reduction: of the images' losses.
    """
    mask = _valid_positions(valid, student).flatten(1)
    features, targets = widen(student), _resized(teacher.detach(), student)
    weights = None if attention is None else _resized(attention.detach(), student).flatten(1).to(features) * mask
    device = student.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    with torch.autocast(device, enabled=False):
        losses = _RelationGap.apply(features, targets, weights, mask, dtype)
    return reduction(losses, mask.any(1))


def feature_distillation_loss(
    student: Float[Tensor, "b c h w"],
    teacher: Float[Tensor, "b c h2 w2"],
    *,
    valid: Bool[Tensor, "b h3 w3"] | None = None,
    reduction: Reduction = mean_over_images,
) -> Float[Tensor, ""]:
    """Mean absolute difference between the features (direct semantic feature distillation, Table V).

    The features are compared as they are, without normalisation, as an unused loss of the released code does: the
    student's last layer is linear and free to take the teacher's scale, and "direct" means that it shall.

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
    """Loss of every image, [b], from features [b, c, h, w]; the gradient by them is made on the way."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, targets: Tensor, attention: Tensor | None, mask: Tensor, dtype: torch.dtype
    ) -> Tensor:
        losses, gradient = features.new_zeros(len(features)), torch.empty_like(features)
        for b in range(len(features)):
            unit, length = _unit(features[b], mask[b])
            target, _ = _unit(targets[b], mask[b])
            weights = None if attention is None else attention[b]
            losses[b], pull = _gap_of_image(unit, target, weights, mask[b], dtype)
            pull -= unit * torch.linalg.vecdot(unit, pull)[:, None]  # lengths do not matter
            pull *= (mask[b] / length)[:, None]
            gradient[b] = pull.T.view_as(gradient[b])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[0][:, None, None, None] * gradient, None, None, None, None


def _gap_of_image(
    features: Tensor, targets: Tensor, attention: Tensor | None, mask: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss of one image from unit features [n, c] that are zero where the mask is, and its derivative by them, [n, c].

    The products of the features run in ``dtype``. A tile reaches from the diagonal to the right; its mirror image
    below the diagonal is added along with it, for which its square on the diagonal, its own mirror image, is halved.
    """
    counted = mask.to(features.dtype)
    half_total, half_weights = features.new_zeros(()), counted.sum().square() / 2
    if attention is not None:
        half_weights, least = features.new_zeros(()), -attention.abs().amax().square()[None, None]
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
            weight = torch.addr(least, attention[rows], attention[columns]).exp_()
            weight[:, square] *= 0.5
            half_weights += counted[rows] @ (weight @ counted[columns])
            pull = weight.to(dtype).copysign_(gap)  # at gap 0 any slope between both is right
        half_total += (gap * pull).sum(dtype=features.dtype)
        gradient[rows] += pull @ narrow[columns]
        gradient[columns] += pull.T @ narrow[rows]
    half_weights = half_weights.clamp(min=0.5)  # only ever less where nothing is valid: the largest weight is 1
    gradient /= half_weights
    return half_total / half_weights, gradient


def _unit(
    features: Float[Tensor, "c h w"], mask: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, "n c"], Float[Tensor, " n"]]:
    """Features of length 1, positions before channels, zero where the mask is; and their lengths before."""
    rows = features.flatten(1).T.contiguous()  # which may still be the memory of ``features``
    length = torch.linalg.vector_norm(rows, dim=1) + 1e-7
    return (rows / length[:, None]).mul_(mask[:, None]), length


def _resized(maps: Float[Tensor, "b c2 h2 w2"], like: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
    return F.interpolate(widen(maps), size=tuple(like.shape[2:]), mode="bilinear", align_corners=False)


def _valid_positions(valid: Bool[Tensor, "b h2 w2"] | None, like: Float[Tensor, "b c h w"]) -> Bool[Tensor, "b h w"]:
    size = (like.shape[2], like.shape[3])
    if valid is None:
        return torch.ones((len(like), *size), dtype=torch.bool, device=like.device)
    return F.adaptive_max_pool2d((~valid)[:, None].float(), size)[:, 0] == 0
