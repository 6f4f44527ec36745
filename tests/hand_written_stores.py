"""Small stores of random records, written a shard at a time without a source or a teacher."""

from __future__ import annotations

import numpy as np
from toys import PROVENANCE, SIZE, toy_record

from samfeat.teacher_cache.schema import POINTS, StoreSpec
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.store.verify import Problem, verify

SPEC = StoreSpec(images=6, paired=True, image_size=SIZE, embedding=(8, 8, 8), shard_images=4)


def pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random points float32 [2, POINTS, 2] (x, y) of a pair, and which of them are valid [POINTS]."""
    rng = np.random.default_rng(seed)
    return (rng.random((2, POINTS, 2)) * 63).astype(np.float32), rng.random(POINTS) < 0.7


def filled(path, spec=SPEC) -> TeacherCache:
    """A complete store of ``toy_record(image)`` and ``pair(number)``."""
    cache = TeacherCache.create(path, spec, PROVENANCE)
    for shard in range(spec.shards):
        images = spec.shard_range(shard)
        pairs = [pair(k) for k in range(images.start // 2, images.stop // 2)] if spec.paired else []
        cache.write_shard(shard, [toy_record(i) for i in images], pairs)
    return TeacherCache.open(path)


def problems(cache: TeacherCache) -> list[Problem]:
    """What ``verify`` finds wrong."""
    return [found for found in verify(cache) if isinstance(found, Problem)]
