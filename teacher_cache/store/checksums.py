"""Digests of a store's files: of its metadata in the group's attributes, of each shard's files in ``done/sha256/``.

They detect what a codec or a reader misses: a bit that no decoder checks, a removed file that reads as zeros.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from upath import UPath

ATTRIBUTE = "checksums"
"""Attribute of the group: SHA-256 of every array's ``zarr.json`` and of the group's own, by path."""


def metadata_checksums(files: dict[str, bytes], group: dict[str, Any]) -> dict[str, str]:
    """The value of ``ATTRIBUTE``.

    Args:
        files: content of the arrays' ``zarr.json``, by path.
        group: the group's whole ``zarr.json``, parsed; its own digest leaves out itself and all white space.
    """
    found = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    attributes = {key: value for key, value in group["attributes"].items() if key != ATTRIBUTE} | {ATTRIBUTE: found}
    text = json.dumps(group | {"attributes": attributes}, sort_keys=True)
    return found | {"zarr.json": hashlib.sha256(text.encode()).hexdigest()}


def damaged_metadata(store: UPath) -> Iterator[tuple[str, str]]:
    """(path, problem) of every metadata file that differs from what was written; stores without digests pass."""
    try:
        group = json.loads((store / "zarr.json").read_bytes())
        listed = group["attributes"].get(ATTRIBUTE)
    except FileNotFoundError:
        yield "zarr.json", "is missing"
        return
    except (ValueError, KeyError, TypeError, AttributeError):
        yield "zarr.json", "is damaged"
        return
    if listed is None:
        return
    if not isinstance(listed, dict):
        yield "zarr.json", "is damaged"
        return
    files: dict[str, bytes] = {}
    for path, digest in listed.items():
        if path == "zarr.json":
            continue
        try:
            files[path] = (store / path).read_bytes()
        except OSError:
            yield path, "is missing"
            continue
        if hashlib.sha256(files[path]).hexdigest() != digest:
            yield path, "is damaged"
    own = {path: digest for path, digest in listed.items() if path != "zarr.json"}
    text = json.dumps(group | {"attributes": group["attributes"] | {ATTRIBUTE: own}}, sort_keys=True)
    if hashlib.sha256(text.encode()).hexdigest() != listed.get("zarr.json"):
        yield "zarr.json", "is damaged"


def write_manifest(store: Path, shard: int, files: Iterable[Path]) -> None:
    """Write the digests of a shard's files, in a format for ``sha256sum --check`` in the store's folder.

    The last line, a comment, is the digest of the others.
    """
    path = manifest_of(store, shard)
    path.parent.mkdir(exist_ok=True)
    text = "".join(f"{_digest(file)}  {file.relative_to(store).as_posix()}\n" for file in files)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(f"{text}# {hashlib.sha256(text.encode()).hexdigest()}\n")
    partial.replace(path)


def manifest_of(store: Path, shard: int) -> Path:
    """The file of :func:`write_manifest`."""
    return store / "done" / "sha256" / str(shard)


def damaged_files(store: Path, shard: int) -> Iterator[tuple[str, str]]:
    """(path, problem) of every file of a shard that differs from what was written."""
    path = manifest_of(store, shard)
    name = path.relative_to(store).as_posix()
    try:
        text, _, last = path.read_bytes().rpartition(b"# ")
    except FileNotFoundError:
        yield name, "is missing"
        return
    if last != f"{hashlib.sha256(text).hexdigest()}\n".encode():
        yield name, "is damaged"
        return
    for line in text.decode().splitlines():
        digest, _, name = line.partition("  ")
        if not (store / name).is_file():
            yield name, "is missing"
        elif _digest(store / name) != digest:
            yield name, "is damaged"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
