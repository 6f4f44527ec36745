"""Does a store keep the promises of ``teacher_cache/README.md``?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from samfeat.teacher_cache.rows import digest, record_of
from samfeat.teacher_cache.schema import MAX_KEYPOINTS, MAX_MASKS
from samfeat.teacher_cache.store import TeacherCache


class Problem(NamedTuple):
    """Something that is wrong: with an image, or (image -1) with the whole store."""

    image: int
    text: str


def verify(store: TeacherCache) -> Iterator[Problem | int]:
    """Check a whole store; yields the number of every image when it is through, and every problem found.

    Checked: all shards done; names unique; digests (every stored byte of an image takes part); counts in range; finite
    values; labels no larger than the number of masks; groups and areas agree with the masks; keypoints and
    correspondences inside their images.
    """
    try:
        missing = set(store.missing())
    except ValueError as error:
        yield Problem(-1, str(error))
        return
    if missing:
        yield Problem(-1, f"{len(missing)} of {store.spec.shards} shards are missing: {sorted(missing)[:10]}")
    names: set[str] = set()
    for shard in range(store.spec.shards):
        images = store.spec.shard_range(shard)
        if shard not in missing:
            try:
                yield from _problems_of_shard(store, shard, names)
            except (ValueError, OSError) as error:
                yield Problem(images.start, f"its shard cannot be read: {error}")
        yield from images


def _problems_of_shard(store: TeacherCache, shard: int, names: set[str]) -> Iterator[Problem]:
    """Problems of all images of a shard; adds their names to ``names``."""
    columns = {name: store.column(name, shard).tolist() for name in ("name", "failure", "mask_count", "keypoint_count")}
    rows = zip(store.spec.shard_range(shard), *columns.values(), strict=True)
    for image, name, failure, masks, keypoints in rows:
        if name in names:
            yield Problem(image, f"its name, {name!r}, is not unique")
        names.add(name)
        if not failure:
            try:
                yield from (Problem(image, text) for text in _problems(store, image, masks, keypoints))
            except (ValueError, OSError) as error:
                yield Problem(image, f"cannot be read: {error}")


def _problems(store: TeacherCache, image: int, count: int, keypoints: int) -> Iterator[str]:
    if count > MAX_MASKS or keypoints > MAX_KEYPOINTS:
        yield f"counts out of range: {count} masks, {keypoints} keypoints"
        return
    values = store.stored(image)
    record = record_of(values)
    if digest(values) != store.stored_digest(image):
        yield "the digest differs: the stored bytes have changed since they were written"
    gifts, (height, width) = record.gifts, store.spec.image_size
    if not all(np.isfinite(values).all() for values in (gifts.embedding, record.keypoints, gifts.masks.table)):
        yield "the embedding, the keypoints or the mask table hold NaN or infinity"
    if gifts.groups.max(initial=0) > count:
        yield f"groups name mask {gifts.groups.max()}, there are {count}"
    if not np.array_equal(gifts.masks.stack.any(axis=0), gifts.groups > 0):
        yield "groups and masks do not cover the same pixels"
    if not np.array_equal(gifts.masks.stack.sum(axis=(1, 2)), gifts.masks.table[:, 0]):
        yield "the areas of the mask table are not those of the masks"
    limits = np.array([width, height]) - 0.5
    if ((record.keypoints[:, :2] < -0.5) | (record.keypoints[:, :2] >= limits)).any():
        yield "a keypoint lies outside the image"
    if store.spec.paired:
        pair = store.pair(image // 2)
        inside = (pair.points >= -0.5) & (pair.points < limits)
        if not np.isfinite(pair.points).all() or not inside[:, pair.valid].all():
            yield "a valid correspondence lies outside its image"
