"""Prepare a store for ``teacher-cache --repair``: rewrite damaged metadata, and unmark damaged shards."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable
from typing import Any

from upath import UPath

from samfeat.teacher_cache.schema import Provenance, StoreSpec
from samfeat.teacher_cache.store.checksums import ATTRIBUTE, damaged_metadata, metadata_checksums
from samfeat.teacher_cache.store.store import TeacherCache, attributes_of, read_attributes
from samfeat.teacher_cache.store.verify import Problem, verify
from samfeat.teacher_cache.store.zarr_arrays import open_array, open_group, write_metadata

logger = logging.getLogger(__name__)


def mend_metadata(path: UPath, spec: StoreSpec, provenance: Provenance) -> None:
    """Rewrite the damaged metadata files of a store.

    Args:
        path: the store.
        spec, provenance: new attributes, if they are damaged themselves.

    Raises:
        ValueError: the attributes are damaged, and ``spec`` does not match the arrays.
    """
    damaged = [name for name, _ in damaged_metadata(path)]
    if "zarr.json" not in damaged:
        group = open_group(path, writable=False)
        spec, provenance = read_attributes(group, path)
        for array in spec.arrays():
            try:
                open_array(group, array, path)
            except ValueError:
                damaged.append(f"{array.name}/zarr.json")
    with tempfile.TemporaryDirectory(prefix="samfeat-") as folder:
        fresh = UPath(folder) / "fresh.zarr"
        write_metadata(fresh, spec, attributes_of(spec, provenance))
        if "zarr.json" in damaged:
            names = [f"{array.name}/zarr.json" for array in spec.arrays()]
            if any(_shape(path / name) not in (None, _shape(fresh / name)) for name in names):
                raise ValueError(
                    f"{path}/zarr.json is damaged, and the arrays are not those of this command: repeat the command "
                    "that wrote the store, with --repair"
                )
            damaged += [name for name in names if not (path / name).is_file() or _differ(path / name, fresh / name)]
        for name in sorted(set(damaged)):
            logger.info(f"{path.name}/{name} is damaged or missing, and is written again")
            _replace(path / name, (fresh / name).read_bytes())
    if any(damaged_metadata(path)):  # another version of zarr wrote the rest, and puts the same metadata differently
        described = json.loads((path / "zarr.json").read_bytes())
        files = {f"{array.name}/zarr.json": (path / array.name / "zarr.json").read_bytes() for array in spec.arrays()}
        described["attributes"][ATTRIBUTE] = metadata_checksums(files, described)
        _replace(path / "zarr.json", json.dumps(described, indent=2).encode())


def forget_damaged(cache: TeacherCache, shards: Iterable[int]) -> None:
    """Clear the ``done`` mark of those ``shards`` with damaged files or images, so that they are rebuilt."""
    damaged: dict[int, str] = {}
    for found in verify(cache):
        if isinstance(found, Problem) and found.shard >= 0:
            text = f"image {found.image}: {found.text}" if found.image >= 0 else found.text
            damaged.setdefault(found.shard, text)
    for shard in sorted(damaged.keys() & set(shards)):
        logger.info(f"shard {shard} is made again: {damaged[shard]}")
        cache.forget_shard(shard)


def _shape(path: UPath) -> Any:
    """The shape in an array's metadata; None if it cannot be read."""
    try:
        return json.loads(path.read_bytes())["shape"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _differ(one: UPath, other: UPath) -> bool:
    return one.read_bytes() != other.read_bytes()


def _replace(path: UPath, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.protocol:  # an object appears whole
        path.write_bytes(content)
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
