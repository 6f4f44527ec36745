"""The teacher cache on disk: one self-contained Zarr v3 store, written shard by shard, read image by image.

``teacher_cache/README.md`` is the format's normative description.

A shard is written by one task: first its data, then its ``done`` mark. After an interruption at any point, a reader
sees only shards that are done and shards that are missing.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from upath import UPath

from samfeat.teacher_cache.schema import (
    FORMAT,
    MASK_CHUNK,
    MASK_COLUMNS,
    VERSION,
    Failure,
    Masks,
    Pair,
    Provenance,
    Record,
    StoreSpec,
    Targets,
)
from samfeat.teacher_cache.store.checksums import manifest_of, write_manifest
from samfeat.teacher_cache.store.chunks import empty_targets
from samfeat.teacher_cache.store.rows import STORED, record_of, rows, unpack
from samfeat.teacher_cache.store.zarr_arrays import (
    MEND,
    Group,
    chunk_reader,
    chunk_writer,
    files_of,
    one_line,
    open_array,
    open_group,
    write_metadata,
)


class TeacherCache:
    """One store, open for reading or for writing.

    ``cache[i]`` is the training view of image i (:class:`Targets`); ``cache.pair(k)`` the correspondences of pair k.
    Several threads may read at once; different shards may be written by different threads and processes.
    """

    def __init__(self, path: UPath, group: Group, spec: StoreSpec, provenance: Provenance) -> None:
        self.path, self.spec, self.provenance = path, spec, provenance
        self._arrays = {array.name: open_array(group, array, path) for array in spec.arrays()}
        readers = {name: chunk_reader(array, path) for name, array in self._arrays.items()}
        self._readers = {name: reader for name, reader in readers.items() if reader}
        self._writers = {name: chunk_writer(self._arrays[name], reader) for name, reader in self._readers.items()}
        self.has_checksums = not path.protocol and path.suffix != ".zip" and bool(group.attrs.get("shard_checksums"))
        self._sparse = {array.name for array in spec.arrays() if array.sparse}

    def __repr__(self) -> str:
        return f"TeacherCache({str(self.path)!r}, images={len(self)}, pairs={self.spec.pairs})"

    @classmethod
    def create(cls, path: str | Path | UPath, spec: StoreSpec, provenance: Provenance) -> TeacherCache:
        """Create an empty store atomically.

        Args:
            path: a folder whose name ends in ``.zarr``, or the URL of one in an object store.
            spec: shape of the store.
            provenance: its origin.

        Raises:
            ValueError: the name does not end in ``.zarr``.
            FileExistsError: the path already exists.
        """
        where = UPath(path)
        if where.suffix != ".zarr":
            raise ValueError(f"{path}: a store's name must end in .zarr")
        if where.protocol:
            write_metadata(where, spec, attributes_of(spec, provenance))
            return cls.open(where, writable=True)
        where.parent.mkdir(parents=True, exist_ok=True)
        unfinished = where.with_name(f"{where.name}.{os.getpid()}.partial")
        taken = FileExistsError(f"{path} exists already: open it, or choose another name")
        if where.exists():
            raise taken
        try:
            write_metadata(unfinished, spec, attributes_of(spec, provenance))
            unfinished.rename(where)
        except BaseException as error:
            shutil.rmtree(str(unfinished), ignore_errors=True)
            if isinstance(error, OSError) and where.exists():  # another process was quicker
                raise taken from error
            raise
        return cls.open(where, writable=True)

    @classmethod
    def remove_unfinished(cls, path: UPath) -> None:
        """Once the store exists, remove leftovers of processes that died while creating it."""
        if not path.protocol:
            for folder in path.parent.glob(f"{path.name}.*.partial"):
                shutil.rmtree(str(folder), ignore_errors=True)

    @classmethod
    def open(cls, path: str | Path | UPath, *, writable: bool = False) -> TeacherCache:
        """Open an existing store; a zipped one (``.zarr.zip``) can only be read.

        Raises:
            FileNotFoundError: the path does not exist.
            ValueError: not a store of this format, of another format version, or damaged metadata.
        """
        where = UPath(path)
        if not where.exists():
            raise FileNotFoundError(f"{where}: no such store. `samfeat-cli teacher-cache` writes one")
        group = open_group(where, writable=writable)
        spec, provenance = read_attributes(group, where)
        return cls(where, group, spec, provenance)

    # -- what is there ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.spec.images

    def missing(self) -> list[int]:
        """Shards that are not done yet, or whose mark is damaged."""
        try:
            return np.flatnonzero(self._values("done") != 1).tolist()
        except ValueError:
            return [shard for shard in range(self.spec.shards) if not self._is_done(shard)]

    def finished(self) -> set[int]:
        """Shards that were completed at some point, judging by their digests, even if their mark is damaged."""
        if not self.has_checksums:
            return set()
        root = Path(str(self.path))
        return {shard for shard in range(self.spec.shards) if manifest_of(root, shard).exists()}

    def finished_at(self, shard: int) -> float:
        """When a shard of a store in local files was finished, in seconds since 1970."""
        return (self.path / "done" / self._key("done", shard)).stat().st_mtime

    def _is_done(self, shard: int) -> bool:
        try:
            return bool(self._values("done", shard) == 1)
        except ValueError:
            return False

    def require_complete(self) -> None:
        """Raise ValueError unless every shard is done."""
        missing = len(self.missing())
        if missing:
            raise ValueError(
                f"{self.path} is unfinished: {missing} of {self.spec.shards} shards are missing. "
                "Run the same `samfeat-cli teacher-cache` command again; it resumes where it stopped"
            )

    @cached_property
    def names(self) -> list[str]:
        """Names of all images, in order; empty strings if their shard is missing."""
        return [str(name) for name in self._values("name")]

    @cached_property
    def failures(self) -> dict[int, str]:
        """Images that could not be used, with the reason."""
        return {i: str(text) for i, text in enumerate(self._values("failure")) if text}

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Masks and keypoints of every image, int64 [N] each."""
        return {name: self._values(f"{name[:-1]}_count").astype(np.int64) for name in ("masks", "keypoints")}

    def column(self, name: str, shard: int) -> np.ndarray:
        """The values of the images of one shard in an array with one value per image."""
        images = self.spec.shard_range(shard)
        return self._values(name, slice(images.start, images.stop))

    def index(self, name: str) -> int:
        """Number of the image with this name, or with the only name that contains it. Raises ValueError."""
        exact = [i for i, known in enumerate(self.names) if known == name]
        found = exact or [i for i, known in enumerate(self.names) if name and name in known]
        if len(found) != 1:
            which = "no image" if not found else f"{len(found)} images"
            examples = ", ".join(self.names[i] for i in (found or range(min(3, len(self)))))[:300]
            raise ValueError(f"{which} of {self.path.name} called {name!r}; for example: {examples}")
        return found[0]

    def stored_bytes(self) -> dict[str, int]:
        """Bytes on disk, by array."""
        files = files_of(self.path)
        return {
            name: sum(file.stat().st_size for file in (files / name).rglob("*") if file.is_file())
            for name in self._arrays
        }

    # -- reading ------------------------------------------------------------------------------------------------------

    def __getitem__(self, image: int) -> Targets:
        targets = Targets(*(array[0] for array in empty_targets(self.spec, 1)))
        count = self.read_into(image, targets)
        return targets._replace(keypoints=targets.keypoints[:count])

    def read_into(self, image: int, targets: Targets) -> int:
        """Read the training view of one image into the caller's memory.

        Args:
            image: its number.
            targets: output; a row of :func:`~samfeat.teacher_cache.store.chunks.empty_targets`.

        Returns:
            the number of keypoints; the rows beyond are zero.

        Raises:
            IndexError: no such image.
            ValueError: the image's shard is missing or damaged.
        """
        for name, array in targets._asdict().items():
            self._fill(name, image, array)
        count = np.empty(1, np.uint16)
        self._fill("keypoint_count", image, count)
        return int(count[0])

    def masks(self, image: int) -> Masks:
        """The overlapping masks of one image."""
        values = self.stored(image, ("masks", "mask_table"))
        return Masks(unpack(values["masks"], self.spec.image_size[1]), values["mask_table"])

    def record(self, image: int) -> Record:
        """Everything stored about one image; the embedding as float32."""
        return record_of(self.stored(image))

    def stored(self, image: int, names: Sequence[str] = STORED) -> dict[str, np.ndarray]:
        """Values of one image as stored, by array, without unused rows."""
        counts = {name: int(self._read(f"{name}_count", image)) for name in ("mask", "keypoint")}
        used = {"masks": counts["mask"], "mask_table": counts["mask"], "keypoints": counts["keypoint"]}
        return {name: self._read(name, image, used.get(name)) for name in names}

    def stored_digest(self, image: int) -> bytes:
        """SHA-256 that was stored with an image; the digest of :meth:`stored`, if nothing has changed."""
        return self._read("sha256", image).tobytes()

    def pair(self, pair: int) -> Pair:
        """The stored correspondences of one pair."""
        if not 0 <= pair < self.spec.pairs:
            raise ValueError(f"{self.path.name} has {self.spec.pairs} pairs, there is no pair {pair}")
        return Pair((2 * pair, 2 * pair + 1), self._read("pair_points", pair), self._read("pair_valid", pair))

    def _read(self, name: str, index: int, used: int | None = None) -> np.ndarray:
        """The first ``used`` rows (all of them where None) of one image or pair."""
        array, reader = self._arrays[name], self._readers.get(name)
        self._check(index)
        if reader is None:
            return self._values(name, index if used is None else (index, slice(used)))
        shape = array.shape[1:]
        if used is not None:
            shape = (-(-used // array.chunks[1]) * array.chunks[1], *shape[1:])
        out = np.empty(shape, array.dtype)
        chunks = out.reshape(-1, *array.chunks[1:])
        for chunk in range(len(chunks)):
            reader.read(index, chunks[chunk : chunk + 1], chunk)
        return out if used is None else out[:used]

    def _fill(self, name: str, image: int, out: np.ndarray) -> None:
        """Read an array's data for one image into ``out``."""
        reader = self._readers.get(name)
        self._check(image)
        if reader is None:
            out[...] = self._values(name, image)
        else:
            reader.read(image, out)

    def _check(self, image: int) -> None:
        if not 0 <= image < len(self):
            raise IndexError(f"{self.path.name} has {len(self)} images, there is no image {image}")

    def _values(self, name: str, selection: Any = ...) -> np.ndarray:
        """Any part of an array, read by zarr."""
        try:
            return np.asarray(self._arrays[name][selection])
        except OSError:
            raise
        except Exception as error:  # zarr and its codecs raise many kinds for damaged bytes
            raise ValueError(f"{self.path}: array {name!r} cannot be read ({one_line(error)}): {MEND}") from error

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
            records: one entry per image of ``spec.shard_range(shard)``.
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
        columns: list[dict[str, Any]] = [rows(record, self.spec) for record in records]
        for reader in self._readers.values():
            reader.forget(shard)
        self._forget(shard)
        for name in list(columns[0]):
            self._write(name, images.start, [column.pop(name) for column in columns])
        for number, name in enumerate(("pair_points", "pair_valid") if pairs else ()):
            self._write(name, images.start // 2, [np.asarray(pair[number]) for pair in pairs])
        if self.has_checksums:
            root = Path(str(self.path))
            files = (root / name / self._key(name, shard) for name in self._arrays if name != "done")
            write_manifest(root, shard, (file for file in files if file.is_file()))
        self._arrays["done"][shard] = 1

    def forget_shard(self, shard: int) -> None:
        """Clear the ``done`` mark of a shard: it counts as missing and may be rewritten."""
        (self.path / "done" / self._key("done", shard)).unlink(missing_ok=True)

    def _write(self, name: str, start: int, values: Sequence[np.ndarray]) -> None:
        """Write the rows from ``start`` on, padding short values with zeros."""
        array = self._arrays[name]
        shape = array.shape[1:]
        if name == "masks":
            shape = (-(-max(map(len, values)) // MASK_CHUNK) * MASK_CHUNK, *shape[1:])
        block = np.zeros((len(values), *shape), array.dtype)
        for row, value in enumerate(values):
            block[(slice(row, row + 1), *_first(value.shape))] = value
        if name in self._writers:
            self._writers[name].write(start // self._writers[name].rows, block)
        elif block.size and not (name in self._sparse and (block == array.fill_value).all()):
            array[(slice(start, start + len(values)), *_first(shape))] = block

    def _forget(self, shard: int) -> None:
        """Remove all files of a shard, its mark first, so that new data is not merged with damaged or partial files."""
        self.forget_shard(shard)
        short = len(self.spec.shard_range(shard)) < self.spec.shard_images
        for name, array in self._arrays.items():
            file = self.path / name / self._key(name, shard)
            if not self.path.protocol:
                for each in file.parent.glob(f"{file.name}*" if array.ndim > 1 else f"{file.name}.*"):
                    each.unlink(missing_ok=True)  # including zarr's temporary files
                file.unlink(missing_ok=True)
            elif short or name in self._sparse:  # whole shards are replaced without being read
                file.unlink(missing_ok=True)
        if not self.path.protocol:
            manifest_of(Path(str(self.path)), shard).unlink(missing_ok=True)

    def _key(self, name: str, shard: int) -> str:
        """The file of a shard in an array's folder."""
        array = self._arrays[name]
        return array.metadata.encode_chunk_key((shard, *[0] * (array.ndim - 1)))


def open_stores(cache: str | Path | UPath) -> list[TeacherCache]:
    """Open every store of a cache.

    Raises:
        FileNotFoundError: as :func:`store_paths`.
        ValueError: a store cannot be read.
    """
    return [TeacherCache.open(path) for path in store_paths(cache)]


def store_paths(cache: str | Path | UPath) -> list[UPath]:
    """The stores of a cache: a folder with ``*.zarr`` in it (all else is ignored), or one store, also a zipped one.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no store.
    """
    folder = UPath(cache)
    if not folder.exists():
        raise FileNotFoundError(f"{cache}: no such folder. `samfeat-cli teacher-cache --help` shows how to make one")
    paths = (
        [folder]
        if folder.suffix in (".zarr", ".zip")
        else sorted(path for path in folder.glob("*.zarr") if path.is_dir())
    )
    if not paths:
        raise FileNotFoundError(
            f"{cache} holds no store (*.zarr). Write one with `samfeat-cli teacher-cache --data PHOTOS --cache {cache}`"
        )
    return paths


def _first(lengths: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(length) for length in lengths)


def read_attributes(group: Group, path: UPath) -> tuple[StoreSpec, Provenance]:
    """Read a store's attributes.

    Raises:
        ValueError: not a store of this format, of another format version, or damaged.
    """
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
        spec.check_types()
        provenance.check_types()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: the store's attributes are damaged ({one_line(error)}): {MEND}") from error
    return spec, provenance


def attributes_of(spec: StoreSpec, provenance: Provenance) -> dict[str, Any]:
    """The attributes of a store, except for the digests of its metadata."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": dataclasses.asdict(spec),
        "provenance": provenance.to_json(),
        "mask_columns": list(MASK_COLUMNS),
        "coordinates": "points are (x, y) in pixels, (0, 0) is the centre of the top-left pixel",
    }
