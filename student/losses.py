"""The losses of the paper as pure functions: batched tensors in, one scalar tensor out.

They hold no state, never wait for the device, and are safe where nothing takes part: an image without valid points,
pairs or pixels adds nothing, and where that is so for every image the loss is 0 with a gradient of 0. Targets that do
not apply to an image (those of a warped view, for one) are switched off by its mask or its groups, not by a shorter
batch.

Every loss comes to one value an image first. How these become one scalar is the ``reduction``, a function of the values
and of which images take part: :func:`mean_over_images`, or a mean over the images of several processes.

Half precision inputs are widened to float32 here, whatever autocast says; float64 stays float64. Relation distillation
(equations 7 and 8) lives in :mod:`samfeat.student.relation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

DetectionForm = Literal["released", "paper"]
WscForm = Literal["released", "masked_infonce", "mean_softplus"]
EdgeForm = Literal["mse", "l1"]
EdgePooling = Literal["bilinear", "area", "max"]
Reduction = Callable[[Tensor, Tensor], Tensor]  # values [b], whether they take part [b] -> a scalar

_LOG_FLOOR = 1e-4  # inside the logarithms of the released detection loss
_MIN_SQUARED_DISTANCE = 1e-5  # keeps the derivative of the square root finite
_EXCLUDED = 10.0  # added to the distance of a pair that must not serve as a negative
_NEVER = -1e9  # a score whose exponential is 0, finite so that its gradient is too


def mean_over_images(values: Float[Tensor, " b"], used: Bool[Tensor, " b"]) -> Float[Tensor, ""]:
    """Mean of the finite ``values`` of the images in use, 0 if there is none."""
    return (used * values).sum() / used.sum().clamp(min=1)


def detection_loss(
    logits: Float[Tensor, "b 1 h w"],
    labels: Tensor,
    mask: Tensor,
    *,
    positive_weight: float = 200.0,
    form: DetectionForm = "released",
    reduction: Reduction = mean_over_images,
) -> Float[Tensor, ""]:
    """Weighted binary cross-entropy between a keypoint heat map and its labels (equations 1 and 2).

    Args:
        logits: heat map before the sigmoid, without any edge bonus.
        labels: 1 at keypoints, 0 elsewhere, [B, H, W], any dtype.
        mask: weight of each pixel in [0, 1], [B, H, W], any dtype; 0 where a warp left no image.
        positive_weight: lambda, the weight of a keypoint pixel against any other pixel.
        form: ``released`` has 1e-4 inside the logarithms, divides by one pixel too many and averages over all images,
            as the released code; ``paper`` is the stable cross-entropy, averaged over the pixels of the mask.
    """
    _check(form, DetectionForm, "detection form")
    logits = widen(logits[:, 0])
    labels, mask = labels.to(logits.dtype), mask.to(logits.dtype)
    if form == "released":
        probability = torch.sigmoid(logits)
        keypoint, background = torch.log(probability + _LOG_FLOOR), torch.log(1 - probability + _LOG_FLOOR)
    else:
        keypoint, background = F.logsigmoid(logits), F.logsigmoid(-logits)
    entropy = -(positive_weight * labels * keypoint + (1 - labels) * background)
    if form == "released":
        values = (mask * entropy).sum((1, 2)) / (mask.sum((1, 2)) + 1)
        return reduction(values, torch.ones_like(values, dtype=torch.bool))
    return masked_mean(entropy, mask, reduction)


def excluded_negatives(
    points1: Float[Tensor, "b n 2"], valid: Bool[Tensor, "b n"], *, radius: float = 16.0
) -> Bool[Tensor, "b n n"]:
    """Which points of the right image must not serve as a negative of which correspondence.

    Args:
        points1: points (x, y) of the right image in pixels; point i belongs to correspondence i.
        valid: whether the correspondence holds.
        radius: pixels; points this close in the right image, the point itself included, are not told apart.

    Returns:
        True at [b, i, j] where right point j is no negative for anchor i: too close to right point i, or invalid.
    """
    points1 = widen(points1)
    distances = torch.cdist(points1, points1, compute_mode="donot_use_mm_for_euclid_dist")
    return (distances <= radius) | ~valid[:, None, :]


def descriptor_loss(
    descriptors0: Float[Tensor, "b n c"],
    descriptors1: Float[Tensor, "b n c"],
    attention0: Float[Tensor, "b n"],
    attention1: Float[Tensor, "b n"],
    valid: Bool[Tensor, "b n"],
    excluded: Bool[Tensor, "b n n"],
    *,
    temperature: float = 15.0,
    margin: float = 1.0,
    reduction: Reduction = mean_over_images,
) -> Float[Tensor, ""]:
    """Attention-weighted triplet loss with the hardest negative (equations 4 to 6).

    One direction: anchors of image 0, negatives of image 1. For the other one, call again with the sides exchanged and
    with the ``excluded`` of the points of image 0. Gradients reach the descriptors and both attentions. An image
    without valid points counts as 0 in the mean over images.

    Args:
        descriptors0: unit descriptors of image 0; row i corresponds to row i of ``descriptors1``.
        descriptors1: unit descriptors of image 1.
        attention0: attention at the points of image 0, >= 0; scales the descriptor and weighs the anchor.
        attention1: attention at the points of image 1, >= 0; scales the descriptor.
        valid: whether correspondence i holds; others have no weight.
        excluded: see :func:`excluded_negatives`.
        temperature: T of the weights e^(attention / T).
        margin: by how much the negative must be farther than the positive, in attention-scaled units.
    """
    distances = _distances(_weighted(descriptors0, attention0), _weighted(descriptors1, attention1))
    positive = distances.diagonal(dim1=1, dim2=2)
    negative = torch.add(distances, excluded, alpha=_EXCLUDED).amin(2)
    hinge = F.relu(margin + positive - negative)
    scores = valid * widen(attention0) / temperature
    weights = valid * torch.exp(scores - scores.amax(1, keepdim=True).detach())
    weights = weights / weights.sum(1, keepdim=True).clamp(min=_MIN_SQUARED_DISTANCE)
    values = (weights * hinge).sum(1)
    return reduction(values, torch.ones_like(values, dtype=torch.bool))


def contrastive_descriptor_loss(
    descriptors0: Float[Tensor, "b n c"],
    descriptors1: Float[Tensor, "b n c"],
    attention0: Float[Tensor, "b n"],
    attention1: Float[Tensor, "b n"],
    valid: Bool[Tensor, "b n"],
    excluded: Bool[Tensor, "b n n"],
    *,
    temperature: float = 0.1,
    reduction: Reduction = mean_over_images,
) -> Float[Tensor, ""]:
    """Cross-entropy of finding the right point of image 1 by the dot products that matching ranks.

    Not in the paper. The triplet loss compares attention-weighted descriptors by their distance, matching by their dot
    product; this one trains the very numbers that are matched: row i of the similarities y0_i . y1_j / temperature,
    with y = attention x descriptor, is a softmax over all points j of image 1, and -log of entry i is its loss. Every
    negative takes part, not the hardest alone, so that it learns from the first step on.

    One direction, as :func:`descriptor_loss`; shapes and ranges are the same.

    Args:
        descriptors0, descriptors1, attention0, attention1, valid, excluded: see :func:`descriptor_loss`.
        temperature: of the softmax; the attention learns to sharpen it further where it pays.
    """
    with torch.autocast(descriptors0.device.type, enabled=False):  # bf16 cannot tell good matches from better ones
        similarity = _weighted(descriptors0, attention0) @ _weighted(descriptors1, attention1).mT / temperature
    positive = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    logits = similarity.masked_fill(excluded & ~positive, -torch.inf)
    surprise = logits.logsumexp(2) - similarity.diagonal(dim1=1, dim2=2)
    return masked_mean(surprise, valid, reduction)


def wsc_loss(
    descriptors: Float[Tensor, "b n c"],
    attention: Float[Tensor, "b n"],
    groups: Int[Tensor, "b n"],
    excluded: Bool[Tensor, "b n n"],
    *,
    form: WscForm = "mean_softplus",
    margin: float = 0.07,
    temperature: float = 5.0,
    background_is_group: bool = False,
    reduction: Reduction = mean_over_images,
) -> Float[Tensor, ""]:
    """Weakly supervised contrast between the semantic groups of one image (equations 9 to 11).

    Points of one group attract each other until they are ``margin`` apart, points of different groups repel each other.
    An image whose groups are all -1 drops out. The paper's equation 11, taken literally, pulls different groups
    together; the forms are:

    - ``mean_softplus``, the paper's intent: softplus((max(P, M) - N) / T) with P and N the mean distances (9) and (10)
      between unit descriptors. ``attention`` and ``excluded`` play no part. Images need a pair of each kind.
    - ``released``: for every point j, -ln(p / (p + n)) with p and n the sums of e^(-distance / T) over *all* points i,
      distance 0 where the pair is of the other kind, between attention-weighted descriptors; j is its own positive.
    - ``masked_infonce``: the same with sums over the pairs of their own kind alone, i = j left out; points without a
      pair of each kind drop out.

    Args:
        descriptors: unit descriptors.
        attention: attention at the points, >= 0.
        groups: label of the mask under each point, 0 = no mask, -1 = takes no part.
        excluded: pairs whose distance is raised by 10, see :func:`excluded_negatives`; the released code takes that of
            the right image for both images.
        form: see above.
        margin: M, in units of the distance.
        temperature: T.
        background_is_group: whether two points without a mask attract each other. A point without a mask repels the
            points of every mask either way.
    """
    _check(form, WscForm, "WSC form")
    positive, negative = _group_pairs(groups, background_is_group=background_is_group, itself=form == "released")
    if form == "mean_softplus":
        unit = widen(descriptors)
        distances = _distances(unit, unit)
        near, far = _mean_of_pairs(distances, positive), _mean_of_pairs(distances, negative)
        contrast = F.softplus((near.clamp(min=margin) - far) / temperature)
        return reduction(contrast, positive.flatten(1).any(1) & negative.flatten(1).any(1))

    weighted = _weighted(descriptors, attention)
    distances = torch.add(_distances(weighted, weighted), excluded, alpha=_EXCLUDED)
    other = 0.0 if form == "released" else _NEVER
    near = torch.where(positive, -distances.clamp(min=margin) / temperature, other).logsumexp(1)
    far = torch.where(negative, -distances / temperature, other).logsumexp(1)
    if form == "released":
        counted = (groups >= 0).any(1, keepdim=True).expand_as(groups)
    else:
        counted = positive.any(1) & negative.any(1)
    return masked_mean(F.softplus(far - near), counted, reduction)


def edge_loss(
    predicted: Float[Tensor, "b 1 h w"],
    target: UInt8[Tensor, "b H W"],
    valid: Bool[Tensor, "b H W"] | None = None,
    *,
    form: EdgeForm = "mse",
    pooling: EdgePooling = "bilinear",
    reduction: Reduction = mean_over_images,
) -> Float[Tensor, ""]:
    """Distance between the student's edge map and the teacher's (equation 12).

    Args:
        predicted: edge probability in [0, 1].
        target: teacher's edge strength, 0 (none) to 255, usually at four times the resolution.
        valid: pixels whose target holds; None for all. A cell counts where every target pixel that it reads is valid.
        form: ``mse`` as the released code, or ``l1`` as the paper, but as a mean: the paper's sum over the image would
            outweigh every other loss ten thousandfold.
        pooling: how the target comes down to the size of ``predicted``: ``bilinear`` without antialias as the released
            code, which loses half of all one-pixel lines, or ``area`` or ``max``, which lose none.
    """
    _check(form, EdgeForm, "edge form")
    _check(pooling, EdgePooling, "edge pooling")
    predicted = widen(predicted)
    size = (predicted.shape[2], predicted.shape[3])
    error = predicted - _resample(target[:, None].to(predicted.dtype) / 255, size, pooling)
    error = error.square() if form == "mse" else error.abs()
    if valid is None:
        return masked_mean(error, torch.ones_like(error), reduction)
    return masked_mean(error, _resample((~valid)[:, None].to(predicted.dtype), size, pooling) == 0, reduction)


def widen(values: Tensor) -> Tensor:
    """``values`` as float32 if they are float16 or bfloat16, else as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def masked_mean(
    values: Float[Tensor, "b ..."], weights: Tensor, reduction: Reduction = mean_over_images
) -> Float[Tensor, ""]:
    """Mean over images of the weighted mean over each image; 0 if there is no weight at all.

    Args:
        values: finite everywhere.
        weights: booleans, or weights in [0, 1], in the shape of ``values``; an image without any weight drops out.
        reduction: of the images' means.
    """
    weights = weights.to(values.dtype)
    total = weights.flatten(1).sum(1)
    return reduction((weights * values).flatten(1).sum(1) / total.clamp(min=1), total > 0)


def _check(form: str, allowed: object, what: str) -> None:
    if form not in get_args(allowed):
        raise ValueError(f"unknown {what} {form!r}: choose one of {', '.join(get_args(allowed))}")


def _weighted(descriptors: Float[Tensor, "b n c"], attention: Float[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
    return widen(descriptors) * widen(attention)[:, :, None]


def _distances(left: Float[Tensor, "b n c"], right: Float[Tensor, "b m c"]) -> Float[Tensor, "b n m"]:
    """Euclidean distances with a floor of sqrt(1e-5), below which the gradient is 0."""
    with torch.autocast(left.device.type, enabled=False):
        lengths = left.square().sum(2)[:, :, None] + right.square().sum(2)[:, None, :]
        squared = torch.baddbmm(lengths, left, right.mT, alpha=-2)
        return squared.clamp(min=_MIN_SQUARED_DISTANCE).sqrt()


def _group_pairs(groups: Int[Tensor, "b n"], *, background_is_group: bool, itself: bool) -> tuple[Tensor, Tensor]:
    """Positive and negative pairs, bool [b, n, n] each and symmetric; ``itself``: whether i = j is a positive pair."""
    taking_part = (groups >= 0)[:, :, None] & (groups >= 0)[:, None, :]
    same = groups[:, :, None] == groups[:, None, :]
    positive = taking_part & same
    if not background_is_group:
        positive = positive & (groups > 0)[:, :, None]
    if not itself:
        positive = positive & ~torch.eye(groups.shape[1], dtype=torch.bool, device=groups.device)
    return positive, taking_part & ~same


def _mean_of_pairs(distances: Float[Tensor, "b n n"], pairs: Bool[Tensor, "b n n"]) -> Float[Tensor, " b"]:
    return (pairs * distances).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def _resample(maps: Float[Tensor, "b 1 H W"], size: tuple[int, int], pooling: EdgePooling) -> Float[Tensor, "b 1 h w"]:
    if pooling == "area":
        return F.adaptive_avg_pool2d(maps, size)
    if pooling == "max":
        return F.adaptive_max_pool2d(maps, size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
