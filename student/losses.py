"""The losses of the paper as pure functions of batched tensors, and their configuration.

They never wait for the device. An image without valid points, pairs or pixels contributes nothing; if that holds for
every image, the loss is 0 and so is its gradient. Targets that do not apply to an image, such as those of a warped
view, are switched off by its mask or its groups, not by a shorter batch.

A loss is first computed per image; ``reduction`` then turns these values and a mask of the images that take part into a
scalar: :func:`mean_over_images`, or a mean over the images of several processes.

Half precision inputs are widened to float32, regardless of autocast; float64 stays float64. Relation distillation
(equations 7 and 8) is in :mod:`samfeat.student.relation`.

To change a loss, edit its function and its options in :class:`LossConfig`, both here; a new term also needs its line in
:func:`samfeat.pipelines.training.objective.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

CrossEntropyForm = Literal["released", "paper"]  # of detection_loss
DetectionForm = Literal["released", "paper", "peaks"]
DescriptorForm = Literal["triplet", "contrastive"]
RelationForm = Literal["eq8", "unweighted", "features"]
WscForm = Literal["mean_softplus", "masked_infonce", "released"]
EdgeForm = Literal["mse", "l1"]
EdgePooling = Literal["bilinear", "area", "max"]
Reduction = Callable[[Tensor, Tensor], Tensor]  # values [b], whether they take part [b] -> a scalar

_LOG_FLOOR = 1e-4  # inside the logarithms of the released detection loss
_MIN_SQUARED_DISTANCE = 1e-5  # keeps the derivative of the square root finite
_EXCLUDED = 10.0  # added to the distance of a pair that must not serve as a negative
_NEVER = -1e9  # a score whose exponential is 0, finite so that its gradient is too


@dataclass(frozen=True)
class LossConfig:
    """Forms, constants and weights of the losses (paper eq. 1-14; weights are all 1 there).

    The functions below take their defaults from here.

    Attributes:
        detection, descriptor, relation, edge, wsc: weights of the five terms; 0 leaves a term out.
        distillation: weight of the teacher's descriptors as targets, not in the paper; 0 leaves them out. For teachers
            whose embedding is a descriptor of the student's length, such as ``aliked``.
        positive_weight: lambda of eq. 1.
        detection_form: ``released`` (1e-4 inside the logarithms, which damps a saturated start), ``paper`` (D18), or
            ``peaks`` (labels to a fraction of a pixel, and a softmax around each of them).
        deep_supervision: every detection head is supervised as well as the fused map (D6; not with ``peaks``).
        descriptor_form: ``triplet`` (eq. 4-6) or ``contrastive`` (cross-entropy over the dot products that matching
            ranks).
        contrastive_temperature: temperature of ``contrastive``.
        descriptor_temperature: T of eq. 6 (D7).
        descriptor_margin: the 1 of eq. 6.
        negative_radius: pixels within which points are not used as negatives (the released code: 16).
        both_directions: anchors from both images of a pair instead of the left one only (D19).
        relation_form: ``eq8`` (attention-weighted), ``unweighted`` (what the released code computes: its attention
            cancels, D10), or ``features`` (DSFD of Table V).
        wsc_form: ``mean_softplus`` (what the text of III-C means), ``masked_infonce``, or ``released`` (D12, D13).
        wsc_margin, wsc_temperature: M and T of eq. 11.
        background_is_group: pixels under no mask form a group of their own (D24).
        edge_form: ``mse`` or ``l1``, both means (D8).
        edge_pooling: how the target is reduced to quarter resolution (D4).

    Raises:
        ValueError: every weight is 0.
    """

    detection: float = 1.0
    descriptor: float = 1.0
    relation: float = 1.0
    edge: float = 1.0
    wsc: float = 1.0
    distillation: float = 0.0
    positive_weight: float = 200.0
    detection_form: DetectionForm = "paper"
    deep_supervision: bool = False
    descriptor_form: DescriptorForm = "contrastive"
    contrastive_temperature: float = 0.1
    descriptor_temperature: float = 15.0
    descriptor_margin: float = 1.0
    negative_radius: float = 16.0
    both_directions: bool = True
    relation_form: RelationForm = "eq8"
    wsc_form: WscForm = "mean_softplus"
    wsc_margin: float = 0.07
    wsc_temperature: float = 5.0
    background_is_group: bool = False
    edge_form: EdgeForm = "mse"
    edge_pooling: EdgePooling = "max"

    def __post_init__(self) -> None:
        if not any((self.detection, self.descriptor, self.relation, self.edge, self.wsc, self.distillation)):
            raise ValueError("losses: every weight is 0, nothing is left to train: set losses.descriptor=1 or another")


def mean_over_images(values: Float[Tensor, " b"], used: Bool[Tensor, " b"]) -> Float[Tensor, ""]:
    """Mean of the finite ``values`` of the images in use, 0 if there is none."""
    return (used * values).sum() / used.sum().clamp(min=1)


def detection_loss(
    logits: Float[Tensor, "b 1 h w"],
    labels: Tensor,
    mask: Tensor,
    *,
    positive_weight: float = LossConfig.positive_weight,
    form: CrossEntropyForm = "paper",
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
    _check(form, CrossEntropyForm, "detection form")
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


def peak_detection_loss(
    logits: Float[Tensor, "b 1 h w"],
    keypoints: Float[Tensor, "b k 3"],
    mask: Tensor,
    *,
    positive_weight: float,
    radius: int = 2,
    reduction: Reduction = mean_over_images,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """How certain a heat map is of keypoints, and how exactly it peaks at them.

    Not in the paper, whose labels are whole pixels with a weight of 200 (equation 1). With that weight a pixel that is
    a keypoint one time in twenty gets a probability of 0.9, so that edges light up like corners, and no term says where
    the peak must be. Here a label is spread over the four pixels around it, by bilinear shares, and

    - *certainty* is a cross-entropy with a small positive weight, per label:
      (sum_p w_p log(1 / s_p) + sum_p (1 - y_p) log(1 / (1 - s_p)) / positive_weight) / sum_p w_p, with s the sigmoid of
      the logits, y the shares and w the shares times the labels' scores;
    - *position* is the cross-entropy between the softmax over the window of 2 ``radius`` + 1 pixels around a label and
      the label's shares, weighted by the scores (as the peaks of ALIKE, Zhao et al. 2022, but supervised).

    Args:
        logits: heat map before the sigmoid.
        keypoints: labels (x, y, score) with subpixel positions; score 0 means no label.
        mask: weight of each pixel in [0, 1], [b, h, w]; 0 where nothing is known.
        positive_weight: of a label against a pixel without one.
        radius: pixels.
        reduction: of the values of single images.

    Returns:
        certainty and position.
    """
    logits = widen(logits[:, 0])
    mask = mask.to(logits.dtype)
    certainty = _certainty(logits, keypoints, mask, positive_weight)
    everywhere = torch.ones_like(certainty, dtype=torch.bool)
    return reduction(certainty, everywhere), _position(logits, keypoints, mask, radius, reduction)


def _certainty(logits: Tensor, keypoints: Tensor, mask: Tensor, positive_weight: float) -> Float[Tensor, " b"]:
    """The first term of :func:`peak_detection_loss`."""
    batch, height, width = logits.shape
    corner = keypoints[..., :2].floor()
    share = keypoints[..., :2] - corner
    column, row = corner.long().unbind(-1)
    known = (column >= 0) & (row >= 0) & (column < width - 1) & (row < height - 1)
    column, row = column.clamp(0, width - 2), row.clamp(0, height - 2)
    scores = keypoints[..., 2] * known
    shares = torch.stack(
        [
            (1 - share[..., 0]) * (1 - share[..., 1]),
            share[..., 0] * (1 - share[..., 1]),
            (1 - share[..., 0]) * share[..., 1],
            share[..., 0] * share[..., 1],
        ],
        dim=2,
    )
    index = torch.stack([(row + dy) * width + column + dx for dy in (0, 1) for dx in (0, 1)], dim=2).flatten(1)
    labels, weights = (torch.zeros(batch, height * width, device=logits.device) for _ in range(2))
    labels.scatter_add_(1, index, (shares * (scores > 0)[..., None]).flatten(1)).clamp_(max=1)
    weights.scatter_add_(1, index, (shares * scores[..., None]).flatten(1))
    flat, seen = logits.flatten(1), mask.flatten(1)
    weights = weights * seen
    positive = (weights * F.softplus(-flat)).sum(1)
    negative = ((1 - labels) * seen * F.softplus(flat)).sum(1) / positive_weight
    amount = weights.sum(1)
    return (positive + negative) / torch.maximum(amount, seen.sum(1) / 1000).clamp(min=1)


def _position(logits: Tensor, keypoints: Tensor, mask: Tensor, radius: int, reduction: Reduction) -> Float[Tensor, ""]:
    """The second term of :func:`peak_detection_loss`."""
    height, width = logits.shape[1:]
    flat, seen = logits.flatten(1), mask.flatten(1)
    x, y = keypoints[..., :2].round().long().unbind(-1)
    inside = (x >= radius) & (y >= radius) & (x < width - radius) & (y < height - radius)
    x, y = x.clamp(radius, width - 1 - radius), y.clamp(radius, height - 1 - radius)
    steps = torch.arange(-radius, radius + 1, device=logits.device)
    window = ((y[..., None, None] + steps[:, None]) * width + x[..., None, None] + steps).flatten(2)
    around = flat.gather(1, window.flatten(1)).view(window.shape).log_softmax(2)
    from_x = (keypoints[..., 0, None] - x[..., None] - steps).abs()
    from_y = (keypoints[..., 1, None] - y[..., None] - steps).abs()
    wanted = ((1 - from_y).clamp(min=0)[..., :, None] * (1 - from_x).clamp(min=0)[..., None, :]).flatten(2)
    usable = keypoints[..., 2] * inside * seen.gather(1, window.flatten(1)).view(window.shape).amin(2)
    return masked_mean(-(wanted * around).sum(2), usable, reduction)


def excluded_negatives(
    points1: Float[Tensor, "b n 2"], valid: Bool[Tensor, "b n"], *, radius: float = LossConfig.negative_radius
) -> Bool[Tensor, "b n n"]:
    """Which points of the right image must not serve as a negative of which correspondence.

    Args:
        points1: points (x, y) of the right image in pixels; point i belongs to correspondence i.
        valid: whether the correspondence holds.
        radius: pixels; points this close in the right image, including the point itself, are no negatives.

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
    temperature: float = LossConfig.descriptor_temperature,
    margin: float = LossConfig.descriptor_margin,
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
    temperature: float = LossConfig.contrastive_temperature,
    reduction: Reduction = mean_over_images,
) -> Float[Tensor, ""]:
    """Cross-entropy of finding the right point of image 1 by the dot products that matching ranks.

    Not in the paper. The triplet loss compares attention-weighted descriptors by their distance, matching by their dot
    product; this loss trains the dot products themselves: row i of the similarities y0_i . y1_j / temperature,
    with y = attention x descriptor, is a softmax over all points j of image 1, and -log of entry i is its loss. Every
    negative takes part instead of the hardest only, so that it learns from the first step.

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
    form: WscForm = LossConfig.wsc_form,
    margin: float = LossConfig.wsc_margin,
    temperature: float = LossConfig.wsc_temperature,
    background_is_group: bool = LossConfig.background_is_group,
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


def distillation_loss(
    descriptors: Float[Tensor, "b n c"],
    targets: Float[Tensor, "b n c"],
    valid: Bool[Tensor, "b n"],
    *,
    reduction: Reduction = mean_over_images,
) -> Float[Tensor, ""]:
    """How far descriptors are from a teacher's, 1 - cosine, in [0, 2].

    Not in the paper. The targets are those of the view that the teacher saw, however the student's own is warped and
    lit, so that they teach what to tell apart and what not to.

    Args:
        descriptors: unit descriptors of the student.
        targets: the teacher's embedding at the same points, of any norm.
        valid: which points count.

    Raises:
        ValueError: descriptors and targets differ in shape.
    """
    if descriptors.shape != targets.shape:
        raise ValueError(f"descriptors {list(descriptors.shape)} and targets {list(targets.shape)} differ in shape")
    cosine = (widen(descriptors) * F.normalize(widen(targets), dim=-1)).sum(-1)
    return masked_mean(1 - cosine, valid, reduction)


def edge_loss(
    predicted: Float[Tensor, "b 1 h w"],
    target: UInt8[Tensor, "b H W"],
    valid: Bool[Tensor, "b H W"] | None = None,
    *,
    form: EdgeForm = LossConfig.edge_form,
    pooling: EdgePooling = LossConfig.edge_pooling,
    reduction: Reduction = mean_over_images,
) -> Float[Tensor, ""]:
    """Distance between the student's edge map and the teacher's (equation 12).

    Args:
        predicted: edge probability in [0, 1].
        target: teacher's edge strength, 0 (none) to 255, usually at four times the resolution.
        valid: pixels whose target holds; None for all. A cell counts where every target pixel that it reads is valid.
        form: ``mse`` as the released code, or ``l1`` as the paper, but as a mean: the paper's sum over the image would
            outweigh every other loss ten thousandfold.
        pooling: how the target is reduced to the size of ``predicted``: ``bilinear`` without antialias as the released
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
