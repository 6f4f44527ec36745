"""Make training batches from stored targets: views of the images, and their targets seen in these views.

Conversion to float, homographies, photometric noise and the warping of targets run on the device, one batch at a time.
Every draw depends only on the generator and the position in the batch, so several processes that share a batch make the
same batch as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from samfeat.pipelines.config import DataConfig
from samfeat.pipelines.homography import (
    photometric,
    rasterise,
    relight,
    sample_homographies,
    sample_views,
    warp,
    warp_points,
    warp_smoothly,
    warp_targets,
)
from samfeat.pipelines.training.loader import BatchPart, RawBatch
from samfeat.student.detection import window_max
from samfeat.student.network import sample
from samfeat.teacher_cache.schema import POINTS


class Batch(NamedTuple):
    """Input of a training step: left images first, then right ones (2B in total).

    Attributes:
        images: float [2B, 3, H, W] in [-1, 1], with photometric noise.
        labels: float [2B, H, W], 1 at detector labels.
        keypoints: float [2B, K, 3], detector labels (x, y, score), unrounded; score 0 stands for none.
        label_mask: float [2B, H, W], 0 where the view shows nothing.
        points: float [2, B, n, 2], correspondences (x, y) in pixels.
        valid: bool [B, n].
        embedding: float [2B, C, h, w], teacher.
        taught: float [2B, n, C], the teacher's embedding at the points, looked up where they lie in the stored crops.
        groups: int64 [2B, n], the group of each point; 0 = no mask, -1 = takes no part.
        edges: float [2B, H, W] in [0, 255].
        supervised: bool [2B, H, W], where the teacher's targets hold.
    """

    images: Tensor
    labels: Tensor
    keypoints: Tensor
    label_mask: Tensor
    points: Tensor
    valid: Tensor
    embedding: Tensor
    taught: Tensor
    groups: Tensor
    edges: Tensor
    supervised: Tensor


def make_batch(
    raw: RawBatch,
    data: DataConfig,
    generator: torch.Generator,
    part: BatchPart | None = None,
    *,
    progress: float = 1.0,
) -> Batch:
    """Make the views of a batch and their targets, on the generator's device.

    Args:
        raw: what was read.
        data: how views are made: windows onto both images of every item (``data.views.size``), or the left image whole
            and, of synthetic items, its homography.
        generator: source of all draws.
        part: the items are this part of a batch and get the draws they would get in the whole; None: the whole batch.
        progress: share of all training steps that is done.
    """
    count = len(raw.synthetic)
    part = part or BatchPart(0, count, count)
    raw = RawBatch(*(tensor.to(generator.device, non_blocking=True) for tensor in raw))
    if data.views.size:
        return _window_batch(raw, data, generator, part, data.views.strength(progress))
    return _crop_batch(raw, data, generator, part)


@dataclass
class _Draws:
    """Random choices for a part of a batch: drawn for the whole batch, so that every item gets its own in any split."""

    generator: torch.Generator
    part: BatchPart

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), [B, *shape]."""
        start, stop, total = self.part
        return torch.rand(total, *shape, generator=self.generator, device=self.generator.device)[start:stop]

    def pick(self, points: Tensor, usable: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """``number`` of points [B, n, 2], drawn from the usable ones as far as these last, and which are usable."""
        chosen = (self.uniform(points.shape[1]) + usable).topk(number, dim=1).indices
        return points.gather(1, chosen[:, :, None].expand(-1, -1, 2)), usable.gather(1, chosen)


def _window_batch(
    raw: RawBatch, data: DataConfig, generator: torch.Generator, part: BatchPart, strength: float
) -> Batch:
    """A window onto each image of every item, around a point that both show."""
    draws, (start, stop, total), side = _Draws(generator, part), part, data.views.size
    size, window = (raw.images.shape[1], raw.images.shape[2]), (side, side)
    rows, labels = raw.sides.flatten(), raw.keypoints * raw.keypoint_mask[:, :, None]

    homographies = sample_views(
        _window_centres(raw, labels[raw.sides[0]], size, draws),
        size,
        generator=generator,
        config=data.views,
        strength=strength,
        rows=slice(start, stop),
        drawn=total,
    )
    points, valid = _window_points(raw, labels[raw.sides[0]], homographies, size, window, draws)

    both, embedding = homographies.flatten(0, 1), _embedding(raw, rows)
    stored = warp_points(points.flatten(0, 1), torch.linalg.inv(both.double()).float())
    targets = warp_targets(
        embedding,
        raw.groups[rows].int(),
        raw.edges[rows].float(),
        both,
        canvas=window,
        cells=(side // 8, side // 8),
    )
    keypoints = torch.cat([warp_points(labels[rows, :, :2], both), labels[rows, :, 2:]], dim=2)
    keypoints = strongest_nearby(keypoints, window)
    own = torch.arange(start, stop, device=raw.images.device)
    images = warp_smoothly(raw.images.permute(0, 3, 1, 2)[rows].float(), both, window)
    images = relight(images, generator=generator, rows=torch.cat([own, total + own]), drawn=2 * total)
    return Batch(
        images=images / 127.5 - 1,
        labels=rasterise(keypoints[..., :2], keypoints[..., 2] > 0, window),
        keypoints=keypoints,
        label_mask=targets.valid.float(),
        points=points,
        valid=valid,
        embedding=targets.embedding,
        taught=sample(embedding, stored, size, convention="exact"),
        groups=groups_at(targets.groups, points.flatten(0, 1)).where(valid.repeat(2, 1), -1),
        edges=targets.edges,
        supervised=targets.valid,
    )


def _window_centres(raw: RawBatch, labels: Tensor, size: tuple[int, int], draws: _Draws) -> Tensor:
    """A point [2, B, 2] of each image that both windows show: a label or any point, a correspondence of real pairs."""
    label, labelled = draws.pick(labels[:, :, :2], labels[:, :, 2] > 0, 1)
    scattered = draws.uniform(1, 2) * (raw.keypoints.new_tensor(size[::-1]) - 1)
    planar = label.where(labelled[:, :, None], scattered)[:, 0]
    which = (draws.uniform(raw.valid.shape[1]) + raw.valid).argmax(1)
    real = raw.points[:, torch.arange(len(which), device=which.device), which]
    return torch.where(raw.planar[None, :, None], planar[None], real)


def _window_points(
    raw: RawBatch,
    labels: Tensor,
    homographies: Tensor,
    size: tuple[int, int],
    window: tuple[int, int],
    draws: _Draws,
) -> tuple[Tensor, Tensor]:
    """Correspondences [2, B, n, 2] of the windows and which of them are valid.

    Half of those of planar items are labels of the left window as far as they last, the others lie anywhere.
    """
    left_labels = warp_points(labels[:, :, :2], homographies[0])
    drawn, seen = draws.pick(left_labels, (labels[:, :, 2] > 0) & _inside(left_labels, window), POINTS // 2)
    anywhere, half = draws.uniform(POINTS, 2) * (window[0] - 1), drawn.shape[1]
    left = torch.cat([drawn.where(seen[:, :, None], anywhere[:, :half]), anywhere[:, half:]], dim=1)
    back = torch.linalg.inv(homographies[0].double())
    across = (homographies[1].double() @ back).float()
    of_crop = warp_points(left, back.float())
    of_pairs = torch.stack([warp_points(raw.points[k], homographies[k]) for k in (0, 1)])
    planar = raw.planar[:, None, None]
    points = torch.stack([left.where(planar, of_pairs[0]), warp_points(left, across).where(planar, of_pairs[1])])
    valid = torch.where(raw.planar[:, None], _inside(of_crop, size), raw.valid)
    return points, valid & _inside(points[0], window) & _inside(points[1], window)


def strongest_nearby(keypoints: Tensor, size: tuple[int, int], *, radius: int = 2) -> Tensor:
    """Keypoints [B, K, 3] (x, y, score) with score 0 if they lie outside or near a better one.

    Args:
        keypoints: at any position; a score of 0 stands for none.
        size: (height, width) of the images.
        radius: pixels in x and in y; labels crowd where a homography shrinks the image.
    """
    height, width = size
    column, row = keypoints[..., :2].round().long().unbind(-1)
    inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
    index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    scores = keypoints[..., 2] * inside
    best = torch.zeros(len(keypoints), height * width, device=keypoints.device).scatter_reduce(1, index, scores, "amax")
    around = window_max(best.view(-1, height, width), radius).flatten(1)
    kept = scores * (scores == around.gather(1, index))
    return torch.cat([keypoints[..., :2], kept[..., None]], dim=2)


def _crop_batch(raw: RawBatch, data: DataConfig, generator: torch.Generator, part: BatchPart) -> Batch:
    """The whole left image; on the right the homography of synthetic items, or the other image of real ones."""
    start, stop, total = part
    device, size = generator.device, (raw.images.shape[1], raw.images.shape[2])
    points, synthetic, (left, right) = raw.points, raw.synthetic, raw.sides

    homographies = sample_homographies(total, size, generator=generator, config=data.homography)[start:stop]
    copies = torch.rand(total, generator=generator, device=device)[start:stop] < data.identity_probability
    warped_view = synthetic & ~copies
    homographies = torch.where(warped_view[:, None, None], homographies, torch.eye(3, device=device))

    left_embedding, right_embedding = _embedding(raw, left), _embedding(raw, right)
    seen = warp_targets(right_embedding, raw.groups[right].int(), raw.edges[right].float(), homographies)
    right_keypoints = warp_points(raw.keypoints[right, :, :2], homographies)
    right_points = torch.where(synthetic[:, None, None], warp_points(points[0], homographies), points[1])
    stored = torch.cat([points[0], points[1].where(~synthetic[:, None, None], points[0])])
    valid = raw.valid & _inside(right_points, size)
    unseen = torch.ones_like(seen.valid)
    supervised = seen.valid if data.warp_targets else seen.valid & ~warped_view[:, None, None]

    left_groups = groups_at(raw.groups[left], points[0])
    right_groups = groups_at(seen.groups, right_points).where(valid, -1)
    if not data.warp_targets:
        right_groups = right_groups.where(~warped_view[:, None], -1)

    images = raw.images.permute(0, 3, 1, 2)
    views = torch.cat([images[left].float(), warp(images[right].float(), homographies)])
    own = torch.arange(start, stop, device=device)
    noisy = photometric(
        views,
        generator=generator,
        probability=data.photometric_probability,
        rows=torch.cat([own, total + own]),
        drawn=2 * total,
    )
    keypoints, known = torch.cat([raw.keypoints[left, :, :2], right_keypoints]), raw.keypoint_mask[raw.sides.flatten()]
    scores = raw.keypoints[raw.sides.flatten(), :, 2] * known
    return Batch(
        images=noisy / 127.5 - 1,
        labels=rasterise(keypoints, known, size),
        keypoints=strongest_nearby(torch.cat([keypoints, scores[..., None]], dim=2), size),
        label_mask=torch.cat([unseen, seen.valid]).float(),
        points=torch.stack([points[0], right_points]),
        valid=valid,
        embedding=torch.cat([left_embedding, seen.embedding]),
        taught=sample(torch.cat([left_embedding, right_embedding]), stored, size, convention="exact"),
        groups=torch.cat([left_groups, right_groups]),
        edges=torch.cat([raw.edges[left].float(), seen.edges]),
        supervised=torch.cat([unseen, supervised]),
    )


def groups_at(groups: Tensor, points: Tensor) -> Tensor:
    """Labels int64 [B, n] of a label map [B, H, W] at the pixels nearest to ``points`` [B, n, 2] (clamped)."""
    height, width = groups.shape[-2:]
    x, y = points.round().long().unbind(-1)
    index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    return groups.flatten(1).long().gather(1, index)


def _inside(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether points [.., 2] lie within the outermost pixel centres of an image of ``size`` = (height, width)."""
    limit = points.new_tensor([size[1] - 1, size[0] - 1])
    return ((points >= 0) & (points <= limit)).all(dim=-1)


def _embedding(raw: RawBatch, rows: Tensor) -> Tensor:
    """Embeddings float [B, C, h, w] of some images of the batch."""
    return raw.embedding[rows] * raw.embedding_scale[rows, None]
