"""Finished parts of an output file that cannot be written in one go: a run that is killed loses one of them.

An HDF5 file need not survive that its writer is killed (3 of 60 did not, in a trial that wrote all the time). So every
result is a small file of its own, in a folder beside the output, until all of them are packed at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from samfeat.pipelines.files import umask, write_bytes, write_json


class Parts:
    """Dictionaries of arrays by key, in the folder ``.<output>.parts`` until they are :meth:`packed`.

    Args:
        output: the file that they are parts of.
        config: JSON values that they depend on.

    Raises:
        ValueError: the folder holds parts of another configuration.
    """

    def __init__(self, output: Path, config: Mapping[str, Any]) -> None:
        self.output, self.folder = output, _folder(output)
        self._salt = json.dumps(dict(config), sort_keys=True)
        record = self.folder / "config.json"
        if record.exists():
            check_config(json.loads(record.read_text()), config, self.folder)
        else:
            write_json(record, dict(config))

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def __getitem__(self, key: str) -> dict[str, np.ndarray]:
        with np.load(self._path(key), allow_pickle=False) as file:
            return dict(file)

    def add(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps a part."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy types one keyword of its own
        write_bytes(self._path(key), buffer.getvalue())

    @contextmanager
    def packed(self) -> Iterator[h5py.File]:
        """A copy of the output (an empty HDF5 file where there is none) to write to; at the end it takes its place.

        With that, the parts are deleted.
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
        """Deletes all parts."""
        shutil.rmtree(self.folder)

    @staticmethod
    def discard(output: Path) -> None:
        """Deletes the parts of ``output``, of whatever configuration."""
        shutil.rmtree(_folder(output), ignore_errors=True)

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256((self._salt + key).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.npz"


def _folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.parts")


def check_config(stored: Mapping[str, Any] | None, config: Mapping[str, Any], where: Path) -> None:
    """Refuses to go on with what was made by another configuration; None = nothing stored yet.

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


def open_hdf5(path: Path) -> h5py.File:
    """An HDF5 file to read.

    Raises:
        OSError: it is damaged, absent or something else.
    """
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise OSError(f"{path} cannot be opened as HDF5 ({str(error).splitlines()[0]}): make it again") from None
