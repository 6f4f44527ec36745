"""Output files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import tempfile
from pathlib import Path
from typing import Any


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may be: training keeps the shards of its stores open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Writes a file under a temporary name in its own folder (made where absent), then renames it; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(partial, 0o666 & ~umask())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, values: Any) -> Path:
    """Writes JSON, indented, as :func:`write_bytes` does."""
    return write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def umask() -> int:
    """The permissions that new files of this process lack."""
    current = os.umask(0)
    os.umask(current)
    return current
