"""File helpers: atomic writes that never replace an input, and reading lists of names."""

from __future__ import annotations

import json
import os
import resource
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file under a temporary name in its own folder, then rename it; returns its path.

    The folder is created if missing, an existing file is replaced atomically, and the content is on disk before the
    name is. The permissions are those of any new file of this process.

    Raises:
        OSError: the disk is full or not writable; what was there before is then still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def allow_many_files() -> None:
    """Raise this process's limit on open files to the maximum: training keeps the shards of its stores open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def write_json(path: str | Path, values: Any) -> Path:
    """Write indented JSON, like :func:`write_bytes`."""
    return write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object written by :func:`write_json`.

    Raises:
        ValueError: it is damaged.
    """
    try:
        values = json.loads(Path(path).read_bytes())
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it") from None
    return values


def check_outputs(
    outputs: Iterable[str | Path | None], inputs: Iterable[str | Path | None], *, outside: bool = False
) -> None:
    """Check, before any work, that no output replaces an input or another output, or lies in a store.

    Links are resolved. Paths that are None or URLs are skipped.

    Args:
        outputs: files or folders to write.
        inputs: files or folders to read.
        outside: also refuse an output inside an input folder, where it would be read as an input next time.

    Raises:
        ValueError: names the output and what it would replace.
    """
    sources = [(path, _identity(path)) for path in _local(inputs)]
    written: list[tuple[Path, tuple[Any, ...]]] = []
    for output in _local(outputs):
        identity = _identity(output)
        for path, other in sources:
            if identity == other:
                raise ValueError(f"{output} is an input ({path}), and writing would replace it: choose another output")
            if outside and path.is_dir() and output.resolve().is_relative_to(path.resolve()):
                raise ValueError(f"{output} lies inside the input {path}: choose an output outside of it")
        store = next((folder for folder in (output.resolve(), *output.resolve().parents) if _is_store(folder)), None)
        if store is not None:
            raise ValueError(f"{output} would change the store {store.name}: choose an output outside of it")
        for path, other in written:
            if identity == other:
                raise ValueError(f"{output} and {path} are one file: choose two outputs")
        written.append((output, identity))


def _local(paths: Iterable[str | Path | None]) -> list[Path]:
    return [Path(path) for path in paths if path is not None and "://" not in str(path)]


def _identity(path: Path) -> tuple[Any, ...]:
    """An identity shared by all paths to one file, including hard links."""
    try:
        found = path.stat()
    except OSError:
        return (path.resolve(),)
    return found.st_dev, found.st_ino


def _is_store(folder: Path) -> bool:
    return folder.suffix == ".zarr" and (folder / "zarr.json").is_file()


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a text file with their numbers from 1, without blank lines and ``#`` comments.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8 text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file (UTF-8): give one entry a line") from None
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def umask() -> int:
    """The process's umask."""
    current = os.umask(0)
    os.umask(current)
    return current
