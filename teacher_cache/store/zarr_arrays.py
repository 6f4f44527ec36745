"""Zarr metadata and arrays of a store. Only this file imports zarr."""

from __future__ import annotations

import json
import resource
import sys
from math import prod
from typing import Any

import numpy as np
import zarr
from upath import UPath
from zarr import Array, Group
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.indexing import morton_order_iter
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import FsspecStore, LocalStore, ZipStore

from samfeat.teacher_cache.schema import LZ4_LEVEL, ZSTD_LEVEL, ArraySpec, Codec, StoreSpec
from samfeat.teacher_cache.store.checksums import ATTRIBUTE, metadata_checksums
from samfeat.teacher_cache.store.chunks import ChunkReader, ChunkWriter

__all__ = [
    "MEND",
    "Array",
    "Group",
    "chunk_reader",
    "chunk_writer",
    "files_of",
    "one_line",
    "open_array",
    "open_group",
    "write_metadata",
]

MEND = "run the teacher-cache command that wrote the store again, with --repair"
OPEN_SHARE = 32  # of the files that a process may have open, one in so many is a shard of each array
CODECS: dict[Codec, tuple[BytesBytesCodec, ...]] = {
    "none": (),
    "lz4": (BloscCodec(cname="lz4hc", clevel=LZ4_LEVEL, shuffle="noshuffle", blocksize=0, typesize=1), Crc32cCodec()),
    "zstd": (ZstdCodec(level=ZSTD_LEVEL, checksum=True),),
}


def write_metadata(path: UPath, spec: StoreSpec, attributes: dict[str, Any]) -> None:
    """Arrays first, the group's attributes last: without them, there is no store yet.

    Raises:
        FileExistsError: there is one.
    """
    group = zarr.open_group(_location(path, writable=True), mode="a", zarr_format=3)
    if "format" in group.attrs:
        raise FileExistsError(f"{path} exists already: open it, or choose another name")
    files: dict[str, bytes] = {}
    for array in spec.arrays():
        group.create_array(
            array.name,
            overwrite=True,
            shape=array.shape,
            chunks=array.chunks,
            shards=array.shards,
            dtype=array.dtype,
            compressors=CODECS[array.codec],
            dimension_names=array.dimensions,
            attributes={"description": array.description, **({"unit": array.unit} if array.unit else {})},
        )
        files[f"{array.name}/zarr.json"] = (path / array.name / "zarr.json").read_bytes()
    described = json.loads((path / "zarr.json").read_bytes()) | {
        "attributes": json.loads(json.dumps(attributes)) | {"shard_checksums": not path.protocol}
    }
    group.update_attributes(described["attributes"] | {ATTRIBUTE: metadata_checksums(files, described)})


def open_group(path: UPath, *, writable: bool) -> Group:
    """The group of a store.

    Raises:
        ValueError: there is no readable one.
    """
    if path.suffix == ".zip" and writable:
        raise ValueError(f"{path} is zipped, which can be read but not written to: unzip it first")
    try:
        if path.suffix == ".zip":
            return zarr.open_group(ZipStore(str(path), mode="r"), path=files_of(path).name, mode="r")
        return zarr.open_group(_location(path, writable=writable), mode="r+" if writable else "r")
    except PermissionError:
        raise
    except Exception as error:  # zarr raises many kinds for damaged metadata
        raise ValueError(f"{path} is not a teacher cache: no readable zarr.json in it ({one_line(error)})") from error


def files_of(path: UPath) -> UPath:
    """The root of a store's files: the store itself; in a zipped store its root, or the only folder there."""
    if path.suffix != ".zip":
        return path
    root = UPath("zip://", fo=str(path))
    inside = [each for each in root.iterdir() if each.is_dir() and (each / "zarr.json").exists()]
    return root if (root / "zarr.json").exists() or len(inside) != 1 else inside[0]


def open_array(group: Group, spec: ArraySpec, path: UPath) -> Array[Any]:
    """Open one array of a store and check it against the format.

    Raises:
        ValueError: it is missing, damaged or different.
    """
    try:
        array = group.get(spec.name)
    except PermissionError:
        raise
    except Exception as error:  # zarr raises many kinds for damaged metadata
        raise ValueError(f"{path}: array {spec.name!r} cannot be opened ({one_line(error)}): {MEND}") from error
    if not isinstance(array, zarr.Array) or array.shape != spec.shape:
        raise ValueError(f"{path}: array {spec.name!r} is missing or not of shape {spec.shape}: {MEND}")
    items = np.dtypes.StringDType() if spec.dtype == "string" else np.dtype(spec.dtype)
    if (array.dtype, array.chunks, array.shards, bool(array.fill_value)) != (items, spec.chunks, spec.shards, False):
        raise ValueError(f"{path}: array {spec.name!r} is not stored as the format says: {MEND}")
    return array.with_config({"write_empty_chunks": not spec.sparse})


def chunk_reader(array: Array[Any], path: UPath) -> ChunkReader | None:
    """A reader of chunks without zarr; None for text, for stores that are not local files, and for other codecs."""
    store, metadata = array.store, array.metadata
    if not (isinstance(store, LocalStore) and isinstance(metadata, ArrayV3Metadata) and array.shards):
        return None
    codec, names = metadata.codecs[0], metadata.dimension_names
    items = BytesCodec(endian="little" if array.dtype.itemsize > 1 else None)
    known = {name: ShardingCodec(chunk_shape=array.chunks, codecs=[items, *more]) for name, more in CODECS.items()}
    found = [name for name, sharding in known.items() if sharding == codec]
    if not found or sys.byteorder != "little":
        return None
    return ChunkReader(
        store=str(path),
        name=array.basename,
        counted=str(names[0] if names else ""),
        folder=str(store.root / array.path),
        axes=array.ndim,
        shard_rows=array.shards[0],
        row_chunks=prod(s // c for s, c in zip(array.shards[1:], array.chunks[1:])),
        fill_value=array.fill_value,
        codec=found[0],
        files=max(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // OPEN_SHARE),
    )


def chunk_writer(array: Array[Any], reader: ChunkReader) -> ChunkWriter:
    """A writer of shards without zarr, for an array with such a reader."""
    grid = tuple(s // c for s, c in zip(array.shards or (), array.chunks, strict=True))
    return ChunkWriter(
        folder=reader.folder,
        chunk=array.chunks,
        order=np.array(list(morton_order_iter(grid))),
        grid=grid,
        fill_value=reader.fill_value,
        codec=reader.codec,
        omits_empty=not array.config.write_empty_chunks,
    )


def one_line(error: Exception) -> str:
    """Type and text of an exception, in one line."""
    return " ".join(f"{type(error).__name__} {error}".split())


def _location(path: UPath, *, writable: bool) -> UPath | FsspecStore:
    """The store as zarr opens it."""
    return FsspecStore.from_url(str(path), read_only=not writable) if path.protocol else path
