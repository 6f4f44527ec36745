"""The reader against zarr itself: every array of every kind of store; concurrent, rewritten, damaged in many ways."""

from __future__ import annotations

import dataclasses
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hand_written_stores import SPEC, filled, pair, problems
from toys import PROVENANCE, toy_record
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from samfeat.teacher_cache.schema import Failure, StoreSpec, Targets
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.store.chunks import empty_targets
from samfeat.teacher_cache.store.zarr_arrays import chunk_reader

UNPAIRED = dataclasses.replace(SPEC, images=5, paired=False, shard_images=2)  # the last shard is short
TRAINING = ("image", "embedding", "embedding_scale", "groups", "edges", "keypoints")


def with_failures(path: Path) -> TeacherCache:
    cache = TeacherCache.create(path, dataclasses.replace(UNPAIRED, images=4), PROVENANCE)
    cache.write_shard(0, [toy_record(0, masks=0, keypoints=0), toy_record(1, masks=40)])
    cache.write_shard(1, [Failure("x", "truncated"), Failure("y", "gone")])
    return TeacherCache.open(path)


KINDS = {
    "paired": lambda path: filled(path),
    "unpaired": lambda path: filled(path, UNPAIRED),
    "failures": with_failures,
    "one image": lambda path: filled(path, StoreSpec(1, False, SPEC.image_size, SPEC.embedding, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_chunk_is_what_zarr_reads(tmp_path, kind):
    cache = KINDS[kind](tmp_path / "a.zarr")
    group = zarr.open_group(cache.path, mode="r")
    fixed = {name for name, array in group.arrays() if array.shards and array.dtype.kind != "T"}
    assert set(cache._readers) == fixed
    for name, reader in cache._readers.items():
        array = group[name]
        rows = -(-array.shape[1] // array.chunks[1]) if array.ndim > 1 else 1
        for row in range(array.shape[0]):
            whole = np.asarray(array[row])
            for chunk in range(rows):
                if name == "masks" and chunk * array.chunks[1] >= group["mask_count"][row]:
                    continue  # nobody asks for unused masks, and where a shard has none it has no file
                out = np.empty(array.chunks, array.dtype)
                reader.read(row, out, chunk)
                expected = whole[chunk * array.chunks[1] :][: array.chunks[1]] if array.ndim > 1 else whole
                np.testing.assert_array_equal(out[0], expected, err_msg=f"{name} {row} {chunk}")


def test_masks_of_an_image_without_any_are_an_empty_stack(tmp_path):
    cache = with_failures(tmp_path / "a.zarr")
    assert cache.masks(0).stack.shape == (0, *SPEC.image_size)
    assert cache.masks(1).stack.shape[0] == 40
    assert cache.masks(2).table.shape == (0, 7)


def test_chunks_that_zarr_left_out_are_the_fill_value(tmp_path):
    cache = filled(tmp_path / "a.zarr")
    group = zarr.open_group(cache.path, mode="r+")
    size = (cache.path / "edges/c/0/0/0").stat().st_size
    group["edges"][1] = 0
    assert (cache.path / "edges/c/0/0/0").stat().st_size < size
    assert not cache[1].edges.any()
    np.testing.assert_array_equal(cache[2].edges, toy_record(2).output.edges)


def test_read_into_fills_the_rows_of_a_batch_and_nothing_else(tmp_path):
    cache = filled(tmp_path / "a.zarr")
    batch = empty_targets(cache.spec, 3)
    for array in batch:
        assert array.ctypes.data % 64 == 0
        array[...] = 77
    assert cache.read_into(5, Targets(*(array[1] for array in batch))) == 7
    for name in TRAINING:
        values = getattr(batch, name)
        assert (values[[0, 2]] == 77).all()
        np.testing.assert_array_equal(values[1], zarr.open_group(cache.path, mode="r")[name][5])


def test_few_files_stay_open_and_threads_do_not_mind(tmp_path):
    cache = filled(tmp_path / "a.zarr", dataclasses.replace(UNPAIRED, images=24, shard_images=2))
    expected = [cache[image].image.copy() for image in range(24)]
    reader = dataclasses.replace(cache._readers["image"], files=2, _open={})
    before = len(list(Path("/proc/self/fd").iterdir()))

    def read(row: int) -> np.ndarray:
        out = np.empty((1, *SPEC.image_size, 3), np.uint8)
        reader.read(row, out)
        return out[0]

    order = np.random.default_rng(0).integers(24, size=400).tolist()
    with ThreadPoolExecutor(6) as pool:
        for image, seen in zip(order, pool.map(read, order)):
            np.testing.assert_array_equal(seen, expected[image])
    assert len(reader._open) <= 2 + 6  # threads that open one at the same time may overshoot
    del reader
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_many_threads_read_what_one_reads(tmp_path):
    cache = filled(tmp_path / "a.zarr", dataclasses.replace(UNPAIRED, images=12))
    alone = [cache[image] for image in range(12)]
    fresh = TeacherCache.open(cache.path)
    order = np.random.default_rng(0).integers(12, size=300).tolist()
    with ThreadPoolExecutor(6) as pool:
        for image, targets in zip(order, pool.map(fresh.__getitem__, order)):
            for values, expected in zip(targets, alone[image]):
                np.testing.assert_array_equal(values, expected)


def test_a_shard_that_was_written_again_is_read_again(tmp_path):
    cache = TeacherCache.open(filled(tmp_path / "a.zarr").path, writable=True)
    before, other = cache[1], TeacherCache.open(cache.path)
    np.testing.assert_array_equal(other[1].image, before.image)
    cache.write_shard(0, [toy_record(10 + i, masks=3, keypoints=9) for i in range(4)], [pair(0), pair(1)])
    np.testing.assert_array_equal(other[1].image, before.image)  # whoever has a shard open sees the old one, whole
    given, got = toy_record(11, masks=3, keypoints=9), cache[1]
    assert not np.array_equal(before.image, got.image)
    np.testing.assert_array_equal(got.image, given.image)
    np.testing.assert_array_equal(got.keypoints, given.keypoints)
    np.testing.assert_array_equal(cache.masks(1).stack, given.output.masks.stack)


def in_memory(cache: TeacherCache) -> TeacherCache:
    """The same store where no file is."""
    buffer = default_buffer_prototype().buffer
    files = {
        str(file.relative_to(cache.path)): buffer.from_bytes(file.read_bytes())
        for file in cache.path.rglob("*")
        if file.is_file()
    }
    group = zarr.open_group(MemoryStore(files), mode="r+")
    return TeacherCache(cache.path, group, cache.spec, cache.provenance)


def test_a_store_elsewhere_than_in_files_is_read_through_zarr(tmp_path):
    cache = filled(tmp_path / "a.zarr")
    elsewhere = in_memory(cache)
    shutil.rmtree(cache.path)
    assert not elsewhere._readers
    assert [problem for problem in problems(elsewhere) if problem.image >= 0] == []  # it has no files to check
    for image in range(6):
        given, got = toy_record(image), elsewhere.record(image)
        np.testing.assert_array_equal(got.image, given.image)
        np.testing.assert_array_equal(got.output.masks.stack, given.output.masks.stack)
        np.testing.assert_array_equal(elsewhere[image].keypoints, given.keypoints)
    np.testing.assert_array_equal(elsewhere.pair(1).points, pair(1)[0])


@pytest.mark.parametrize("codec", [zarr.codecs.GzipCodec(), zarr.codecs.BloscCodec(cname="zstd"), None])
def test_only_known_codecs_are_read_without_zarr(tmp_path, codec):
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(4, 6), chunks=(1, 6), shards=(2, 6), dtype="uint16", compressors=codec
    )
    reader = chunk_reader(array, tmp_path)
    assert (reader is None) == (codec is not None)
    whole = zarr.create_array(tmp_path / "b.zarr", shape=(4, 6), chunks=(1, 6), dtype="uint16", compressors=codec)
    assert chunk_reader(whole, tmp_path) is None


def shard_of(cache: TeacherCache, name: str) -> Path:
    """The file of the first shard."""
    return next(file for file in sorted((cache.path / name / "c" / "0").rglob("*")) if file.is_file())


def rewrite_index(file: Path, change) -> None:
    """Change (offset, length) of the first chunk, with a good checksum."""
    data = bytearray(file.read_bytes())
    length = 16 * 4
    entries = list(struct.unpack_from("<2Q", data, len(data) - length - 4))
    struct.pack_into("<2Q", data, len(data) - length - 4, *change(*entries, len(data)))
    data[-4:] = google_crc32c.value(bytes(data[-length - 4 : -4])).to_bytes(4, "little")
    file.write_bytes(bytes(data))


DAMAGES = {
    "is missing": lambda file: file.unlink(),
    "fails its checksum": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "fails its checksum ": lambda file: file.write_bytes(b""),
    "points outside": lambda file: rewrite_index(file, lambda offset, length, size: (size - length + 1, length)),
    "points outside ": lambda file: rewrite_index(file, lambda offset, length, size: (2**64 - 1, length)),
    "chunk": lambda file: rewrite_index(file, lambda offset, length, size: (offset, length - 1)),
    "chunk ": lambda file: rewrite_index(file, lambda offset, length, size: (offset, 3)),
    "chunk  ": lambda file: rewrite_index(file, lambda offset, length, size: (offset + 1, length)),
}


@pytest.mark.parametrize(
    ("name", "message"),
    # one array of each codec; a moved chunk of the right length goes unseen without a checksum: verify has the digest
    [(n, m) for n in ("embedding", "edges", "mask_table") for m in DAMAGES if n == "mask_table" or m != "chunk  "],
)
def test_damage_is_one_clear_error(tmp_path, name, message):
    cache = filled(tmp_path / "a.zarr")
    DAMAGES[message](shard_of(cache, name))
    where = f"a.zarr: array '{name}', image 0: .*{message.strip()}"
    with pytest.raises(ValueError, match=where) as caught:
        cache.stored(0)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=where):
        TeacherCache.open(cache.path).stored(0, (name,))
    assert any(problem.image == 0 for problem in problems(TeacherCache.open(cache.path)))


@pytest.mark.parametrize(("name", "other"), [("groups", "keypoints"), ("mask_table", "pair_points")])
def test_a_good_chunk_of_another_array_is_refused(tmp_path, name, other):
    cache = filled(tmp_path / "a.zarr")
    file, foreign = shard_of(cache, name), shard_of(cache, other).read_bytes()
    offset, length = struct.unpack_from("<2Q", foreign, len(foreign) - (4 if other == "keypoints" else 2) * 16 - 4)
    data, end = file.read_bytes(), 4 * 16 + 4
    file.write_bytes(foreign[offset : offset + length] + data[-end:])
    rewrite_index(file, lambda *_: (0, length))
    with pytest.raises(ValueError, match=rf"array '{name}', image 0: .*it does not hold \d+ bytes"):
        cache.stored(0, (name,))


def test_random_damage_is_found_and_never_breaks_the_program(tmp_path):
    cache = filled(tmp_path / "a.zarr")
    rng = np.random.default_rng(0)
    originals = {file: file.read_bytes() for file in sorted(cache.path.rglob("*")) if file.is_file()}
    data = [file for file in originals if file.name != "zarr.json"]
    metadata = [file for file in originals if file.name == "zarr.json"]
    for turn in range(48):
        file = (metadata if turn % 3 == 0 else data)[rng.integers(len(metadata if turn % 3 == 0 else data))]
        damaged = bytearray(originals[file])
        if rng.random() < 0.8:
            place = int(rng.integers(len(damaged)))
            damaged[place] ^= 1 << int(rng.integers(8))
        else:
            place = int(rng.integers(len(damaged)))
            del damaged[place:]
        file.write_bytes(bytes(damaged))
        try:
            found = [problem.text for problem in problems(TeacherCache.open(cache.path))]
        except (ValueError, OSError) as error:
            found = [str(error)]
        assert found or file in metadata, (file.relative_to(cache.path), place)
        assert not any("\n" in text for text in found), found
        file.write_bytes(originals[file])
    assert problems(TeacherCache.open(cache.path)) == []
