"""The training objective: network output and batch -> the five terms of eq. 13-14."""

from __future__ import annotations

from torch import Tensor

from samfeat.pipelines.training.batches import Batch
from samfeat.student.losses import (
    CrossEntropyForm,
    LossConfig,
    Reduction,
    contrastive_descriptor_loss,
    descriptor_loss,
    detection_loss,
    distillation_loss,
    edge_loss,
    excluded_negatives,
    mean_over_images,
    peak_detection_loss,
    wsc_loss,
)
from samfeat.student.network import DenseOutput, Sampling, normalise, resize, sample
from samfeat.student.relation import feature_distillation_loss, relation_loss


def losses(
    output: DenseOutput,
    batch: Batch,
    config: LossConfig,
    *,
    sampling: Sampling,
    reduction: Reduction = mean_over_images,
) -> dict[str, Tensor]:
    """Every term with non-zero weight, unweighted; :func:`total` sums them.

    Args:
        output: network output for the 2B images of ``batch``.
        batch: left images first, then right ones.
        config: forms and constants.
        sampling: how descriptors and attention are looked up at points.
        reduction: reduces the values of the images to a scalar; see :mod:`samfeat.student.losses`.

    Returns:
        scalar tensors by name, in the order detection, position, descriptor, distillation, relation, edge, wsc.
    """
    pairs = len(batch.valid)
    points = batch.points.flatten(0, 1)
    size = (batch.images.shape[-2], batch.images.shape[-1])
    terms: dict[str, Tensor] = {}
    if config.detection and config.detection_form == "peaks":
        terms["detection"], terms["position"] = peak_detection_loss(
            output.heatmap,
            batch.keypoints,
            batch.label_mask,
            positive_weight=config.positive_weight,
            reduction=reduction,
        )
    elif config.detection:
        form: CrossEntropyForm = "released" if config.detection_form == "released" else "paper"
        terms["detection"] = _detection(output, batch, config, form, reduction)

    descriptors = normalise(sample(output.descriptors, points, size, convention=sampling))
    attention = sample(output.attention, points, size, convention=sampling).squeeze(-1)
    d0, d1, w0, w1 = descriptors[:pairs], descriptors[pairs:], attention[:pairs], attention[pairs:]
    excluded = excluded_negatives(batch.points[1], batch.valid, radius=config.negative_radius)
    if config.descriptor:
        loss = _descriptor(d0, d1, w0, w1, batch.valid, excluded, config, reduction)
        if config.both_directions:
            reverse = excluded_negatives(batch.points[0], batch.valid, radius=config.negative_radius)
            loss = (loss + _descriptor(d1, d0, w1, w0, batch.valid, reverse, config, reduction)) / 2
        terms["descriptor"] = loss
    if config.distillation:
        valid = batch.valid.repeat(2, 1)
        terms["distillation"] = distillation_loss(descriptors, batch.taught, valid, reduction=reduction)

    if config.relation:
        terms["relation"] = _relation(output, batch, config, reduction)
    if config.edge:
        terms["edge"] = edge_loss(
            output.edges,
            batch.edges,
            batch.supervised,
            form=config.edge_form,
            pooling=config.edge_pooling,
            reduction=reduction,
        )
    if config.wsc:
        terms["wsc"] = _wsc(batch.groups, (d0, d1), (w0, w1), excluded, config, reduction)
    return terms


def total(terms: dict[str, Tensor], config: LossConfig) -> Tensor:
    """The weighted sum of the terms (eq. 14; the paper's weights are all 1); the position shares the detection's."""
    weights = {name: getattr(config, "detection" if name == "position" else name) for name in terms}
    return sum((weights[name] * term for name, term in terms.items()), start=next(iter(terms.values())) * 0)


def _descriptor(
    d0: Tensor,
    d1: Tensor,
    w0: Tensor,
    w1: Tensor,
    valid: Tensor,
    excluded: Tensor,
    config: LossConfig,
    reduction: Reduction,
) -> Tensor:
    if config.descriptor_form == "contrastive":
        temperature = config.contrastive_temperature
        return contrastive_descriptor_loss(
            d0, d1, w0, w1, valid, excluded, temperature=temperature, reduction=reduction
        )
    return descriptor_loss(
        d0,
        d1,
        w0,
        w1,
        valid,
        excluded,
        temperature=config.descriptor_temperature,
        margin=config.descriptor_margin,
        reduction=reduction,
    )


def _wsc(
    groups: Tensor,
    descriptors: tuple[Tensor, Tensor],
    attention: tuple[Tensor, Tensor],
    excluded: Tensor,
    config: LossConfig,
    reduction: Reduction,
) -> Tensor:
    sides = [
        wsc_loss(
            d,
            w,
            g,
            excluded,  # the distances in the right image serve both sides, as in the released code
            form=config.wsc_form,
            margin=config.wsc_margin,
            temperature=config.wsc_temperature,
            background_is_group=config.background_is_group,
            reduction=reduction,
        )
        for d, w, g in zip(descriptors, attention, groups.chunk(2), strict=True)
    ]
    return (sides[0] + sides[1]) / 2


def _relation(output: DenseOutput, batch: Batch, config: LossConfig, reduction: Reduction) -> Tensor:
    features, targets, valid = output.distilled, batch.embedding, batch.supervised
    if config.relation_form == "features":
        return feature_distillation_loss(features, targets, valid=valid, reduction=reduction)
    weights = output.attention if config.relation_form == "eq8" else None
    return relation_loss(features, targets, attention=weights, valid=valid, reduction=reduction)


def _detection(
    output: DenseOutput, batch: Batch, config: LossConfig, form: CrossEntropyForm, reduction: Reduction
) -> Tensor:
    size = batch.labels.shape[-2:]
    maps = [output.heatmap]
    if config.deep_supervision:
        maps += [resize(logits, size) for logits in output.head_logits]
    parts = [
        detection_loss(
            logits,
            batch.labels,
            batch.label_mask,
            positive_weight=config.positive_weight,
            form=form,
            reduction=reduction,
        )
        for logits in maps
    ]
    return sum(parts[1:], start=parts[0]) / len(parts)
