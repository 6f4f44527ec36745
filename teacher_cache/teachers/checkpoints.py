"""Checkpoints: download and verify SAM's official ones, and read others."""

from __future__ import annotations

import hashlib
import http.client
import os
import pickle
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BLOCK = 1 << 20  # bytes read at a time
TIMEOUT = 30  # seconds without a byte before the connection counts as lost

Progress = Callable[[int, int], None]
"""Called with (bytes present, bytes in all)."""


@dataclass(frozen=True)
class Checkpoint:
    """A known file to download.

    Attributes:
        url: http(s) address; its last part is the file's name.
        sha256: hex digest of the content.
        size: bytes.
    """

    url: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """File name, without folder."""
        return Path(urlsplit(self.url).path).name


_BASE = "https://dl.fbaipublicfiles.com/segment_anything"

CHECKPOINTS = {
    "vit_h": Checkpoint(
        f"{_BASE}/sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e", 2564550879
    ),
    "vit_l": Checkpoint(
        f"{_BASE}/sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622", 1249524607
    ),
    "vit_b": Checkpoint(
        f"{_BASE}/sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912", 375042383
    ),
}
"""The three models that SAM's authors published, by name (the six digits in a file's name begin its MD5)."""


def official_checkpoint(model: str) -> Checkpoint:
    """The published checkpoint of ``vit_h``, ``vit_l`` or ``vit_b``; ``ValueError`` for any other name."""
    if model not in CHECKPOINTS:
        raise ValueError(f"SAM models are {', '.join(CHECKPOINTS)}, got {model!r}")
    return CHECKPOINTS[model]


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_checkpoint(model: str | Checkpoint, folder: Path, *, progress: Progress | None = None) -> Path:
    """Download a checkpoint into ``folder``, unless it is there already.

    The bytes go to ``<name>.part``, which is renamed once its digest is verified. An interrupted download (or one that
    filled the disk) is resumed by the next run.

    Args:
        model: ``vit_h``, ``vit_l``, ``vit_b``, or any other file with its address, digest and size.
        folder: created if missing.
        progress: called after every block.

    Returns:
        The path of the verified file.

    Raises:
        ValueError: unknown model, or content with the wrong digest: a downloaded file is then removed, an existing one
            is left alone.
        OSError: no connection, connection lost, disk full; calling again resumes.
    """
    checkpoint = official_checkpoint(model) if isinstance(model, str) else model
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / checkpoint.name
    if path.exists():
        if file_sha256(path) != checkpoint.sha256:
            raise ValueError(f"{path} exists, but is not what {checkpoint.url} holds: move it away and fetch again")
        return path

    part = path.with_name(path.name + ".part")
    try:
        _download(checkpoint, part, progress or (lambda done, total: None))
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{checkpoint.url} -> {part}: {error}; fetch again to continue") from error
    digest = file_sha256(part)
    if digest != checkpoint.sha256:
        part.unlink()
        raise ValueError(f"{checkpoint.url} has sha256 {digest}, not {checkpoint.sha256}: removed, fetch again")
    os.replace(part, path)
    return path


def _download(checkpoint: Checkpoint, part: Path, progress: Progress) -> None:
    """Download the rest of ``part``, resuming if the server supports it."""
    have = part.stat().st_size if part.exists() else 0
    if have > checkpoint.size:
        part.unlink()
        have = 0
    progress(have, checkpoint.size)
    if have == checkpoint.size and have:
        return
    request = urllib.request.Request(checkpoint.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:  # the server sends the whole file whatever we ask for
            have = 0
        with part.open("ab" if have else "wb") as file:
            while block := response.read(BLOCK):
                file.write(block)
                have += len(block)
                progress(have, checkpoint.size)
                if have > checkpoint.size:
                    return  # not the file we know; its digest will say so
    if have < checkpoint.size:
        raise ConnectionError(f"connection closed after {have} of {checkpoint.size} bytes")


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a PyTorch checkpoint, tensors only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else.
    """
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError):
        raise ValueError(f"{path} is not a PyTorch checkpoint of tensors, or is damaged: download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a state dict: give the file that the network's authors released")
    return values
