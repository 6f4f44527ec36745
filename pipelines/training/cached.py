"""Where training batches come from: the stores' files, or a copy of them in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import psutil
import torch

from samfeat.teacher_cache.schema import Pair, Targets
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.store.chunk_reader import empty_targets

LOADED_AT_ONCE = 64  # images that InMemory reads at a time, beside its copy
LARGEST_SHARE = 0.9  # of the free memory that a copy may take


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
