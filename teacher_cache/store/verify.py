"""Check a store against ``teacher_cache/README.md``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from upath import UPath

from samfeat.teacher_cache.schema import MAX_KEYPOINTS, MAX_MASKS
from samfeat.teacher_cache.store.checksums import damaged_files, damaged_metadata
from samfeat.teacher_cache.store.rows import digest, record_of
from samfeat.teacher_cache.store.store import TeacherCache
from samfeat.teacher_cache.store.zarr_arrays import files_of


class Problem(NamedTuple):
    """A problem with an image, or (image -1) with a file or the whole store.

    Attributes:
        image: number of the image, or -1.
        text: one human-readable line.
        shard: number of the shard to rebuild to fix it, or -1.
    """

    image: int
    text: str
    shard: int = -1


def verify_path(path: str | Path | UPath) -> Iterator[Problem | int]:
    """Like :func:`verify`, for a store that may fail to open."""
    where = UPath(path)
    try:
        store = TeacherCache.open(where)
    except (ValueError, OSError) as error:
        damaged = [f"{name} {what}" for name, what in damaged_metadata(files_of(where))]
        yield from (Problem(-1, text) for text in damaged or [str(error)])
        if where.is_dir() and not where.protocol:
            root = Path(str(where))
            listed = root / "done" / "sha256"
            for shard in sorted(int(file.name) for file in listed.glob("*") if file.name.isdecimal()):
                yield from (Problem(-1, f"{name} {what}", shard) for name, what in damaged_files(root, shard))
        return
    yield from verify(store)


def verify(store: TeacherCache) -> Iterator[Problem | int]:
    """Check a whole store; yields the number of every checked image, and every problem found.

    Checked: all shards done; every file as it was written, where the store has digests of files; names unique; digests
    (every stored byte of an image takes part); counts in range; finite values; labels no larger than the number of
    masks; groups and areas agree with the masks; keypoints and correspondences inside their images.
    """
    yield from (Problem(-1, f"{name} {what}") for name, what in damaged_metadata(files_of(store.path)))
    missing, finished = set(store.missing()), store.finished()
    if lost := sorted(missing & finished):
        yield from (Problem(-1, f"done/c/{shard} is damaged or missing", shard) for shard in lost)
    if unfinished := sorted(missing - finished):
        yield Problem(-1, f"{len(unfinished)} of {store.spec.shards} shards are missing: {unfinished[:10]}")
    names: set[str] = set()
    for shard in range(store.spec.shards):
        images = store.spec.shard_range(shard)
        if shard not in missing:
            if store.has_checksums:
                found = damaged_files(Path(str(store.path)), shard)
                yield from (Problem(-1, f"{name} {what}", shard) for name, what in found)
            try:
                yield from _problems_of_shard(store, shard, names)
            except (ValueError, OSError) as error:
                yield Problem(images.start, f"its shard cannot be read: {error}", shard)
        yield from images


def _problems_of_shard(store: TeacherCache, shard: int, names: set[str]) -> Iterator[Problem]:
    """Problems of all images of a shard; adds their names to ``names``."""
    columns = {name: store.column(name, shard).tolist() for name in ("name", "failure", "mask_count", "keypoint_count")}
    rows = zip(store.spec.shard_range(shard), *columns.values(), strict=True)
    for image, name, failure, masks, keypoints in rows:
        if name in names:
            yield Problem(image, f"its name, {name!r}, is not unique", shard)
        names.add(name)
        if not failure:
            try:
                yield from (Problem(image, text, shard) for text in _problems(store, image, masks, keypoints))
            except (ValueError, OSError) as error:
                yield Problem(image, f"cannot be read: {error}", shard)


def _problems(store: TeacherCache, image: int, count: int, keypoints: int) -> Iterator[str]:
    if count > MAX_MASKS or keypoints > MAX_KEYPOINTS:
        yield f"counts out of range: {count} masks, {keypoints} keypoints"
        return
    values = store.stored(image)
    record = record_of(values)
    if digest(values) != store.stored_digest(image):
        yield "the digest differs: the stored bytes have changed since they were written"
    output, (height, width) = record.output, store.spec.image_size
    if not all(np.isfinite(values).all() for values in (output.embedding, record.keypoints, output.masks.table)):
        yield "the embedding, the keypoints or the mask table hold NaN or infinity"
    if output.groups.max(initial=0) > count:
        yield f"groups name mask {output.groups.max()}, there are {count}"
    if not np.array_equal(output.masks.stack.any(axis=0), output.groups > 0):
        yield "groups and masks do not cover the same pixels"
    if not np.array_equal(output.masks.stack.sum(axis=(1, 2)), output.masks.table[:, 0]):
        yield "the areas of the mask table are not those of the masks"
    limits = np.array([width, height]) - 0.5
    if ((record.keypoints[:, :2] < -0.5) | (record.keypoints[:, :2] >= limits)).any():
        yield "a keypoint lies outside the image"
    if store.spec.paired:
        pair = store.pair(image // 2)
        inside = (pair.points >= -0.5) & (pair.points < limits)
        if not np.isfinite(pair.points).all() or not inside[:, pair.valid].all():
            yield "a valid correspondence lies outside its image"
