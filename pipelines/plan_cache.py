"""Estimate a run of stage one by processing a few images and discarding the result."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from upath import UPath

from samfeat.pipelines.build_cache import build_cache
from samfeat.pipelines.workers import Workers
from samfeat.teacher_cache.keypoints import LabelConfig
from samfeat.teacher_cache.sources.protocol import ImageSource, SourceItem
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.teachers.protocol import Teacher

WARM_UP = 4  # items that are measured


@dataclass(frozen=True)
class Plan:
    """The work to do and its estimated cost.

    Attributes:
        images: number of images.
        shards: number of shards.
        missing: shards left to make.
        image_bytes: bytes of the store per image, measured.
        image_seconds: seconds per image with one thread of one worker, measured.
        image_flops: floating-point operations of the teacher per image, measured; 0 for teachers without matrix
            products.
    """

    images: int
    shards: int
    missing: int
    image_bytes: float
    image_seconds: float
    image_flops: float

    def __str__(self) -> str:
        flops = f", {self.image_flops / 1e12:.2f} TFLOP each" if self.image_flops else ""
        return (
            f"{self.images} images in {self.shards} shards, {self.missing} of them to make{flops}\n"
            f"{self.image_bytes / 1e6:.2f} MB an image, {self.image_bytes * self.images / 1e9:.3g} GB in all\n"
            f"{1 / self.image_seconds:.3g} images/s by one thread of one worker: "
            f"{timedelta(seconds=round(self.seconds))} in all, divided by what works side by side"
        )

    @property
    def seconds(self) -> float:
        """Remaining time for one thread."""
        return self.image_seconds * self.images * self.missing / self.shards


def make_plan(
    path: str | Path | UPath,
    source: ImageSource,
    teacher: Teacher,
    *,
    labels: LabelConfig | None = None,
    shard_images: int = 32,
) -> Plan:
    """Measure the first usable items of ``source``; the store at ``path`` is only read.

    Raises:
        ValueError: no item of the first few can be used.
    """
    from torch.utils.flop_counter import FlopCounterMode

    per_item = 2 if source.paired else 1
    images = len(source) * per_item
    shards = -(-images // shard_images)
    missing = len(TeacherCache.open(path).missing()) if UPath(path).exists() else shards
    with tempfile.TemporaryDirectory(prefix="samfeat-") as folder:

        def made(name: str, first: int, count: int) -> TeacherCache:
            part = _SourceSlice(source, first, count)
            build_cache(f"{folder}/{name}.zarr", part, teacher, labels=labels, workers=Workers(threads=1))
            cache = TeacherCache.open(f"{folder}/{name}.zarr")
            if len(cache.failures) == len(cache):
                raise ValueError(f"nothing to measure, none of the first images can be used: {cache.failures[0]}")
            return cache

        warm = made("warm", 0, min(WARM_UP, len(source)))
        good = next(image for image in range(len(warm)) if image not in warm.failures)
        with FlopCounterMode(display=False) as counter:  # counts this thread only
            teacher(warm[good].image[None])
        started = time.perf_counter()
        cache = made("measured", 0, min(WARM_UP, len(source)))
        seconds = time.perf_counter() - started
        good = len(cache) - len(cache.failures)
        return Plan(
            images=images,
            shards=shards,
            missing=missing,
            image_bytes=sum(cache.stored_bytes().values()) / good,
            image_seconds=seconds / good,
            image_flops=counter.get_total_flops(),
        )


class _SourceSlice:
    """A few items of a source, as a source."""

    def __init__(self, source: ImageSource, first: int, count: int) -> None:
        self.source, self.first, self.count = source, first, count
        self.paired, self.crop_size = source.paired, source.crop_size

    def __len__(self) -> int:
        return self.count

    def item(self, k: int) -> SourceItem:
        return self.source.item(self.first + k)

    def provenance(self) -> dict[str, Any]:
        return self.source.provenance()
