"""Stage one: images -> teacher -> cache. One task = one whole shard.

A run may be stopped at any moment: the same command goes on with the shards that are missing, and writes the same bytes
that an undisturbed run would have written, because every random choice follows from the seed and the item's number.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from upath import UPath

from samfeat.pipelines.caching.cluster import Workers, make_shards
from samfeat.teacher_cache.images import ImageSource, SourceItem
from samfeat.teacher_cache.keypoints import Detector, LabelConfig, adapt, opencv_detector
from samfeat.teacher_cache.lock import lock_store
from samfeat.teacher_cache.schema import (
    MAX_KEYPOINTS,
    POINTS,
    Failure,
    Gifts,
    Provenance,
    Record,
    StoreSpec,
    Teacher,
    package_versions,
)
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.verify import Problem, verify

AT_ONCE = 8  # items that are read before the teacher sees them together
WEIGHTS = (".safetensors", ".pt")
RECORDED = ("samfeat", "torch", "segment-anything", "zarr", "numpy", "opencv-python", "scikit-image")

Pairs = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class BuildSummary:
    """What a run of stage one did.

    Attributes:
        path: the store.
        images: images in the store.
        written: images written by this run (the others were there already).
        failures: (name, reason) of every image that could not be used, from this and earlier runs.
    """

    path: UPath
    images: int
    written: int
    failures: list[tuple[str, str]]


def label_detector(base: str) -> Detector:
    """The base detector of the homographic adaptation: an OpenCV detector, or a trained student by its weights."""
    if not base.endswith(WEIGHTS):
        return opencv_detector(base)
    from samfeat.student.extractor import SAMFeat

    student = SAMFeat.from_pretrained(base)

    def detect(image: np.ndarray) -> np.ndarray:
        features = student.extract(image)
        keypoints, scores = (features[name].float().cpu().numpy() for name in ("keypoints", "scores"))
        return np.column_stack([keypoints, scores]).astype(np.float32)

    return detect


def parse_part(text: str) -> tuple[int, int]:
    """``K/N``, K from 1 to N, as (K - 1, N): the part of all shards that one of N runs makes.

    Raises:
        ValueError: it is something else.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"shard {text!r}: give K/N with K from 1 to N, such as 1/8")
    return int(number) - 1, int(count)


def build_cache(
    path: str | Path | UPath,
    source: ImageSource,
    teacher: Teacher,
    *,
    labels: LabelConfig | None = None,
    seed: int = 0,
    shard_images: int = 32,
    workers: Workers | None = None,
    part: tuple[int, int] = (0, 1),
    strict: bool = False,
    repair: bool = False,
    report: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
) -> BuildSummary:
    """Run the teacher over ``source`` and write the store ``path``, or go on with it.

    Args:
        path: the store, ``<folder>/<name>.zarr``, on a disk or at a URL such as ``s3://bucket/<name>.zarr``.
        source: ordered images, see :func:`open_source`.
        teacher: gives the targets.
        labels: how detector labels are made; defaults where None.
        seed: seed of the homographic adaptation.
        shard_images: images of one shard.
        workers: who makes the shards; threads of this process where None.
        part: (k, n): make shards k, k + n, k + 2n, ... only; n runs, on as many machines, fill one store.
        strict: stop at the first image that cannot be used, instead of listing it and going on.
        repair: first check every stored image, and make shards again that hold damaged or skipped ones.
        report: takes one line for people.
        progress: called with (images done, images in all) of this part, from worker threads.

    Raises:
        ValueError: the store belongs to other images, another teacher or other parameters (the differences are named);
            another run is writing it; with ``strict``, an image cannot be used.
        OSError: disk full or not writable. Finished shards stay.
        KeyboardInterrupt: as it came; finished shards stay.
    """
    labels, where = labels or LabelConfig(), UPath(path)
    workers = workers or Workers()
    per_item = 2 if source.paired else 1
    spec = StoreSpec(
        images=len(source) * per_item,
        paired=source.paired,
        image_size=source.crop_size,
        embedding=teacher.embedding_shape(source.crop_size),
        shard_images=min(shard_images, len(source) * per_item),
    )
    described = Provenance(
        teacher=teacher.provenance(),
        source=source.provenance(),
        labels=_label_provenance(labels),
        seed=seed,
        versions=package_versions(*RECORDED),
    )
    mine = range(part[0], spec.shards, part[1])
    where.parent.mkdir(parents=True, exist_ok=True)
    with lock_store(where, part=part, report=report):
        cache = _create_or_continue(where, spec, described)
        if repair:
            _forget_damaged(cache, mine, report)
        missing = sorted(set(cache.missing()) & set(mine))
        counter = _Counter(spec, mine, missing, progress)
        maker = _ShardMaker(str(path), source, teacher, labels, seed, strict, counter.advance if workers.here else None)
        for shard in make_shards(maker, missing, workers, report=report):
            if not workers.here:
                counter.advance(len(spec.shard_range(shard)))
        cache = TeacherCache.open(where)
    failures = [(cache.names[image], reason) for image, reason in cache.failures.items()]
    return BuildSummary(cache.path, len(cache), sum(len(spec.shard_range(shard)) for shard in missing), failures)


class _Counter:
    """Counts the images of a part of a store across worker threads."""

    def __init__(
        self, spec: StoreSpec, shards: range, missing: list[int], progress: Callable[[int, int], None] | None
    ) -> None:
        self.total = sum(len(spec.shard_range(shard)) for shard in shards)
        self.done = self.total - sum(len(spec.shard_range(shard)) for shard in missing)
        self.progress, self.lock = progress, threading.Lock()
        self.advance(0)

    def advance(self, images: int) -> None:
        with self.lock:
            self.done += images
            if self.progress:
                self.progress(self.done, self.total)


class _ShardMaker:
    """Everything that a worker needs to make shards; opens the store and the detector where it is used."""

    def __init__(
        self,
        path: str,
        source: ImageSource,
        teacher: Teacher,
        labels: LabelConfig,
        seed: int,
        strict: bool,
        advance: Callable[[int], None] | None,
    ) -> None:
        self.path, self.source, self.teacher, self.labels, self.seed = path, source, teacher, labels, seed
        self.strict, self.advance, self.stopped = strict, advance, False

    @cached_property
    def cache(self) -> TeacherCache:
        return TeacherCache.open(self.path, writable=True)

    @cached_property
    def detector(self) -> Detector:
        return label_detector(self.labels.detector)

    def stop(self) -> None:
        self.stopped = True

    def __call__(self, shard: int) -> None:
        per_item = 2 if self.source.paired else 1
        images = self.cache.spec.shard_range(shard)
        items = range(images.start // per_item, images.stop // per_item)
        records: list[Record | Failure] = []
        pairs: Pairs = []
        for start in range(items.start, items.stop, AT_ONCE):
            if self.stopped:
                return
            found = [self._read(number) for number in range(start, min(start + AT_ONCE, items.stop))]
            crops = [image for item in found if isinstance(item, SourceItem) for image in item.images]
            gifts = iter(self.teacher(np.stack(crops)) if crops else [])
            for number, item in enumerate(found, start):
                made, pair = self._failed(number, item) if isinstance(item, str) else self._taught(number, item, gifts)
                records += made
                pairs += pair
                if self.advance:
                    self.advance(len(made))
        self.cache.write_shard(shard, records, pairs)

    def _read(self, number: int) -> SourceItem | str:
        """An item of the source, or why it cannot be used."""
        try:
            return self.source.item(number)
        except (ValueError, OSError) as error:
            if self.strict:
                raise
            return str(error)

    def _taught(self, number: int, item: SourceItem, gifts: Iterator[Gifts]) -> tuple[list[Record | Failure], Pairs]:
        """Records of one item and, where it is a pair, its correspondences."""
        records: list[Record | Failure] = []
        for side, image in enumerate(item.images):
            if item.keypoints is not None:
                keypoints = item.keypoints[side]
            else:
                keypoints = adapt(image, self.detector, self.labels, seed=2 * number + side + (self.seed << 32))
            labels = keypoints[:MAX_KEYPOINTS]
            records.append(Record(item.names[side], item.sha256[side], item.boxes[side], image, next(gifts), labels))
        return records, [] if item.points is None or item.valid is None else [(item.points, item.valid)]

    def _failed(self, number: int, reason: str) -> tuple[list[Record | Failure], Pairs]:
        """Places of one item that cannot be used."""
        sides = 2 if self.source.paired else 1
        nothing = (np.zeros((2, POINTS, 2), np.float32), np.zeros(POINTS, bool))
        return [Failure(f"unreadable#{number}.{side}", reason) for side in range(sides)], [nothing] * (sides - 1)


def _forget_damaged(cache: TeacherCache, shards: range, report: Callable[[str], None]) -> None:
    """Take the ``done`` mark from shards with damaged or skipped images."""
    damaged: dict[int, str] = {}
    for found in verify(cache):
        if isinstance(found, Problem) and found.image >= 0:
            damaged.setdefault(found.image // cache.spec.shard_images, f"image {found.image}: {found.text}")
    for shard in sorted(set(shards) - set(cache.missing()) - damaged.keys()):
        skipped = [text for text in cache.column("failure", shard) if text]
        if skipped:
            damaged[shard] = skipped[0]
    for shard in sorted(damaged.keys() & set(shards)):
        report(f"shard {shard} is made again: {damaged[shard]}")
        cache.forget_shard(shard)


def _create_or_continue(path: UPath, spec: StoreSpec, provenance: Provenance) -> TeacherCache:
    if not path.exists():
        try:
            return TeacherCache.create(path, spec, provenance)
        except FileExistsError:
            pass  # another part of the same store was quicker
    TeacherCache.remove_unfinished(path)
    cache = TeacherCache.open(path, writable=True)
    differences = cache.provenance.differences(provenance)
    differences += [
        f"{entry.name}: {getattr(cache.spec, entry.name)} there, {getattr(spec, entry.name)} asked for"
        for entry in fields(StoreSpec)
        if getattr(cache.spec, entry.name) != getattr(spec, entry.name)
    ]
    if differences:
        raise ValueError(
            f"{path} was begun with other settings ({'; '.join(differences)}): repeat them, or choose another --name"
        )
    return cache


def _label_provenance(labels: LabelConfig) -> dict[str, Any]:
    values = asdict(labels)
    if labels.detector.endswith(WEIGHTS):
        values["detector"] = Path(labels.detector).name
        values["detector_sha256"] = hashlib.sha256(Path(labels.detector).read_bytes()).hexdigest()
    return values
