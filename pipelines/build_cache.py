"""Stage one: images -> teacher -> cache. One task = one whole shard.

A run may be stopped at any time: the same command then writes the missing shards, with the same bytes as an
uninterrupted run, because every random choice depends only on the seed and the item's number.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from upath import UPath

from samfeat.pipelines.workers import Workers, make_shards
from samfeat.teacher_cache.keypoints import Detector, LabelConfig, adapt, opencv_detector
from samfeat.teacher_cache.schema import (
    MAX_KEYPOINTS,
    POINTS,
    Failure,
    Provenance,
    Record,
    StoreSpec,
    TeacherOutput,
    package_versions,
)
from samfeat.teacher_cache.sources.protocol import ImageSource, ListedSource, SourceItem
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.store.lock import lock_store
from samfeat.teacher_cache.store.repair import forget_damaged, mend_metadata
from samfeat.teacher_cache.teachers.protocol import Teacher

logger = logging.getLogger(__name__)

AT_ONCE = 8  # items passed to the teacher together
WEIGHTS = (".safetensors", ".pt")
KORNIA = "kornia:"
OF_THE_LIST = ("source.number", "source.names_sha256")  # change with the files of a folder
OF_THE_DATA = (*OF_THE_LIST, "source.models.", "source.with_depth.", "images", "shard_images")  # as the above may too
FILE = r"\S*[./\d]\S*"  # a word that may be a file name or a number
NAMED = 3  # files named per reason
RECORDED = ("samfeat", "torch", "segment-anything", "zarr", "numpy", "opencv-python", "scikit-image")

Pairs = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class BuildSummary:
    """The result of a run of stage one.

    Attributes:
        path: the store.
        images: images in the store.
        written: images written by this run (the others already existed).
        failures: (name, reason) of every unusable image, from this and earlier runs.
        passed_over: reasons why pairs were unusable and replaced by others.
    """

    path: UPath
    images: int
    written: int
    failures: list[tuple[str, str]]
    passed_over: list[str]


def choose_labels(base: str, weights: Path | None = None) -> LabelConfig:
    """Choose how labels are made: homographic adaptation of a base detector, or a kornia network's own points.

    Args:
        base: a name of :data:`samfeat.teacher_cache.keypoints.DETECTORS`, the weights of a trained student, or
            ``kornia:aliked``, ``kornia:disk``, ``kornia:xfeat``.
        weights: the authors' file of a kornia network.

    Raises:
        FileNotFoundError, ValueError: the weights are missing, superfluous or unreadable, or no detector has that name.
    """
    if base.startswith(KORNIA):
        if weights is None:
            raise ValueError(f"--labels {base} needs --labels-weights: the file that the network's authors released")
        chosen = LabelConfig(detector=base, weights=str(weights), homographies=0, threshold=0.02, nms_radius=2)
    elif weights is not None:
        raise ValueError(f"--labels-weights belongs to a kornia network: --labels {base} has none of its own")
    else:
        chosen = LabelConfig(detector=base)
    label_detector(chosen)
    return chosen


def label_detector(labels: LabelConfig) -> Detector:
    """The base detector: OpenCV's, a trained student by its weights, or a network of kornia's."""
    base = labels.detector
    extract: Callable[[np.ndarray], Any]
    if base.startswith(KORNIA):
        from samfeat.pipelines.features.peers import load_peer

        extract = load_peer(base.removeprefix(KORNIA), labels.weights, max_keypoints=labels.max_keypoints)
    elif base.endswith(WEIGHTS):
        from samfeat.student.extractor import SAMFeat

        extract = SAMFeat.from_pretrained(base).extract
    else:
        return opencv_detector(base)

    def detect(image: np.ndarray) -> np.ndarray:
        features = extract(image)
        keypoints, scores = (torch.as_tensor(features[name]).float().cpu().numpy() for name in ("keypoints", "scores"))
        return np.column_stack([keypoints, scores]).astype(np.float32)

    return detect


def parse_part(text: str) -> tuple[int, int]:
    """Parse ``K/N``, K from 1 to N, as (K - 1, N): the part of all shards made by one of N runs.

    Raises:
        ValueError: the text is malformed.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"part {text!r}: give K/N with K from 1 to N, such as 1/8")
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
    progress: Callable[[int, int], None] | None = None,
) -> BuildSummary:
    """Run the teacher over ``source`` and write the store ``path``, or resume it.

    Args:
        path: the store, ``<folder>/<name>.zarr``, on a disk or at a URL such as ``s3://bucket/<name>.zarr``.
        source: ordered images, see :func:`open_source`.
        teacher: gives the targets.
        labels: how detector labels are made; defaults if None.
        seed: seed of the homographic adaptation.
        shard_images: images per shard.
        workers: workers that make the shards; threads of this process if None.
        part: (k, n): make shards k, k + n, k + 2n, ... only; n runs, on as many machines, fill one store.
        strict: stop at the first unusable image, instead of listing it and continuing.
        repair: first check every stored image, and rebuild shards with damaged or skipped ones.
        progress: called with (images done, total images) of this part, from worker threads.

    Raises:
        ValueError: the store belongs to other images, another teacher or other parameters (the differences are named);
            another run is writing it; with ``strict``, an image cannot be used.
        OSError: disk full or not writable. Finished shards stay.
        KeyboardInterrupt: re-raised; finished shards stay.
    """
    labels, workers = labels or LabelConfig(), workers or Workers()
    for line in getattr(source, "left_out", ()):
        logger.info(line)
    summaries = []
    for store, images in _stores_of(UPath(path), source):
        if images is None:
            summaries.append(_summary(TeacherCache.open(store), 0, []))
            continue
        per_item = 2 if images.paired else 1
        spec = StoreSpec(
            images=len(images) * per_item,
            paired=images.paired,
            image_size=images.crop_size,
            embedding=teacher.embedding_shape(images.crop_size),
            shard_images=min(shard_images, len(images) * per_item),
        )
        described = Provenance(
            teacher=teacher.provenance(),
            source=images.provenance(),
            labels=_label_provenance(labels),
            seed=seed,
            versions=package_versions(*RECORDED),
        )
        maker = _StoreShardMaker(str(store), images, teacher, labels, seed, strict)
        summaries.append(_fill(maker, spec, described, workers, part, repair, progress))
    return summaries[0] if len(summaries) == 1 else _together(summaries)


def grouped(reasons: Iterable[str]) -> list[tuple[str, int]]:
    """Group identical reasons for different files into one line with a few names, and their number."""
    kinds: dict[str, list[str]] = {}
    for reason in reasons:
        kinds.setdefault(re.sub(FILE, "*", reason), []).append(reason)
    lines = []
    for first, *others in kinds.values():
        names = dict.fromkeys(Path(found[0]).name for reason in others if (found := re.search(FILE, reason)))
        shown = ", ".join(list(names)[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        lines.append((f"{first} (the same of {shown})" if names else first, 1 + len(others)))
    return lines


def _stores_of(path: UPath, source: ImageSource) -> list[tuple[UPath, ImageSource | None]]:
    """The stores of a source, and the part of it in each; None if some of that part is gone.

    There is one store, unless photographs were added to a folder after it was finished: these get their own store next
    to it, and so on.

    Raises:
        ValueError: photographs were added or removed while a store is unfinished.
    """
    held: list[tuple[UPath, ImageSource | None]] = []
    rest: ImageSource = source
    place, number = path, 1
    while place.exists() and isinstance(rest, ListedSource):
        try:
            cache = TeacherCache.open(place)
        except ValueError:
            break  # damaged: reported or repaired below
        there, asked = dict(cache.provenance.source), rest.provenance()
        if there == asked or any(there.get(key) != asked[key] for key in asked if f"source.{key}" not in OF_THE_LIST):
            break
        if cache.missing():
            raise ValueError(
                f"{place} is unfinished, and its folder holds other photographs now: put back what was there, and "
                "finish it, or choose another --name"
            )
        names = set(cache.names)
        own = rest.without(set(rest.names) - names)
        if own is not None and own.provenance() == there:
            held.append((place, own))
        else:
            held.append((place, None))
            logger.info(
                f"{place.name}: {len(names - set(rest.names))} of its photographs have gone; their targets stay"
            )
        left = rest.without(names)
        if left is None:
            return held
        number += 1
        rest, place = left, path.with_name(f"{path.stem}-{number}.zarr")
        if not place.exists():
            logger.info(f"new photographs ({len(rest)}): {place.name} is made of them, beside {path.name}")
    return [*held, (place, rest)]


def _summary(cache: TeacherCache, written: int, passed_over: list[str]) -> BuildSummary:
    failures = [(cache.names[image], reason) for image, reason in cache.failures.items()]
    return BuildSummary(cache.path, len(cache), written, failures, passed_over)


def _together(summaries: list[BuildSummary]) -> BuildSummary:
    """The summary of several stores, under the path of the last."""
    return BuildSummary(
        summaries[-1].path,
        sum(each.images for each in summaries),
        sum(each.written for each in summaries),
        [failure for each in summaries for failure in each.failures],
        list(dict.fromkeys(reason for each in summaries for reason in each.passed_over)),
    )


def _fill(
    maker: _StoreShardMaker,
    spec: StoreSpec,
    described: Provenance,
    workers: Workers,
    part: tuple[int, int],
    repair: bool,
    progress: Callable[[int, int], None] | None,
) -> BuildSummary:
    """Make the missing shards of one store."""
    where, mine = UPath(maker.path), range(part[0], spec.shards, part[1])
    where.parent.mkdir(parents=True, exist_ok=True)
    with lock_store(where, part=part):
        if repair and where.exists():
            mend_metadata(where, spec, described)
        cache = _create_or_continue(where, spec, described)
        if repair:
            forget_damaged(cache, mine)
        _forget_outdated(cache, maker.source, mine)
        missing = sorted(set(cache.missing()) & set(mine))
        counter = _StoreProgress(spec, mine, missing, progress)
        maker.advance = counter.advance if workers.here else None
        passed_over: dict[str, None] = {}
        for shard, reasons in make_shards(maker, missing, workers):
            passed_over |= dict.fromkeys(reasons)
            if not workers.here:
                counter.advance(len(spec.shard_range(shard)))
        cache = TeacherCache.open(where)
    return _summary(cache, sum(len(spec.shard_range(shard)) for shard in missing), list(passed_over))


def _forget_outdated(cache: TeacherCache, source: ImageSource, shards: range) -> None:
    """Clear the ``done`` mark of shards with images that have become usable or have changed."""
    missing, per_item = set(cache.missing()), 2 if source.paired else 1
    for shard in sorted(set(shards) - missing):
        images = cache.spec.shard_range(shard)
        try:
            failures = cache.column("failure", shard)
            changed = _changed(cache, source, shard)
        except ValueError:
            continue  # damaged: --verify lists it, --repair fixes it
        failed = sorted({image // per_item for image, text in zip(images, failures) if text})
        if changed:
            logger.info(f"{changed} has changed: the {len(images)} images of its shard are made again")
        elif usable := next((number for number in failed if _is_usable(source, number)), None):
            logger.info(f"item {usable} can be used now: the {len(images)} images of its shard are made again")
        if changed or usable is not None:
            cache.forget_shard(shard)


def _changed(cache: TeacherCache, source: ImageSource, shard: int) -> str:
    """The first file of a shard that is newer than its targets and has different content; empty if there is none."""
    find = getattr(source, "file_of", None)
    if find is None or cache.path.protocol:
        return ""
    since = cache.finished_at(shard)
    names, digests = cache.column("name", shard), cache.column("source_sha256", shard)
    for name, digest, failure in zip(names, digests, cache.column("failure", shard)):
        file = None if failure else find(str(name))
        if file is None or file.protocol or not file.is_file():
            continue
        status = file.stat()
        newer = max(status.st_mtime, status.st_ctime) >= since
        if newer and hashlib.sha256(file.read_bytes()).digest() != digest.tobytes():
            return str(file)
    return ""


def _is_usable(source: ImageSource, number: int) -> bool:
    try:
        source.item(number)
    except (ValueError, OSError):
        return False
    return True


class _StoreProgress:
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


class _StoreShardMaker:
    """Everything a worker needs to make shards; opens the store and the detector in the worker."""

    def __init__(
        self,
        path: str,
        source: ImageSource,
        teacher: Teacher,
        labels: LabelConfig,
        seed: int,
        strict: bool,
    ) -> None:
        self.path, self.source, self.teacher, self.labels, self.seed = path, source, teacher, labels, seed
        self.strict, self.stopped = strict, False
        self.advance: Callable[[int], None] | None = None

    @cached_property
    def cache(self) -> TeacherCache:
        return TeacherCache.open(self.path, writable=True)

    @cached_property
    def detector(self) -> Detector:
        return label_detector(self.labels)

    def stop(self) -> None:
        self.stopped = True

    def __call__(self, shard: int) -> list[str]:
        per_item = 2 if self.source.paired else 1
        images = self.cache.spec.shard_range(shard)
        items = range(images.start // per_item, images.stop // per_item)
        records: list[Record | Failure] = []
        pairs: Pairs = []
        passed_over: list[str] = []
        for start in range(items.start, items.stop, AT_ONCE):
            if self.stopped:
                return passed_over
            found = [self._read(number) for number in range(start, min(start + AT_ONCE, items.stop))]
            usable = [item for item in found if isinstance(item, SourceItem)]
            passed_over += [reason for item in usable for reason in item.passed_over]
            crops = [image for item in usable for image in item.images]
            outputs = iter(self.teacher(np.stack(crops)) if crops else [])
            for number, item in enumerate(found, start):
                made, pair = (
                    self._failed(number, item) if isinstance(item, str) else self._taught(number, item, outputs)
                )
                records += made
                pairs += pair
                if self.advance:
                    self.advance(len(made))
        self.cache.write_shard(shard, records, pairs)
        return passed_over

    def _read(self, number: int) -> SourceItem | str:
        """An item of the source, or why it cannot be used."""
        try:
            item = self.source.item(number)
        except (ValueError, OSError) as error:
            if self.strict:
                raise
            return str(error)
        if self.strict and item.passed_over:
            raise ValueError(item.passed_over[0])
        return item

    def _taught(
        self, number: int, item: SourceItem, outputs: Iterator[TeacherOutput]
    ) -> tuple[list[Record | Failure], Pairs]:
        """Records of one item and, if it is a pair, its correspondences."""
        records: list[Record | Failure] = []
        for side, image in enumerate(item.images):
            if item.keypoints is not None:
                keypoints = item.keypoints[side]
            else:
                keypoints = adapt(image, self.detector, self.labels, seed=2 * number + side + (self.seed << 32))
            labels = keypoints[:MAX_KEYPOINTS]
            records.append(Record(item.names[side], item.sha256[side], item.boxes[side], image, next(outputs), labels))
        return records, [] if item.points is None or item.valid is None else [(item.points, item.valid)]

    def _failed(self, number: int, reason: str) -> tuple[list[Record | Failure], Pairs]:
        """Failures that take the place of one unusable item."""
        sides = 2 if self.source.paired else 1
        nothing = (np.zeros((2, POINTS, 2), np.float32), np.zeros(POINTS, bool))
        names = [f"unreadable#{number}.{side}" for side in range(sides)]
        if isinstance(self.source, ListedSource):
            names = [self.source.names[number]]
        return [Failure(name, reason) for name in names], [nothing] * (sides - 1)


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
    keys = [line.split(":")[0] for line in differences]
    if any(key in OF_THE_LIST for key in keys) and all(key.startswith(OF_THE_DATA) for key in keys):
        raise ValueError(
            f"{path} was begun with other images or pairs than the data hold now: choose another --name, which begins "
            "a second store beside it (training reads both), or put the data back as they were"
        )
    if differences:
        raise ValueError(
            f"{path} was begun with other settings ({'; '.join(differences)}): repeat them, or choose another --name"
        )
    return cache


def _label_provenance(labels: LabelConfig) -> dict[str, Any]:
    values = asdict(labels)
    weights = values.pop("weights")
    if weights:
        values["weights_sha256"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    if labels.detector.endswith(WEIGHTS):
        values["detector"] = Path(labels.detector).name
        values["detector_sha256"] = hashlib.sha256(Path(labels.detector).read_bytes()).hexdigest()
    return values
