"""The teacher cache on disk: one self-contained Zarr v3 store, written shard by shard, read image by image.

``teacher_cache/README.md`` is the format's normative description. Only this file imports zarr.

A shard is written by one task from beginning to end: first its data, then its ``done`` mark. A run that is cut off
anywhere leaves shards that are done and shards that are missing, and nothing in between that a reader would believe.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from samfeat.teacher_cache.grouping import pack, unpack
from samfeat.teacher_cache.schema import (
    FORMAT,
    MASK_CHUNK,
    MASK_COLUMNS,
    MAX_KEYPOINTS,
    MAX_MASKS,
    VERSION,
    ArraySpec,
    Failure,
    Gifts,
    Masks,
    Pair,
    Provenance,
    Record,
    StoreSpec,
    Targets,
)

ZSTD_LEVEL = 3


class TeacherCache:
    """One store, open for reading or for writing.

    ``cache[i]`` is the training view of image i (:class:`Targets`); ``cache.pair(k)`` the correspondences of pair k.
    Several threads may read at once; different shards may be written by different threads and processes.
    """

    def __init__(self, path: Path, group: zarr.Group, spec: StoreSpec, provenance: Provenance) -> None:
        self.path, self.spec, self.provenance = path, spec, provenance
        self._arrays = {array.name: _open_array(group, array, path) for array in spec.arrays()}

    def __repr__(self) -> str:
        return f"TeacherCache({str(self.path)!r}, images={len(self)}, pairs={self.spec.pairs})"

    @classmethod
    def create(cls, path: str | Path, spec: StoreSpec, provenance: Provenance) -> TeacherCache:
        """Make an empty store at ``path`` (a folder whose name ends in ``.zarr``); it appears whole or not at all.

        Raises:
            ValueError: the name does not end in ``.zarr``, or something is there already.
        """
        path = Path(path)
        if path.suffix != ".zarr":
            raise ValueError(f"{path}: a store's name must end in .zarr")
        if path.exists():
            raise ValueError(f"{path} exists already: open it, or choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            group = zarr.create_group(unfinished, zarr_format=3, attributes=_attributes(spec, provenance))
            for array in spec.arrays():
                _create_array(group, array)
            unfinished.rename(path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return cls.open(path, writable=True)

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> TeacherCache:
        """Open an existing store.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: not a store of this format, of another format version, or damaged metadata.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such store. `samfeat-cli teacher-cache` writes one")
        try:
            group = zarr.open_group(path, mode="r+" if writable else "r")
        except (zarr.errors.GroupNotFoundError, FileNotFoundError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is not a teacher cache: no readable zarr.json in it ({error})") from error
        attributes: dict[str, Any] = dict(group.attrs)
        if attributes.get("format") != FORMAT:
            raise ValueError(f"{path} is a zarr group, but not a teacher cache: its format is not {FORMAT!r}")
        if attributes.get("version") != VERSION:
            raise ValueError(
                f"{path} has format version {attributes.get('version')}, this program reads version {VERSION}: "
                "rebuild the store, or use the program that wrote it"
            )
        try:
            listed = attributes["spec"].items()
            values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in listed}
            spec = StoreSpec(**values)
            provenance = Provenance(**attributes["provenance"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: the store's attributes are damaged ({error}): rebuild it") from error
        return cls(path, group, spec, provenance)

    # -- what is there ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.spec.images

    def missing(self) -> list[int]:
        """Shards that are not done yet."""
        return np.flatnonzero(self._values("done") == 0).tolist()

    def require_complete(self) -> None:
        """Raise ValueError unless every shard is done."""
        missing = len(self.missing())
        if missing:
            raise ValueError(
                f"{self.path} is unfinished: {missing} of {self.spec.shards} shards are missing. "
                "Run the same `samfeat-cli teacher-cache` command again; it goes on where it stopped"
            )

    @cached_property
    def names(self) -> list[str]:
        """Names of all images, in order; empty strings where a shard is missing."""
        return [str(name) for name in self._values("name")]

    @cached_property
    def failures(self) -> dict[int, str]:
        """Images that could not be used, with the reason."""
        return {i: str(text) for i, text in enumerate(self._values("failure")) if text}

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Masks and keypoints of every image, int64 [N] each."""
        return {name: self._values(f"{name[:-1]}_count").astype(np.int64) for name in ("masks", "keypoints")}

    def index(self, name: str) -> int:
        """Number of the image of that name (or of the only name that ends so). Raises ValueError."""
        exact = [i for i, known in enumerate(self.names) if known == name]
        found = exact or [i for i, known in enumerate(self.names) if name and name in known]
        if len(found) != 1:
            which = "no image" if not found else f"{len(found)} images"
            examples = ", ".join(self.names[i] for i in (found or range(min(3, len(self)))))[:300]
            raise ValueError(f"{which} of {self.path.name} called {name!r}; for example: {examples}")
        return found[0]

    def stored_bytes(self) -> dict[str, int]:
        """Bytes on disk, by array."""
        return {
            name: sum(file.stat().st_size for file in (self.path / name).rglob("*") if file.is_file())
            for name in self._arrays
        }

    # -- reading ------------------------------------------------------------------------------------------------------

    def __getitem__(self, image: int) -> Targets:
        count = int(self._read("keypoint_count", image))
        return Targets(
            self._read("image", image),
            self._read("embedding", image),
            self._read("groups", image),
            self._read("edges", image),
            self._read("keypoints", image)[:count],
        )

    def masks(self, image: int) -> Masks:
        """The overlapping masks of one image."""
        count = int(self._read("mask_count", image))
        used = -(-count // MASK_CHUNK) * MASK_CHUNK
        stack = unpack(self._values("masks", (image, slice(used))), self.spec.image_size[1])[:count]
        return Masks(stack, self._read("mask_table", image)[:count])

    def record(self, image: int) -> Record:
        """Everything stored about one image."""
        targets = self[image]
        gifts = Gifts(targets.embedding, self.masks(image), targets.groups, targets.edges)
        return Record(
            name=str(self._read("name", image)[()]),
            source_sha256=self._read("source_sha256", image).tobytes().hex(),
            box=tuple(self._read("box", image).tolist()),
            image=targets.image,
            gifts=gifts,
            keypoints=targets.keypoints,
        )

    def stored_digest(self, image: int) -> bytes:
        """SHA-256 that was stored with an image; :func:`digest` of its record, if nothing has changed."""
        return self._read("sha256", image).tobytes()

    def pair(self, pair: int) -> Pair:
        """The stored correspondences of one pair."""
        if not 0 <= pair < self.spec.pairs:
            raise ValueError(f"{self.path.name} has {self.spec.pairs} pairs, there is no pair {pair}")
        return Pair((2 * pair, 2 * pair + 1), self._values("pair_points", pair), self._values("pair_valid", pair))

    def _read(self, name: str, image: int) -> np.ndarray:
        if not 0 <= image < len(self):
            raise IndexError(f"{self.path.name} has {len(self)} images, there is no image {image}")
        return self._values(name, image)

    def _values(self, name: str, selection: Any = ...) -> np.ndarray:
        return np.asarray(self._arrays[name][selection])

    # -- writing ------------------------------------------------------------------------------------------------------

    def write_shard(
        self,
        shard: int,
        records: Sequence[Record | Failure],
        pairs: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    ) -> None:
        """Write one whole shard, then mark it done.

        Args:
            shard: number of the shard.
            records: one entry for each image of ``spec.shard_range(shard)``.
            pairs: for paired stores (points float32 [2, POINTS, 2], valid bool [POINTS]) of each pair of the shard.

        Raises:
            ValueError: a record does not fit the store.
            OSError: the disk is full or not writable; the shard then counts as missing.
        """
        images = self.spec.shard_range(shard)
        if len(records) != len(images) or len(pairs) != (len(images) // 2 if self.spec.paired else 0):
            raise ValueError(
                f"shard {shard} takes {len(images)} records, got {len(records)} records, {len(pairs)} pairs"
            )
        columns = [_columns(record, self.spec) for record in records]
        rows = slice(images.start, images.stop)
        self._forget(shard)
        for name in columns[0]:
            values = [column[name] for column in columns]
            if name == "masks":
                used = -(-max(len(value) for value in values) // MASK_CHUNK) * MASK_CHUNK
                if used:
                    self._arrays[name][rows, :used] = np.stack([_padded(value, used) for value in values])
            elif isinstance(values[0], str):
                self._arrays[name][rows] = np.array(values, dtype=object)
            else:
                self._arrays[name][rows] = np.stack(values)
        if pairs:
            halves = slice(images.start // 2, images.stop // 2)
            self._arrays["pair_points"][halves] = np.stack([points for points, _ in pairs])
            self._arrays["pair_valid"][halves] = np.stack([valid for _, valid in pairs])
        self._arrays["done"][shard] = 1

    def _forget(self, shard: int) -> None:
        """Remove the sparse mask shard that an interrupted run may have left, since writing merges into it."""
        array = self._arrays["masks"]
        key = array.metadata.encode_chunk_key((shard, 0, 0, 0))
        asyncio.run((array.store_path / key).delete())


def open_stores(cache: str | Path) -> list[TeacherCache]:
    """Open every store of a cache: a folder with ``*.zarr`` in it (all else is ignored), or one store.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no store.
        ValueError: a store cannot be read.
    """
    cache = Path(cache)
    if not cache.exists():
        raise FileNotFoundError(f"{cache}: no such folder. `samfeat-cli teacher-cache --help` shows how to make one")
    paths = [cache] if cache.suffix == ".zarr" else sorted(path for path in cache.glob("*.zarr") if path.is_dir())
    if not paths:
        raise FileNotFoundError(
            f"{cache} holds no store (*.zarr). Write one with `samfeat-cli teacher-cache --data PHOTOS --cache {cache}`"
        )
    return [TeacherCache.open(path) for path in paths]


def digest(record: Record) -> bytes:
    """SHA-256 of everything stored about one image, in the order of ``teacher_cache/README.md``."""
    gifts = record.gifts
    found = hashlib.sha256(f"{record.name}\n{record.source_sha256}\n{tuple(record.box)}".encode())
    for values, dtype in (
        (record.image, "|u1"),
        (gifts.embedding, "<f2"),
        (gifts.groups, "<u2"),
        (gifts.edges, "|u1"),
        (record.keypoints, "<f4"),
        (pack(gifts.masks.stack), "|u1"),
        (gifts.masks.table, "<f4"),
    ):
        array = np.ascontiguousarray(values, dtype=dtype)
        found.update(str(array.shape).encode())
        found.update(array.tobytes())
    return found.digest()


def _attributes(spec: StoreSpec, provenance: Provenance) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": dataclasses.asdict(spec),
        "provenance": provenance.to_json(),
        "mask_columns": list(MASK_COLUMNS),
        "coordinates": "points are (x, y) in pixels, (0, 0) is the centre of the top-left pixel",
    }


def _create_array(group: zarr.Group, spec: ArraySpec) -> None:
    group.create_array(
        spec.name,
        shape=spec.shape,
        chunks=spec.chunks,
        shards=spec.shards,
        dtype=spec.dtype,
        compressors=ZstdCodec(level=ZSTD_LEVEL) if spec.compressed else None,
        dimension_names=spec.dimensions,
        attributes={"description": spec.description, **({"unit": spec.unit} if spec.unit else {})},
    )


def _open_array(group: zarr.Group, spec: ArraySpec, path: Path) -> zarr.Array:
    array = group.get(spec.name)
    if not isinstance(array, zarr.Array) or array.shape != spec.shape:
        raise ValueError(f"{path}: array {spec.name!r} is missing or not of shape {spec.shape}: rebuild the store")
    return array


def _columns(record: Record | Failure, spec: StoreSpec) -> dict[str, Any]:
    """The row of each array that describes one image."""
    if isinstance(record, Failure):
        return _columns(_blank(record, spec), spec) | {"failure": record.reason.replace("\n", " ") or "unknown"}
    gifts, size = record.gifts, spec.image_size
    shapes = {
        "image": (record.image.shape, (*size, 3)),
        "embedding": (gifts.embedding.shape, spec.embedding),
        "groups": (gifts.groups.shape, size),
        "edges": (gifts.edges.shape, size),
        "masks": (gifts.masks.stack.shape[1:], size),
        "mask table": (gifts.masks.table.shape, (len(gifts.masks.stack), len(MASK_COLUMNS))),
        "keypoints": (record.keypoints.shape[1:], (3,)),
    }
    for name, (given, wanted) in shapes.items():
        if tuple(given) != tuple(wanted):
            raise ValueError(f"{record.name}: {name} has shape {tuple(given)}, the store takes {tuple(wanted)}")
    if len(gifts.masks.stack) > MAX_MASKS or len(record.keypoints) > MAX_KEYPOINTS:
        raise ValueError(f"{record.name}: more than {MAX_MASKS} masks or {MAX_KEYPOINTS} keypoints")
    embedding = gifts.embedding.astype(np.float16)
    if not np.isfinite(embedding).all():
        raise ValueError(f"{record.name}: the embedding holds NaN, infinity or values beyond half precision")
    stored = dataclasses.replace(record, gifts=dataclasses.replace(gifts, embedding=embedding))
    return {
        "image": record.image,
        "embedding": embedding,
        "groups": gifts.groups,
        "edges": gifts.edges,
        "keypoints": _padded(record.keypoints, MAX_KEYPOINTS),
        "keypoint_count": np.array(len(record.keypoints), np.uint16),
        "masks": pack(gifts.masks.stack),
        "mask_table": _padded(gifts.masks.table, MAX_MASKS),
        "mask_count": np.array(len(gifts.masks.stack), np.uint16),
        "name": record.name,
        "box": np.array(record.box, np.int32),
        "source_sha256": np.frombuffer(bytes.fromhex(record.source_sha256), np.uint8),
        "sha256": np.frombuffer(digest(stored), np.uint8),
        "failure": "",
    }


def _blank(failure: Failure, spec: StoreSpec) -> Record:
    height, width = spec.image_size
    masks = Masks(np.zeros((0, height, width), bool), np.zeros((0, len(MASK_COLUMNS)), np.float32))
    blank = np.zeros((height, width), np.uint8)
    gifts = Gifts(np.zeros(spec.embedding, np.float32), masks, blank.astype(np.uint16), blank)
    image, keypoints = np.zeros((height, width, 3), np.uint8), np.zeros((0, 3), np.float32)
    return Record(failure.name, "0" * 64, (0, 0, 0, 0), image, gifts, keypoints)


def _padded(rows: np.ndarray, length: int) -> np.ndarray:
    padded = np.zeros((length, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded
