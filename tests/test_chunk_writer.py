"""The writer of shards against zarr: the same bytes, for every array of a store and for random shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import LABELS, ToySource, ToyTeacher
from upath import UPath

from samfeat.pipelines.build_cache import build_cache
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.store.zarr_arrays import CODECS, chunk_reader, chunk_writer


@pytest.mark.parametrize("paired", [False, True])
def test_a_store_has_the_bytes_that_zarr_writes(tmp_path, monkeypatch, paired):
    source = ToySource(7, paired=paired)
    build_cache(tmp_path / "own.zarr", source, ToyTeacher(), labels=LABELS, shard_images=4)
    monkeypatch.setattr("samfeat.teacher_cache.store.store.chunk_writer", lambda array, reader: _ByZarr(array))
    build_cache(tmp_path / "zarr.zarr", source, ToyTeacher(), labels=LABELS, shard_images=4)
    own, theirs = (
        {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
        for root in (tmp_path / "own.zarr", tmp_path / "zarr.zarr")
    )
    assert own.keys() == theirs.keys()
    assert [name for name in own if own[name] != theirs[name]] == []
    assert len(TeacherCache.open(tmp_path / "own.zarr")._writers) == 13 + 2 * paired


class _ByZarr:
    def __init__(self, array):
        self.array, self.rows = array, array.shards[0]

    def write(self, shard, block):
        start = shard * self.rows
        if block.size:
            self.array[(slice(start, start + len(block)), *(slice(side) for side in block.shape[1:]))] = block


@st.composite
def arrays(draw):
    axes = draw(st.integers(1, 3))
    chunk = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    grid = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    shard = tuple(c * g for c, g in zip(chunk, grid))
    rows = draw(st.integers(1, 2 * shard[0]))
    covered = (draw(st.integers(1, min(rows, shard[0]))), *(draw(st.integers(1, side)) for side in shard[1:]))
    kind = draw(st.sampled_from(["uint8", "float32", "uint16"]))
    codec = draw(st.sampled_from(list(CODECS)))
    seed, sparse = draw(st.integers(0, 99)), draw(st.booleans())
    return (rows, *shard[1:]), chunk, shard, covered, kind, codec, seed, sparse


@settings(max_examples=60, deadline=None)
@given(arrays())
def test_any_shard_has_the_bytes_that_zarr_writes(tmp_path_factory, case):
    shape, chunk, shard, covered, kind, codec, seed, sparse = case
    block = np.random.default_rng(seed).integers(0, 3, covered).astype(kind)
    files = []
    for own in (False, True):
        folder = tmp_path_factory.mktemp("array")
        array = zarr.open_group(folder, mode="a").create_array(
            "a", shape=shape, chunks=chunk, shards=shard, dtype=kind, compressors=CODECS[codec]
        )
        array = array.with_config({"write_empty_chunks": not sparse})
        if own:
            chunk_writer(array, chunk_reader(array, UPath(folder))).write(0, block)
        else:
            array[tuple(map(slice, covered))] = block
        path = folder / "a" / "c" / Path(*["0"] * len(shape))
        files.append(path.read_bytes() if path.exists() else None)
    assert files[0] == files[1]


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    array = zarr.open_group(tmp_path, mode="a").create_array(
        "a", shape=(4,), chunks=(1,), shards=(4,), dtype="uint8", compressors=None
    )
    array = array.with_config({"write_empty_chunks": True})
    writer = chunk_writer(array, chunk_reader(array, UPath(tmp_path)))
    monkeypatch.setattr("samfeat.teacher_cache.store.chunks.Path.replace", _full)
    with pytest.raises(OSError, match="No space"):
        writer.write(0, np.ones(4, np.uint8))
    assert [path.name for path in (tmp_path / "a").rglob("*") if path.is_file()] == ["zarr.json"]


def _full(*arguments):
    raise OSError(28, "No space left on device")
