"""What does reading a teacher cache cost? Layouts of the same targets side by side: bytes, single reads, batches of 28.

    python tests/benchmarks/bench_store.py [--images 256] [--rounds 5] [--out bench/store.md]

The classical teacher sees 400 x 400 crops of scikit-image's photographs once; turned and mirrored, with slightly other
embeddings, they fill a store through `TeacherCache.write_shard`. Every layout then holds the values of that store. The
layouts are read in turn, one round after the other, from a warm page cache; the table gives medians. Takes a few
minutes; writes a markdown table.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import skimage.data
import torch
import zarr
from figures import record

from samfeat.pipelines.config import DataConfig
from samfeat.pipelines.training.loader import (
    PREFETCHED,
    BatchPart,
    FromDisk,
    Item,
    batch_memory,
    epoch_batches,
    item_generators,
    read_ahead,
    read_batch,
)
from samfeat.teacher_cache.keypoints import LabelConfig, adapt, opencv_detector
from samfeat.teacher_cache.schema import Masks, Provenance, Record, StoreSpec, Targets, TeacherOutput
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.store.rows import Quantized, quantize
from samfeat.teacher_cache.store.zarr_arrays import CODECS, chunk_reader
from samfeat.teacher_cache.teachers.classical import ClassicalTeacher

SIDE, CELLS, SHARD, BATCH, THREADS = 400, 64, 32, 28, 2
STUDENT_GRID, PICKLES = "embedding on 50 x 50 cells", "pickles of float32 arrays"  # layouts
TARGETS = ("embedding", "embedding_scale", "groups", "edges", "keypoints", "keypoint_count")
PICKLE_BYTES = 4 * 256 * CELLS**2 + 4 * SIDE**2  # MTLDesc's float32 embedding and edges, 4.61 MiB
Read = Callable[[int, Sequence[np.ndarray]], None]  # (image, one array a target to read into)


class Layout(NamedTuple):
    """One way to keep the targets of all images.

    Attributes:
        name: what it is.
        size: bytes of an image.
        items: an array of each target, as it comes out, for one image.
        read: reads the targets of an image into such arrays.
    """

    name: str
    size: float
    items: Sequence[np.ndarray]
    read: Read


def photographs() -> Iterator[np.ndarray]:
    """400 x 400 crops of real photographs, uint8 RGB."""
    left, right, _ = skimage.data.stereo_motorcycle()
    cat = cv2.resize(skimage.data.chelsea(), None, fx=1.4, fy=1.4)
    for image, top, x in (
        (skimage.data.astronaut(), 0, 50),
        (skimage.data.astronaut(), 100, 100),
        (skimage.data.coffee(), 0, 100),
        (skimage.data.rocket(), 20, 150),
        (cat, 10, 100),
        (left, 0, 100),
        (left, 80, 300),
        (right, 50, 50),
        (skimage.data.retina(), 300, 300),
        (skimage.data.hubble_deep_field(), 100, 100),
        (skimage.data.immunohistochemistry(), 50, 50),
    ):
        yield np.ascontiguousarray(image[top : top + SIDE, x : x + SIDE])


def records(count: int) -> Iterator[Record]:
    """Records of the photographs, then of their turned and mirrored copies."""
    teacher, labels = ClassicalTeacher(), LabelConfig()
    seen = [(image, teacher(image[None])[0]) for image in photographs()]
    keypoints = [adapt(image, opencv_detector(labels.detector), labels, seed=k) for k, (image, _) in enumerate(seen)]
    for k in range(count):
        turn, (image, output) = k // len(seen), seen[k % len(seen)]

        def turned(values: np.ndarray, axes: tuple[int, int], turn: int = turn) -> np.ndarray:
            values = np.rot90(values, turn % 4, axes)
            return np.ascontiguousarray(values[::-1] if turn // 4 % 2 and axes == (0, 1) else values)

        def copy(stack: np.ndarray, turn: int = turn) -> np.ndarray:
            return np.stack([turned(plane, (0, 1)) for plane in stack])

        varied = TeacherOutput(
            copy(output.embedding) * np.float32(1 + turn / 100),
            Masks(copy(output.masks.stack), output.masks.table),
            turned(output.groups, (0, 1)),
            turned(output.edges, (0, 1)),
        )
        yield Record(
            f"{k:04}", f"{k:064x}", (0, 0, SIDE, SIDE), turned(image, (0, 1)), varied, keypoints[k % len(seen)]
        )


def write_store(path: Path, count: int) -> tuple[TeacherCache, float, float]:
    """The store, the seconds that writing an image takes, and the peak of memory that writing a shard adds in MiB."""
    spec = StoreSpec(count, paired=False, image_size=(SIDE, SIDE), embedding=(256, CELLS, CELLS), shard_images=SHARD)
    store = TeacherCache.create(path, spec, Provenance({"name": "classical"}, {}, {}, 0))
    source, seconds, peak = records(count), 0.0, 0.0
    for shard in range(spec.shards):
        given = [next(source) for _ in spec.shard_range(shard)]
        if shard == spec.shards - 1:
            tracemalloc.start()
        start = time.perf_counter()
        store.write_shard(shard, given)
        if shard < spec.shards - 1:
            seconds += time.perf_counter() - start
        else:
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
    return TeacherCache.open(path), seconds / (count - len(given)), peak


def rows_of(store: TeacherCache, name: str) -> Iterator[np.ndarray]:
    """One target of every image, as the store gives it."""
    group = zarr.open_group(store.path, mode="r")
    for image in range(len(store)):
        yield np.asarray(group[name][image])


def write_arrays(folder: Path, columns: dict[str, tuple[Iterator[np.ndarray], str]], count: int) -> zarr.Group:
    """Typed arrays, one chunk an image, SHARD images a shard, each with its codec."""
    group = zarr.create_group(folder, zarr_format=3)
    for name, (rows, codec) in columns.items():
        first, array = True, None
        for start in range(0, count, SHARD):
            block = np.stack([next(rows) for _ in range(min(SHARD, count - start))])
            if first:
                shape = block.shape[1:]
                array = group.create_array(
                    name,
                    shape=(count, *shape),
                    chunks=(1, *shape),
                    shards=(SHARD, *shape),
                    dtype=block.dtype,
                    compressors=CODECS[codec],
                )
                array, first = array.with_config({"write_empty_chunks": True}), False
            array[start : start + len(block)] = block
    return group


def by_reader(name: str, group: zarr.Group, names: Sequence[str] = TARGETS) -> Layout:
    """Arrays of a group, read by our reader."""
    readers = [chunk_reader(group[target], group.store.root) for target in names]

    def read(image: int, out: Sequence[np.ndarray]) -> None:
        for reader, array in zip(readers, out):
            reader.read(image, array)

    return Layout(name, stored_bytes(group, names), like(group, names), read)


def by_zarr(name: str, group: zarr.Group, names: Sequence[str] = TARGETS) -> Layout:
    """Arrays of a group, read by zarr one after the other."""
    arrays = [group[target] for target in names]

    def read(image: int, out: Sequence[np.ndarray]) -> None:
        for array, values in zip(arrays, out):
            values[...] = array[image]

    return Layout(name, stored_bytes(group, names), like(group, names), read)


def like(group: zarr.Group, names: Sequence[str]) -> list[np.ndarray]:
    """One image's array of each name."""
    return [np.empty(group[name].shape[1:] or (1,), group[name].dtype) for name in names]


def stored_bytes(group: zarr.Group, names: Sequence[str]) -> float:
    """Bytes of an image on disk."""
    files = (file for name in names for file in (group.store.root / name).rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files) / group[names[0]].shape[0]


def layouts(store: TeacherCache, folder: Path) -> list[Layout]:
    """The layouts; all but the pickles and the half-precision store give the same values."""
    count, own = len(store), zarr.open_group(store.path, mode="r")

    def columns(**codecs: str) -> dict[str, tuple[Iterator[np.ndarray], str]]:
        return {name: (rows_of(store, name), codecs.get(name, "none")) for name in TARGETS}

    raw = write_arrays(folder / "raw.zarr", columns(), count)
    small = write_arrays(folder / "zstd.zarr", columns(groups="zstd", edges="zstd", keypoints="zstd"), count)
    fast = {"groups": "lz4", "keypoints": "lz4"}
    edges = write_arrays(folder / "edges.zarr", columns(**fast, edges="lz4"), count)

    def half() -> Iterator[np.ndarray]:
        for image in range(count):
            targets = store[image]
            yield (targets.embedding * targets.embedding_scale).astype(np.float16)

    def joined() -> Iterator[np.ndarray]:
        sources = [rows_of(store, name) for name in TARGETS]
        for parts in zip(*sources):
            yield np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])

    version1 = columns(groups="zstd", edges="zstd", keypoints="zstd", keypoint_count="zstd")
    version1["embedding"] = (half(), "none")
    del version1["embedding_scale"]
    old = write_arrays(folder / "half.zarr", version1, count)
    grid = columns(**fast, edges="none")
    pooled = [on_student_grid(store[image]) for image in range(count)]
    grid["embedding"] = (iter([embedding.values for embedding in pooled]), "none")
    grid["embedding_scale"] = (iter([embedding.scale for embedding in pooled]), "none")
    small_grid = write_arrays(folder / "grid.zarr", grid, count)
    opaque = write_arrays(folder / "record.zarr", {"record": (joined(), "none")}, count)
    record = opaque["record"].shape[1:]
    mapped = np.memmap(folder / "record.bin", np.uint8, "w+", shape=(count, *record))
    for image, values in enumerate(joined()):
        mapped[image] = values
    mapped = np.memmap(folder / "record.bin", np.uint8, "r", shape=(count, *record))

    def read_mapped(image: int, out: Sequence[np.ndarray]) -> None:
        np.copyto(out[0], mapped[image])

    pickled = []
    for image in range(min(count, 64)):
        targets, stream = store[image], io.BytesIO()
        dense = targets.embedding * targets.embedding_scale
        edge = targets.edges.astype(np.float32)
        np.save(
            stream, np.array({"embedding": dense, "edge": edge, "groups": targets.groups}, object), allow_pickle=True
        )
        path = folder / f"{image}.npy"
        path.write_bytes(stream.getvalue())
        pickled.append(path)

    def read_pickle(image: int, out: Sequence[np.ndarray]) -> None:
        values = np.load(pickled[image % len(pickled)], allow_pickle=True).item()
        for array, name in zip(out, ("embedding", "edge", "groups")):
            array[...] = values[name]

    names = [name for name in TARGETS if name != "embedding_scale"]
    return [
        by_reader("**this format, our reader**", own),
        by_zarr("this format, zarr array by array", own),
        Layout("memmap of one record an image", record[0], [np.empty(record, np.uint8)], read_mapped),
        by_reader("one opaque uncompressed record, our reader", opaque, ["record"]),
        by_zarr("one opaque uncompressed record, zarr", opaque, ["record"]),
        by_reader("nothing compressed, our reader", raw),
        by_zarr("nothing compressed, zarr array by array", raw),
        by_reader("edges in lz4, our reader", edges),
        by_reader("zstd instead of lz4, our reader", small),
        by_zarr("format version 1 (float16, zstd), zarr array by array", old, names),
        by_reader("format version 1 (float16, zstd), our reader", old, names),
        by_reader(f"{STUDENT_GRID}, our reader", small_grid),
        Layout(
            PICKLES,
            pickled[0].stat().st_size,
            [np.empty((256, CELLS, CELLS), np.float32), np.empty((SIDE, SIDE), np.float32), like(own, ["groups"])[0]],
            read_pickle,
        ),
    ]


def on_student_grid(targets: Targets) -> Quantized:
    """The embedding on the cells of a student of stride 8."""
    dense = torch.from_numpy(targets.embedding * targets.embedding_scale)[None]
    return quantize(torch.nn.functional.interpolate(dense, (SIDE // 8, SIDE // 8), mode="bilinear")[0].numpy())


def aligned(count: int, array: np.ndarray) -> np.ndarray:
    """Memory for ``count`` such arrays, from a multiple of 64 bytes on, as the loader's is."""
    memory = np.empty(count * array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + count * array.nbytes].view(array.dtype).reshape(count, *array.shape)


def single(layout: Layout, order: np.ndarray) -> float:
    """Images a second, read one by one in that order."""
    views = [aligned(1, array)[0] for array in layout.items]
    start = time.perf_counter()
    for image in order.tolist():
        layout.read(image, views)
    return len(order) / (time.perf_counter() - start)


def batches(layout: Layout, order: np.ndarray) -> float:
    """Images a second, BATCH at a time into fresh memory, in THREADS threads."""

    def one(part: np.ndarray) -> None:
        memory = [aligned(BATCH, array) for array in layout.items]
        for place, image in enumerate(part.tolist()):
            layout.read(image, [array[place] for array in memory])

    parts = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
    with ThreadPoolExecutor(THREADS) as pool:
        start = time.perf_counter()
        list(pool.map(one, parts))
        return parts.size / (time.perf_counter() - start)


def loader(store: TeacherCache, workers: int, seed: int) -> tuple[float, float]:
    """Images a second through the trainer's own loader, images and all, and the processor's microseconds an image."""
    items = [Item(0, "synthetic", image) for image in range(len(store))]
    chosen = [part for epoch in range(4) for part in epoch_batches(items, BATCH, epoch, seed)]
    memory = batch_memory(store, BATCH, max(PREFETCHED, workers) + 2)
    rngs = item_generators(seed, 0, BatchPart(0, BATCH, BATCH))
    requests = [partial(read_batch, FromDisk([store]), part, DataConfig(), rngs, next(memory)) for part in chosen]
    wall, busy = time.perf_counter(), time.process_time()
    count = sum(len(raw.images) for raw in read_ahead(requests, workers))
    return count / (time.perf_counter() - wall), 1e6 * (time.process_time() - busy) / count


def main() -> None:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench/store.md"))
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="bench-store-"))
    try:
        lines, figures = measure(folder, arguments.images, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    record(figures, beside=arguments.out)


def measure(folder: Path, images: int, rounds: int) -> tuple[list[str], dict[str, float]]:
    """The lines of the report, and its figures."""
    store, seconds, peak = write_store(folder / "own.zarr", images)
    tried = layouts(store, folder)
    rng, figures = np.random.default_rng(0), [([], []) for _ in tried]
    loads: dict[int, list[tuple[float, float]]] = {0: [], THREADS: []}
    for turn in range(rounds):
        for layout, (alone, together) in zip(tried, figures):
            order = rng.permutation(images)
            alone.append(single(layout, order[:64]))
            together.append(batches(layout, order if "zarr" not in layout.name else order[:56]))
        for workers, found in loads.items():
            found.append(loader(store, workers, turn))
    lines = ["| layout of the targets | KiB / image | single, images/s | batch 28, images/s |", "|---|---|---|---|"]
    for layout, found in zip(tried, figures):
        alone, together = (statistics.median(values) for values in found)
        lines.append(f"| {layout.name} | {layout.size / 1024:.0f} | {alone:,.0f} | {together:,.0f} |")
    sizes = {name: size / images for name, size in store.stored_bytes().items()}
    ours, zarrs, mapped = (statistics.median(found[0]) for found in figures[:3])
    targets = sum(sizes[name] for name in TARGETS)
    whole = sum(sizes.values())
    lines += ["", f"- single reads: {ours / zarrs:.1f} x zarr array by array, {ours / mapped:.2f} x memmap"]
    for workers, found in loads.items():
        rate, busy = (statistics.median(values) for values in zip(*found))
        lines.append(
            f"- loader with images, {workers} threads: {rate:,.0f} images/s, {busy:.0f} us of processor an image"
        )
    lines += [
        f"- bytes an image: targets {targets / PICKLE_BYTES:.3f}, all but the image "
        f"{(whole - sizes['image']) / PICKLE_BYTES:.3f}, everything {whole / PICKLE_BYTES:.3f} of the pickles",
        f"- write_shard: {1000 * seconds:.0f} ms an image, {peak:.0f} MiB of memory for {SHARD} images",
        "- KiB an image: " + ", ".join(f"{name} {size / 1024:.1f}" for name, size in sizes.items() if size > 512),
    ]
    print(*lines, sep="\n", flush=True)
    reads = {layout.name: statistics.median(alone) for layout, (alone, _) in zip(tried, figures)}
    small = next(layout.size for layout in tried if layout.name.startswith(STUDENT_GRID))
    return lines, {
        "store, beside zarr": ours / zarrs,
        "store, beside pickles": ours / reads[PICKLES],
        "store, beside memmap": ours / mapped,
        "store, size": (whole - sizes["image"]) / PICKLE_BYTES,
        "store, size on the student's grid": small / PICKLE_BYTES,
        "loader": statistics.median(rate for rate, _ in loads[THREADS]),
    }


if __name__ == "__main__":
    main()
