"""Read the training data: which items a step takes, and their stored targets, in the stored types.

Every draw depends only on (seed, step, position in the batch), so a resumed run repeats and skips nothing, and several
processes that share a batch read the same batch as one.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import psutil
import torch
from lightning_fabric import Fabric
from torch import Tensor

from samfeat.pipelines.config import Config, DataConfig
from samfeat.pipelines.errors import is_out_of_memory
from samfeat.pipelines.training.pace import LATE
from samfeat.teacher_cache.schema import MAX_KEYPOINTS, POINTS, Pair, Targets
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.store.chunks import empty_targets

PREFETCHED = 2  # batches read ahead
GRID = math.isqrt(POINTS - 1) + 1  # side of the smallest square grid with a cell for every point
CELLS = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), axis=-1).reshape(-1, 2)  # (x, y)
LOADED_AT_ONCE = 64  # images that InMemory reads at a time, beside its copy
LARGEST_SHARE = 0.9  # of the free memory that a copy may take


@dataclass(frozen=True)
class Item:
    """One training item.

    Attributes:
        store: number of the store.
        kind: ``real``: images 2 ``index`` and 2 ``index`` + 1 and their correspondences; ``aligned``: such images of
            one fixed camera, which correspond pixel by pixel; ``synthetic``: an image and its warp.
        index: number of the pair; of the image in stores without pairs.
    """

    store: int
    kind: Literal["real", "aligned", "synthetic"]
    index: int


class RawBatch(NamedTuple):
    """A batch as read, on the host: M images, and B items that refer to two of them each.

    Attributes:
        images: uint8 [M, H, W, 3].
        embedding: int8 [M, C, h, w], in units of ``embedding_scale``.
        embedding_scale: float32 [M, h, w].
        groups: int16 [M, H, W].
        edges: uint8 [M, H, W].
        keypoints: float32 [M, K, 3], (x, y, score).
        keypoint_mask: bool [M, K].
        sides: int64 [2, B], rows of the arrays above: the left and the right image of each item; both sides of a
            synthetic item are the same image.
        points: float32 [2, B, n, 2], correspondences (x, y); side 1 is meaningless for synthetic items.
        valid: bool [B, n].
        synthetic: bool [B].
        planar: bool [B], whether both images correspond pixel by pixel.
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
    planar: Tensor


class BatchPart(NamedTuple):
    """The items of a batch that one process handles: ``start`` to ``stop`` of ``total``."""

    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, total: int, rank: int, processes: int) -> BatchPart:
        """The part of process ``rank`` out of ``processes``; parts differ by at most one item."""
        return cls(total * rank // processes, total * (rank + 1) // processes, total)


class Loader:
    """The batches of a run, by step number.

    Args:
        stores: training data.
        config: configuration of the run.
        held_out: (store, image) to exclude.
        fabric: this process and the number of processes.
        overfit: train on the first batch only.

    Attributes:
        batch_size: items per batch over all processes; fewer than configured if there are not enough.
        part: which items of a batch this process reads.
        steps_per_epoch, steps: steps per epoch and in total.

    Raises:
        ValueError: nothing to train on, more processes than items, or no memory for ``data.in_memory``.
    """

    def __init__(
        self,
        stores: Sequence[TeacherCache],
        config: Config,
        held_out: set[tuple[int, int]],
        fabric: Fabric,
        *,
        overfit: bool,
    ) -> None:
        self._stores, self._config, self._overfit = stores, config, overfit
        self._items = list_items(stores, config.data, held_out)
        self.batch_size = min(config.optimiser.batch_size, len(self._items))
        if self.batch_size == 0:
            raise ValueError("nothing to train on: every image failed in stage one, is held out, or is switched off")
        if self.batch_size < fabric.world_size:
            raise ValueError(f"a batch of {self.batch_size} items cannot be shared by {fabric.world_size} processes")
        self.part = BatchPart.of(self.batch_size, fabric.global_rank, fabric.world_size)
        self.steps_per_epoch = len(self._items) // self.batch_size
        self.steps = config.optimiser.steps or config.optimiser.epochs * self.steps_per_epoch
        self._source: BatchSource = FromDisk(stores)
        if config.data.in_memory != "none":
            device = fabric.device if config.data.in_memory == "device" else torch.device("cpu")
            self._source = InMemory(stores, device)
        self._epoch: tuple[int, list[list[Item]]] = -1, []

    def number(self, step: int) -> int:
        """Number of the batch of a step, which determines its random choices."""
        return 0 if self._overfit else step

    def progress(self, step: int) -> float:
        """Fraction of all steps done before a step, which sets how far the views of a batch widen."""
        return 0.0 if self._overfit else step / self.steps

    def requests(self, step: int) -> Iterator[Callable[[], RawBatch]]:
        """One read request per step, from ``step`` to the last."""
        pieces = max(PREFETCHED, self._config.data.workers) + 2 + LATE
        memory = batch_memory(self._stores[0], 2 * (self.part.stop - self.part.start), pieces)
        for later in range(step, self.steps):
            yield partial(self._read, later, next(memory) if isinstance(self._source, FromDisk) else None)

    def whole_batch(self, step: int) -> RawBatch:
        """The batch of a step, with the parts of all processes, from the stores' files."""
        whole = BatchPart(0, self.batch_size, self.batch_size)
        rngs = item_generators(self._config.run.seed, self.number(step), whole)
        return read_batch(FromDisk(self._stores), self._items_of(step), self._config.data, rngs)

    def names(self, step: int) -> list[str]:
        """Names of the (left) images of a step."""
        return [self._stores[item.store].names[self._left_image(item)] for item in self._items_of(step)]

    def first_images(self, count: int) -> list[tuple[int, int]]:
        """(store, image) of the first training items."""
        return sorted({(item.store, self._left_image(item)) for item in self._items[:count]})

    def _read(self, step: int, memory: Targets | None) -> RawBatch:
        rngs = item_generators(self._config.run.seed, self.number(step), self.part)
        items = self._items_of(step)[self.part.start : self.part.stop]
        return read_batch(self._source, items, self._config.data, rngs, memory)

    def _items_of(self, step: int) -> list[Item]:
        epoch, place = divmod(self.number(step), self.steps_per_epoch)
        known, batches = self._epoch  # read once, since the prefetching threads share this
        if known != epoch:
            batches = epoch_batches(self._items, self.batch_size, epoch, self._config.run.seed)
            self._epoch = epoch, batches
        return batches[place]

    def _left_image(self, item: Item) -> int:
        return 2 * item.index if self._stores[item.store].spec.paired else item.index


def list_items(stores: Sequence[TeacherCache], data: DataConfig, held_out: set[tuple[int, int]]) -> list[Item]:
    """All items of an epoch: every good pair once as ``real`` and once as ``synthetic``, every photograph once.

    Args:
        stores: complete stores.
        data: which kinds to use.
        held_out: (store, image) to leave out.
    """
    items = []
    for number, store in enumerate(stores):
        bad = set(store.failures) | {image for which, image in held_out if which == number}
        aligned = store.provenance.source["kind"] == "aligned"
        units = range(store.spec.pairs) if store.spec.paired else range(len(store))
        for unit in units:
            if (bad & {2 * unit, 2 * unit + 1}) if store.spec.paired else unit in bad:
                continue
            if store.spec.paired and data.real_pairs:
                items.append(Item(number, "aligned" if aligned and data.views.size else "real", unit))
            if data.synthetic_pairs:
                items.append(Item(number, "synthetic", unit))
    return items


def epoch_batches(items: Sequence[Item], batch_size: int, epoch: int, seed: int) -> list[list[Item]]:
    """The batches of one epoch: shuffled, without an incomplete last one; a function of (epoch, seed)."""
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(items))
    usable = len(items) // batch_size * batch_size
    return [[items[i] for i in part] for part in order[:usable].reshape(-1, batch_size)]


def item_generators(seed: int, step: int, part: BatchPart) -> list[np.random.Generator]:
    """One generator of random numbers for each item of a part of a step's batch."""
    return [np.random.default_rng([seed, step, 1, place]) for place in range(part.start, part.stop)]


class BatchSource(Protocol):
    """A source of batches: the stores themselves (:class:`FromDisk`), or a copy of them in memory."""

    def pair(self, store: int, pair: int) -> Pair:
        """Images and correspondences of a stored pair."""
        ...

    def is_paired(self, store: int) -> bool:
        """Whether the images of a store come in pairs."""
        ...

    def read(self, images: Sequence[tuple[int, int]], memory: Targets | None) -> tuple[Targets, np.ndarray]:
        """Targets of (store, image), stacked, and the number of keypoints of each; ``memory`` may hold the result.

        ``keypoints`` is a NumPy array; the others are NumPy arrays or tensors on a device.
        """
        ...


@dataclass(frozen=True)
class FromDisk:
    """Batches read from the stores' files."""

    stores: Sequence[TeacherCache]

    def pair(self, store: int, pair: int) -> Pair:
        """See :class:`BatchSource`."""
        return self.stores[store].pair(pair)

    def is_paired(self, store: int) -> bool:
        """See :class:`BatchSource`."""
        return self.stores[store].spec.paired

    def read(self, images: Sequence[tuple[int, int]], memory: Targets | None) -> tuple[Targets, np.ndarray]:
        """See :class:`BatchSource`."""
        if memory is None:
            memory = empty_targets(self.stores[images[0][0]].spec, len(images))
        targets = Targets(*(array[: len(images)] for array in memory))
        counts = np.empty(len(images), np.int64)
        for row, (store, image) in enumerate(images):
            counts[row] = self.stores[store].read_into(image, Targets(*(array[row] for array in targets)))
        return targets, counts


class InMemory:
    """A copy of the training data, in host memory or on a device; no files are read afterwards.

    Args:
        stores: complete stores with equal image and embedding sizes.
        device: where images and targets are kept; correspondences and keypoints stay on the host.
        progress: called with (done, total) images while the copy is made.

    Raises:
        ValueError: it does not fit into the free memory, or a store is damaged.
    """

    def __init__(
        self,
        stores: Sequence[TeacherCache],
        device: torch.device,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._stores = stores
        lengths = [len(store) for store in stores]
        self._first = np.cumsum([0, *lengths])
        total, spec = int(self._first[-1]), stores[0].spec
        chunk = empty_targets(spec, min(LOADED_AT_ONCE, total))
        self._check(total * sum(array[0].nbytes for array in chunk), device)
        self._counts = np.empty(total, np.int64)
        self._keypoints = np.empty((total, *chunk.keypoints.shape[1:]), chunk.keypoints.dtype)
        self._arrays = {
            name: torch.empty((total, *array.shape[1:]), dtype=_tensor(array).dtype, device=device)
            for name, array in chunk._asdict().items()
            if name != "keypoints"
        }
        images = [(store, image) for store, length in enumerate(lengths) for image in range(length)]
        with ThreadPoolExecutor(thread_name_prefix="samfeat-reader") as pool:
            for start in range(0, total, LOADED_AT_ONCE):
                part = images[start : start + LOADED_AT_ONCE]
                counts = pool.map(lambda row, which: self._load(chunk, row, *which), range(len(part)), part)
                stop = start + len(part)
                self._counts[start:stop] = list(counts)
                self._keypoints[start:stop] = chunk.keypoints[: len(part)]
                for name, whole in self._arrays.items():
                    whole[start:stop] = _tensor(getattr(chunk, name)[: len(part)])
                if progress:
                    progress(stop, total)
        self._pairs = [[store.pair(k) for k in range(store.spec.pairs)] for store in stores]

    def pair(self, store: int, pair: int) -> Pair:
        """See :class:`BatchSource`."""
        return self._pairs[store][pair]

    def is_paired(self, store: int) -> bool:
        """See :class:`BatchSource`."""
        return self._stores[store].spec.paired

    def read(self, images: Sequence[tuple[int, int]], memory: Targets | None) -> tuple[Targets, np.ndarray]:
        """See :class:`BatchSource`."""
        rows = np.array([self._first[store] + image for store, image in images])
        arrays: dict[str, Any] = {name: whole[torch.from_numpy(rows)] for name, whole in self._arrays.items()}
        return Targets(keypoints=self._keypoints[rows], **arrays), self._counts[rows]

    def _load(self, chunk: Targets, row: int, store: int, image: int) -> int:
        return self._stores[store].read_into(image, Targets(*(array[row] for array in chunk)))

    @staticmethod
    def _check(needed: int, device: torch.device) -> None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if needed > LARGEST_SHARE * free:
            raise ValueError(
                f"data.in_memory={device.type}: a copy of the stores takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                "are free: leave it at none, which reads the files"
            )


def _tensor(array: np.ndarray) -> torch.Tensor:
    """The array's own memory; uint16 as int16, since torch can index that."""
    return torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)


def batch_memory(store: TeacherCache, images: int, count: int) -> Iterator[Targets]:
    """Memory for batches of ``images`` images: ``count`` buffers used in turn.

    Allocating memory costs more than reading into it. Buffers are overwritten when reused. With a GPU they are
    page-locked, so that copies to the GPU overlap with computation.
    """
    pieces = [empty_targets(store.spec, images) for _ in range(count)]
    if torch.cuda.is_available():
        pieces = [Targets(*(torch.from_numpy(array).pin_memory().numpy() for array in piece)) for piece in pieces]
    return itertools.cycle(pieces)


def read_batch(
    source: BatchSource,
    items: Sequence[Item],
    data: DataConfig,
    rngs: Sequence[np.random.Generator],
    memory: Targets | None = None,
) -> RawBatch:
    """Read the items of one batch, every image once.

    Args:
        source: to read from.
        items: to read.
        data: labels with a lower score than its threshold are ignored.
        rngs: one per item; draws the side of a synthetic item, and the points of its descriptors.
        memory: memory to read into, see :func:`batch_memory`; new memory if None.

    Raises:
        ValueError: a store is damaged.
    """
    sides = np.empty((2, len(items)), np.int64)
    points = np.empty((2, len(items), POINTS, 2), np.float32)
    valid = np.ones((len(items), POINTS), bool)
    images: list[tuple[int, int]] = []
    for place, (item, rng) in enumerate(zip(items, rngs, strict=True)):
        sides[:, place] = len(images)
        if item.kind != "synthetic":
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
        keypoints=torch.from_numpy(targets.keypoints),
        keypoint_mask=torch.from_numpy(stored & (targets.keypoints[..., 2] >= data.label_threshold)),
        sides=torch.from_numpy(sides),
        points=torch.from_numpy(points),
        valid=torch.from_numpy(valid),
        synthetic=torch.from_numpy(np.array([item.kind == "synthetic" for item in items])),
        planar=torch.from_numpy(np.array([item.kind != "real" for item in items])),
    )


def descriptor_points(
    keypoints: np.ndarray, size: tuple[int, int], data: DataConfig, rng: np.random.Generator
) -> np.ndarray:
    """Where descriptors are trained in a synthetic pair: float32 [POINTS, 2], (x, y).

    At most half of the points are detector labels, drawn at random; the others lie in different cells of a square grid,
    so that the descriptors learn flat regions too.

    Args:
        keypoints: the detector's labels, [K, 3], (x, y, score).
        size: (height, width) of the image.
        data: labels with a lower score than its threshold are ignored.
        rng: source of the draws.
    """
    labels = keypoints[keypoints[:, 2] >= data.label_threshold, :2]
    labels = labels[rng.permutation(len(labels))[: POINTS // 2]]
    cells = CELLS[rng.permutation(len(CELLS))[: POINTS - len(labels)]]
    scattered = (cells + rng.random(cells.shape)) * ((np.array(size[::-1]) - 1) / GRID)
    return np.concatenate([labels, scattered]).astype(np.float32)


def read_ahead(requests: Iterable[Callable[[], RawBatch]], workers: int) -> Iterator[RawBatch]:
    """Run read requests in ``workers`` threads, at least ``PREFETCHED`` batches ahead; results in order."""
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


def largest_that_fits(raw: RawBatch, attempt: Callable[[RawBatch], None]) -> int:
    """The largest number of the batch's first items with which ``attempt`` succeeds, by bisection; 0 if not even one.

    Args:
        raw: the batch that did not fit.
        attempt: takes a step with some of its items; raises if there is not enough memory.
    """
    fits, too_many = 0, len(raw.synthetic)
    while too_many - fits > 1:
        tried = (fits + too_many) // 2
        try:
            attempt(first_items(raw, tried))
            fits = tried
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            too_many = tried
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return fits


def first_items(raw: RawBatch, count: int) -> RawBatch:
    """The first items of a batch and their images."""
    images = int(raw.sides[1, count - 1]) + 1
    of_images = {name: getattr(raw, name)[:images] for name in RawBatch._fields[:7]}
    return RawBatch(
        **of_images,
        sides=raw.sides[:, :count],
        points=raw.points[:, :count],
        valid=raw.valid[:count],
        synthetic=raw.synthetic[:count],
        planar=raw.planar[:count],
    )
