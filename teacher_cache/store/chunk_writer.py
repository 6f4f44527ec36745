"""Write whole shards of sharded Zarr v3 arrays to local files: the same bytes as zarr writes.

A Zarr library schedules every chunk of a shard by itself; a task of 32 images writes some 500 small ones. Here the
chunks are encoded in one loop and written with their index by one call. ``tests/test_chunk_writer.py`` compares the
files with zarr's, and ``tests/benchmarks/bench_scale.py`` measures the time that a task takes beside its teacher.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numcodecs import blosc, zstd

from samfeat.teacher_cache.schema import LZ4_LEVEL, ZSTD_LEVEL, Codec
from samfeat.teacher_cache.store.chunk_reader import EMPTY, checksum


@dataclass(frozen=True)
class ChunkWriter:
    """The shards of one array of fixed-size items, little-endian, in C order.

    Attributes:
        folder: the array's folder.
        chunk: shape of a chunk.
        order: int [n, axes], coordinates of a shard's chunks in the order of the file.
        grid: chunks per shard along each axis, in the order of the index.
        fill_value: value that completes chunks at the end of an axis.
        codec: see :class:`samfeat.teacher_cache.store.chunk_reader.ChunkReader`.
        omits_empty: whether chunks that hold only the fill value are left out.
    """

    folder: str
    chunk: tuple[int, ...]
    order: np.ndarray
    grid: tuple[int, ...]
    fill_value: int | float | bool
    codec: Codec
    omits_empty: bool

    @property
    def rows(self) -> int:
        """Rows per shard."""
        return self.grid[0] * self.chunk[0]

    def write(self, shard: int, block: np.ndarray) -> None:
        """Write a shard that holds ``block`` from its first item on, and nothing else.

        The file appears under its name when it is complete; without any chunk there is no file.

        Raises:
            OSError: the disk is full or not writable.
        """
        reached = [-(-length // side) for length, side in zip(block.shape, self.chunk, strict=True)]
        index = np.full((*self.grid, 2), EMPTY, "<u8")
        parts: list[bytes] = []
        size = 0
        for place in map(tuple, self.order[(self.order < reached).all(axis=1)].tolist()):
            content = self._encoded(block, place)
            if content is not None:
                index[place] = size, len(content)
                parts.append(content)
                size += len(content)
        if not parts:
            return
        listed = index.tobytes()
        path = Path(f"{self.folder}/c/{shard}" + "/0" * (len(self.grid) - 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        try:
            with partial.open("xb") as file:
                file.writelines([*parts, listed, checksum(listed)])
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _encoded(self, block: np.ndarray, place: tuple[int, ...]) -> bytes | None:
        """One chunk as stored; None if it is left out."""
        first = [at * side for at, side in zip(place, self.chunk, strict=True)]
        values = block[tuple(slice(start, start + side) for start, side in zip(first, self.chunk, strict=True))]
        if values.shape != self.chunk:
            whole = np.full(self.chunk, self.fill_value, block.dtype)
            whole[tuple(map(slice, values.shape))] = values
            values = whole
        if self.omits_empty and not (values != self.fill_value).any():
            return None
        raw = values.tobytes()
        if self.codec == "lz4":
            buffer = blosc.compress(raw, b"lz4hc", LZ4_LEVEL, blosc.NOSHUFFLE, 0, 1)
            return buffer + checksum(buffer)
        return zstd.compress(raw, ZSTD_LEVEL, True) if self.codec == "zstd" else raw
