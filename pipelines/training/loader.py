"""Choose the items of each training step, and read this process's part of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from lightning_fabric import Fabric

from samfeat.pipelines.config import Config
from samfeat.pipelines.training.batches import (
    PREFETCHED,
    BatchPart,
    Item,
    RawBatch,
    epoch_batches,
    item_generators,
    list_items,
    read_batch,
)
from samfeat.pipelines.training.cached import BatchSource, FromDisk, InMemory, batch_memory
from samfeat.pipelines.training.pace import LATE
from samfeat.teacher_cache.schema import Targets
from samfeat.teacher_cache.store import TeacherCache


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
