"""What goes wrong with COLMAP's databases, in one line: pycolmap says "No registered database factory succeeded"."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = 1 << 20  # bytes; with less free space SQLite can write nothing


@contextmanager
def database_errors(path: str | Path) -> Iterator[None]:
    """Turn pycolmap's errors about the database ``path`` into errors that say what to do.

    Raises:
        OSError: the disk is full, or the folder is not writable.
        ValueError: the file is damaged, or is not one of COLMAP's databases.
    """
    path = Path(path)
    try:
        yield
    except RuntimeError as error:
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"{path} is not a place for a file: give a file in a folder that exists") from error
        if shutil.disk_usage(path.parent).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from error
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be used as a COLMAP database ({reason}): remove it, and run again") from error
