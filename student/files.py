"""Atomic file writes."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


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
