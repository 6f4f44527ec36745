"""Cached targets -> training batches.

Reading happens in threads, on uint8 and half-precision arrays as stored; widening, homographies, photometric noise and
the warping of targets happen in batches on the device. Every draw follows from (seed, step), so a resumed run repeats
nothing and skips nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from samfeat.pipelines.config import DataConfig
from samfeat.pipelines.homography import photometric, rasterise, sample_homographies, warp, warp_points, warp_targets
from samfeat.teacher_cache.schema import MAX_KEYPOINTS, POINTS, Targets
from samfeat.teacher_cache.store import TeacherCache

PREFETCHED = 2  # batches that wait for the step


@dataclass(frozen=True)
class Item:
    """One training item.

    Attributes:
        store: number of the store.
        kind: ``real``: images 2 ``index`` and 2 ``index`` + 1 and their correspondences; ``synthetic``: an
            image and its warp.
        index: number of the pair; of the image in stores without pairs.
    """

    store: int
    kind: Literal["real", "synthetic"]
    index: int


class RawBatch(NamedTuple):
    """A batch as read, on the host. Side 0 is left, side 1 right; for synthetic items both sides are the same image.

    Attributes:
        images: uint8 [2, B, H, W, 3].
        embedding: float16 [2, B, C, h, w].
        groups: int32 [2, B, H, W].
        edges: uint8 [2, B, H, W].
        keypoints: float32 [2, B, K, 2], (x, y).
        keypoint_mask: bool [2, B, K].
        points: float32 [2, B, n, 2], correspondences (x, y); side 1 is meaningless for synthetic items.
        valid: bool [B, n].
        synthetic: bool [B].
    """

    images: Tensor
    embedding: Tensor
    groups: Tensor
    edges: Tensor
    keypoints: Tensor
    keypoint_mask: Tensor
    points: Tensor
    valid: Tensor
    synthetic: Tensor


class Batch(NamedTuple):
    """What a training step sees: left images first, then right ones (2B in all).

    Attributes:
        images: float [2B, 3, H, W] in [-1, 1], with photometric noise.
        labels: float [2B, H, W], 1 at detector labels.
        label_mask: float [2B, H, W], 0 where the view shows nothing.
        points: float [2, B, n, 2], correspondences (x, y) in pixels.
        valid: bool [B, n].
        embedding: float [2B, C, h, w], teacher.
        groups: int64 [2B, n], the group of each point; 0 = no mask, -1 = takes no part.
        edges: float [2B, H, W] in [0, 255].
        supervised: bool [2B, H, W], where the teacher's targets hold.
    """

    images: Tensor
    labels: Tensor
    label_mask: Tensor
    points: Tensor
    valid: Tensor
    embedding: Tensor
    groups: Tensor
    edges: Tensor
    supervised: Tensor


def list_items(stores: Sequence[TeacherCache], data: DataConfig, held_out: set[tuple[int, int]]) -> list[Item]:
    """All items of an epoch: every good pair once as ``real`` and once as ``synthetic``, every photograph once.

    Args:
        stores: complete stores.
        data: which kinds to use.
        held_out: (store, image) that take no part.
    """
    items = []
    for number, store in enumerate(stores):
        bad = set(store.failures) | {image for which, image in held_out if which == number}
        units = range(store.spec.pairs) if store.spec.paired else range(len(store))
        for unit in units:
            if (bad & {2 * unit, 2 * unit + 1}) if store.spec.paired else unit in bad:
                continue
            if store.spec.paired and data.real_pairs:
                items.append(Item(number, "real", unit))
            if data.synthetic_pairs:
                items.append(Item(number, "synthetic", unit))
    return items


def epoch_batches(items: Sequence[Item], batch_size: int, epoch: int, seed: int) -> list[list[Item]]:
    """The batches of one epoch: shuffled, the incomplete last one dropped. The same for the same (epoch, seed)."""
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(items))
    usable = len(items) // batch_size * batch_size
    return [[items[i] for i in part] for part in order[:usable].reshape(-1, batch_size)]


def read_batch(
    stores: Sequence[TeacherCache], items: Sequence[Item], data: DataConfig, rng: np.random.Generator
) -> RawBatch:
    """Read the items of one batch from their stores."""
    rows = [_read(stores[item.store], item, data, rng) for item in items]
    stacked = [torch.from_numpy(np.stack(column)) for column in zip(*rows)]
    sided = [column.transpose(0, 1) if column.ndim > 2 else column for column in stacked[:-2]]
    return RawBatch(*sided, *stacked[-2:])


def read_ahead(requests: Iterable[Callable[[], RawBatch]], workers: int) -> Iterator[RawBatch]:
    """Run read requests in ``workers`` threads, a few batches ahead, results in order."""
    if workers < 1:
        yield from (request() for request in requests)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="samfeat-reader")
    waiting: deque[Future[RawBatch]] = deque()
    try:
        for request in requests:
            waiting.append(pool.submit(request))
            if len(waiting) > max(PREFETCHED, workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def make_batch(raw: RawBatch, data: DataConfig, generator: torch.Generator) -> Batch:
    """Widen a batch on the generator's device, warp the synthetic views and their targets, add photometric noise.

    The identity stands in for the homography of real pairs, which it leaves as they are.
    """
    device, count = generator.device, len(raw.synthetic)
    size = (raw.images.shape[2], raw.images.shape[3])
    images, embedding, groups, edges, keypoints, keypoint_mask, points, valid, synthetic = (
        tensor.to(device, non_blocking=True) for tensor in raw
    )
    images = images.permute(0, 1, 4, 2, 3).float()
    embedding, edges = embedding.float(), edges.float()

    homographies = sample_homographies(count, size, generator=generator, config=data.homography)
    copies = torch.rand(count, generator=generator, device=device) < data.identity_probability
    warped_view = synthetic & ~copies
    homographies = torch.where(warped_view[:, None, None], homographies, torch.eye(3, device=device))

    seen = warp_targets(embedding[1], groups[1], edges[1], homographies)
    right_keypoints = warp_points(keypoints[1], homographies)
    right_points = torch.where(synthetic[:, None, None], warp_points(points[0], homographies), points[1])
    valid = valid & _inside(right_points, size)
    unseen = torch.ones_like(seen.valid)
    supervised = seen.valid if data.warp_targets else seen.valid & ~warped_view[:, None, None]

    left_groups = groups_at(groups[0], points[0])
    right_groups = groups_at(seen.groups, right_points).where(valid, -1)
    if not data.warp_targets:
        right_groups = right_groups.where(~warped_view[:, None], -1)

    views = torch.cat([images[0], warp(images[1], homographies)])
    noisy = photometric(views, generator=generator, probability=data.photometric_probability)
    return Batch(
        images=noisy / 127.5 - 1,
        labels=rasterise(torch.cat([keypoints[0], right_keypoints]), keypoint_mask.flatten(0, 1), size),
        label_mask=torch.cat([unseen, seen.valid]).float(),
        points=torch.stack([points[0], right_points]),
        valid=valid,
        embedding=torch.cat([embedding[0], seen.embedding]),
        groups=torch.cat([left_groups, right_groups]),
        edges=torch.cat([edges[0], seen.edges]),
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


def _read(store: TeacherCache, item: Item, data: DataConfig, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """One row of a :class:`RawBatch`, in the order of its fields."""
    if item.kind == "real":
        pair = store.pair(item.index)
        sides = [store[image] for image in pair.images]
        points, valid = pair.points, pair.valid
    else:
        image = 2 * item.index + int(rng.integers(2)) if store.spec.paired else item.index
        sides = [store[image]] * 2
        chosen = descriptor_points(sides[0], data, rng)
        points, valid = np.stack([chosen, chosen]), np.ones(len(chosen), bool)
    labels = [_labels(side, data) for side in sides]
    return (
        *(np.stack([getattr(side, name) for side in sides]) for name in ("image", "embedding")),
        np.stack([side.groups for side in sides]).astype(np.int32),
        np.stack([side.edges for side in sides]),
        np.stack([padded for padded, _ in labels]),
        np.stack([mask for _, mask in labels]),
        points,
        valid,
        np.array(item.kind == "synthetic"),
    )


def descriptor_points(targets: Targets, data: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Where descriptors are trained in a synthetic pair: float32 [POINTS, 2], (x, y).

    Half of the points at most are detector labels, drawn at random; the rest is drawn one a cell of a square grid, so
    that the descriptors learn flat regions, too.
    """
    height, width = targets.image.shape[:2]
    labels = targets.keypoints[targets.keypoints[:, 2] >= data.label_threshold, :2]
    labels = labels[rng.permutation(len(labels))[: POINTS // 2]]
    side = int(np.ceil(np.sqrt(POINTS)))
    cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    cells = cells[rng.permutation(len(cells))[: POINTS - len(labels)]]
    scattered = (cells + rng.random(cells.shape)) * ((np.array([width, height]) - 1) / side)
    return np.concatenate([labels, scattered]).astype(np.float32)


def _labels(targets: Targets, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    kept = targets.keypoints[targets.keypoints[:, 2] >= data.label_threshold, :2]
    padded, mask = np.zeros((MAX_KEYPOINTS, 2), np.float32), np.zeros(MAX_KEYPOINTS, bool)
    padded[: len(kept)], mask[: len(kept)] = kept, True
    return padded, mask
