"""Finished parts of an output file, so that a killed run loses at most one of them.

An HDF5 file may not survive its writer being killed (3 of 60 did not, in a trial that wrote continuously). So every
result is a small file in a folder beside the output until all of them are packed at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from samfeat.files import read_json, umask, write_bytes, write_json

# Beginnings of h5py's messages for damaged files; a missing object is not one of them.
DAMAGE = re.compile(
    r"Unable to (?!.*(?:doesn't exist|component not found))|Can't |Unspecified error|Link iteration|Object visit"
)


class Parts:
    """Dictionaries of arrays by key, kept in the folder ``.<output>.parts`` until they are :meth:`packed`.

    Args:
        output: the output file.
        config: JSON values that the parts depend on.

    Raises:
        ValueError: the folder holds parts of another configuration.
    """

    def __init__(self, output: Path, config: Mapping[str, Any]) -> None:
        self.output, self.folder = output, _folder(output)
        self._salt = json.dumps(dict(config), sort_keys=True)
        record = self.folder / "config.json"
        if record.exists():
            check_config(read_json(record), config, self.folder)
        else:
            write_json(record, dict(config))

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def __getitem__(self, key: str) -> dict[str, np.ndarray]:
        path = self._path(key)
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is damaged ({_first_line(error)}): remove it, and run the command again"
            ) from None

    def add(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Store a part."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy types one keyword of its own
        write_bytes(self._path(key), buffer.getvalue())

    @contextmanager
    def packed(self) -> Iterator[h5py.File]:
        """A copy of the output (empty if there is none) to write to; at the end it replaces the output and the parts
        are deleted.
        """
        partial = self.folder / "packed.h5"
        if self.output.exists():
            shutil.copyfile(self.output, partial)
        else:
            partial.unlink(missing_ok=True)  # of a run that was killed
        with h5py.File(partial, "a") as file:
            yield file
        os.chmod(partial, 0o666 & ~umask())
        os.replace(partial, self.output)
        self.remove()

    def remove(self) -> None:
        """Delete all parts."""
        shutil.rmtree(self.folder)

    @staticmethod
    def discard(output: Path) -> None:
        """Delete the parts of ``output``, whatever their configuration."""
        shutil.rmtree(_folder(output), ignore_errors=True)

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256((self._salt + key).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.npz"


def _folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.parts")


def check_config(stored: Mapping[str, Any] | None, config: Mapping[str, Any], where: Path) -> None:
    """Refuse to continue output of another configuration; None means nothing is stored yet.

    Raises:
        ValueError: naming the differences.
    """
    wanted = json.loads(json.dumps(dict(config)))
    if stored is None or stored == wanted:
        return
    changes = ", ".join(
        f"{key} {stored.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted(stored.keys() | wanted.keys())
        if stored.get(key) != wanted.get(key)
    )
    raise ValueError(f"{where} holds results of another configuration ({changes}): choose another file, or overwrite")


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading.

    Raises:
        OSError: it is missing, not HDF5, or damaged, whether noticed on opening or inside the block.
    """
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"{path} cannot be opened as HDF5 ({_first_line(error)}): make it again") from None
    with file:
        try:
            yield file
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            if not DAMAGE.match(_first_line(error)):
                raise
            raise OSError(f"{path} is damaged ({_first_line(error)}): make it again") from None


def read_config(file: h5py.File) -> dict[str, Any] | None:
    """The configuration recorded in our files; None for files of other programs.

    Raises:
        ValueError: it is not a JSON object.
    """
    text = file.attrs.get("config", "null")
    try:
        config = json.loads(text)
        if config is not None and not isinstance(config, dict):
            raise ValueError
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{file.filename}: its attribute config is not a JSON object: make the file again") from None
    return config


def _first_line(error: BaseException) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error  # whose str is a repr
    return (str(text).splitlines() or [type(error).__name__])[0]
