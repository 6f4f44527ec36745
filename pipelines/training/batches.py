"""Cached targets -> training batches.

Reading happens in threads, from the files straight into the batch, in the types that are stored; widening,
homographies, photometric noise and the warping of targets happen in batches on the device. Every draw follows from
(seed, step, place in the batch), so a resumed run repeats nothing and skips nothing, and several processes that share a
batch make together what one would make.
"""

from __future__ import annotations

import math
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
from samfeat.pipelines.training.cached import Source
from samfeat.teacher_cache.schema import MAX_KEYPOINTS, POINTS, Targets
from samfeat.teacher_cache.store import TeacherCache

PREFETCHED = 2  # batches that wait for the step
GRID = math.isqrt(POINTS - 1) + 1  # side of the least square grid with a cell for every point
CELLS = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), axis=-1).reshape(-1, 2)  # (x, y)


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
    """A batch as read, on the host: M images, and B items that name two of them each.

    Attributes:
        images: uint8 [M, H, W, 3].
        embedding: int8 [M, C, h, w], in units of ``embedding_scale``.
        embedding_scale: float32 [M, h, w].
        groups: int16 [M, H, W].
        edges: uint8 [M, H, W].
        keypoints: float32 [M, K, 2], (x, y).
        keypoint_mask: bool [M, K].
        sides: int64 [2, B], rows of the arrays above: the left and the right image of each item; both sides of a
            synthetic item are the same image.
        points: float32 [2, B, n, 2], correspondences (x, y); side 1 is meaningless for synthetic items.
        valid: bool [B, n].
        synthetic: bool [B].
    """

    images: Tensor
    embedding: Tensor
    embedding_scale: Tensor
    groups: Tensor
    edges: Tensor
    keypoints: Tensor
    keypoint_mask: Tensor
    sides: Tensor
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


class Part(NamedTuple):
    """The items of a batch that one process makes: ``start`` to ``stop`` of ``total``."""

    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, total: int, rank: int, processes: int) -> Part:
        """The part of process ``rank`` out of ``processes``; parts differ by one item at most."""
        return cls(total * rank // processes, total * (rank + 1) // processes, total)


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


def item_generators(seed: int, step: int, part: Part) -> list[np.random.Generator]:
    """One generator of random numbers for each item of a part of a step's batch."""
    return [np.random.default_rng([seed, step, 1, place]) for place in range(part.start, part.stop)]


def read_batch(
    source: Source,
    items: Sequence[Item],
    data: DataConfig,
    rngs: Sequence[np.random.Generator],
    memory: Targets | None = None,
) -> RawBatch:
    """Read the items of one batch, every image once.

    Args:
        source: where from.
        items: what to read.
        data: labels with a lower score than its threshold take no part.
        rngs: one an item; draws the side of a synthetic item, and the points of its descriptors.
        memory: what to read into, see :func:`samfeat.pipelines.training.cached.batch_memory`; new memory where None.

    Raises:
        ValueError: a store is damaged.
    """
    sides = np.empty((2, len(items)), np.int64)
    points = np.empty((2, len(items), POINTS, 2), np.float32)
    valid = np.ones((len(items), POINTS), bool)
    images: list[tuple[int, int]] = []
    for place, (item, rng) in enumerate(zip(items, rngs, strict=True)):
        sides[:, place] = len(images)
        if item.kind == "real":
            pair = source.pair(item.store, item.index)
            points[:, place], valid[place] = pair.points, pair.valid
            sides[1, place] += 1
            images += [(item.store, image) for image in pair.images]
        else:
            image = 2 * item.index + int(rng.integers(2)) if source.is_paired(item.store) else item.index
            images.append((item.store, image))
    targets, counts = source.read(images, memory)
    size = (targets.image.shape[1], targets.image.shape[2])
    for place, (item, rng) in enumerate(zip(items, rngs, strict=True)):
        if item.kind == "synthetic":
            row = sides[0, place]
            points[:, place] = descriptor_points(targets.keypoints[row, : counts[row]], size, data, rng)
    stored = np.arange(MAX_KEYPOINTS) < counts[:, None]
    return RawBatch(
        images=torch.as_tensor(targets.image),
        embedding=torch.as_tensor(targets.embedding),
        embedding_scale=torch.as_tensor(targets.embedding_scale),
        groups=torch.as_tensor(targets.groups).view(torch.int16),
        edges=torch.as_tensor(targets.edges),
        keypoints=torch.from_numpy(targets.keypoints)[..., :2],
        keypoint_mask=torch.from_numpy(stored & (targets.keypoints[..., 2] >= data.label_threshold)),
        sides=torch.from_numpy(sides),
        points=torch.from_numpy(points),
        valid=torch.from_numpy(valid),
        synthetic=torch.from_numpy(np.array([item.kind == "synthetic" for item in items])),
    )


def read_ahead(requests: Iterable[Callable[[], RawBatch]], workers: int) -> Iterator[RawBatch]:
    """Run read requests in ``workers`` threads, ``PREFETCHED`` batches ahead at least, results in order."""
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


def first_items(raw: RawBatch, count: int) -> RawBatch:
    """The first items of a batch, and their images alone."""
    images = int(raw.sides[1, count - 1]) + 1
    of_images = {name: getattr(raw, name)[:images] for name in RawBatch._fields[:7]}
    return RawBatch(
        **of_images,
        sides=raw.sides[:, :count],
        points=raw.points[:, :count],
        valid=raw.valid[:count],
        synthetic=raw.synthetic[:count],
    )


def make_batch(raw: RawBatch, data: DataConfig, generator: torch.Generator, part: Part | None = None) -> Batch:
    """Widen a batch on the generator's device, warp the synthetic views and their targets, add photometric noise.

    The identity stands in for the homography of real pairs, which it leaves as they are.

    Args:
        raw: what was read.
        data: how synthetic views are made.
        generator: source of all draws.
        part: the items are this part of a batch, and get what they would get in the whole; None: they are the whole.
    """
    device, count = generator.device, len(raw.synthetic)
    start, stop, total = part or Part(0, count, count)
    size = (raw.images.shape[1], raw.images.shape[2])
    raw = RawBatch(*(tensor.to(device, non_blocking=True) for tensor in raw))
    points, synthetic, (left, right) = raw.points, raw.synthetic, raw.sides

    homographies = sample_homographies(total, size, generator=generator, config=data.homography)[start:stop]
    copies = torch.rand(total, generator=generator, device=device)[start:stop] < data.identity_probability
    warped_view = synthetic & ~copies
    homographies = torch.where(warped_view[:, None, None], homographies, torch.eye(3, device=device))

    seen = warp_targets(_embedding(raw, right), raw.groups[right].int(), raw.edges[right].float(), homographies)
    right_keypoints = warp_points(raw.keypoints[right], homographies)
    right_points = torch.where(synthetic[:, None, None], warp_points(points[0], homographies), points[1])
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
        rows=None if part is None else torch.cat([own, total + own]),
        drawn=2 * total,
    )
    keypoints = torch.cat([raw.keypoints[left], right_keypoints])
    return Batch(
        images=noisy / 127.5 - 1,
        labels=rasterise(keypoints, raw.keypoint_mask[raw.sides.flatten()], size),
        label_mask=torch.cat([unseen, seen.valid]).float(),
        points=torch.stack([points[0], right_points]),
        valid=valid,
        embedding=torch.cat([_embedding(raw, left), seen.embedding]),
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


def descriptor_points(
    keypoints: np.ndarray, size: tuple[int, int], data: DataConfig, rng: np.random.Generator
) -> np.ndarray:
    """Where descriptors are trained in a synthetic pair: float32 [POINTS, 2], (x, y).

    Half of the points at most are detector labels, drawn at random; the rest is drawn one a cell of a square grid, so
    that the descriptors learn flat regions, too.

    Args:
        keypoints: the detector's labels, [K, 3], (x, y, score).
        size: (height, width) of the image.
        data: labels with a lower score than its threshold take no part.
        rng: source of the draws.
    """
    labels = keypoints[keypoints[:, 2] >= data.label_threshold, :2]
    labels = labels[rng.permutation(len(labels))[: POINTS // 2]]
    cells = CELLS[rng.permutation(len(CELLS))[: POINTS - len(labels)]]
    scattered = (cells + rng.random(cells.shape)) * ((np.array(size[::-1]) - 1) / GRID)
    return np.concatenate([labels, scattered]).astype(np.float32)
