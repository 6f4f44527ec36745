"""Look up weights: students shipped with the package by name, other files by path or address.

``MODEL_CARD.md`` in this folder describes how they were trained and how well they work.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import urlsplit

SHIPPED = ("samfeat", "samfeat-slim")
FOLDER = Path(__file__).parent
HUB = "hf://"


def find_weights(weights: str | os.PathLike[str]) -> Path:
    """Find the weights file for a name, a path or an address.

    Args:
        weights: a name in :data:`SHIPPED`, which never causes a download; a path; or an address,
            ``https://...`` or ``hf://<owner>/<repository>/<file>`` (Hugging Face), which is downloaded once into
            ``torch.hub``'s folder.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the download failed.
    """
    text = os.fspath(weights)
    if text in SHIPPED:
        return FOLDER / f"{text}.safetensors"
    if text.startswith(HUB):
        owner, repository, file = [*text.removeprefix(HUB).split("/", 2), "", ""][:3]
        if not file:
            raise ValueError(f"{text}: an address on Hugging Face is hf://<owner>/<repository>/<file>")
        text = f"https://huggingface.co/{owner}/{repository}/resolve/main/{file}"
    if text.startswith(("http://", "https://")):
        return _downloaded(text)
    if not Path(text).is_file():
        raise FileNotFoundError(f"there is no weights file {text}; the shipped students are: {', '.join(SHIPPED)}")
    return Path(text)


def _downloaded(address: str) -> Path:
    """The local copy of a file, downloaded if there is none."""
    import torch

    name = f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{Path(urlsplit(address).path).name}"
    path = Path(torch.hub.get_dir()) / "samfeat" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path), progress=False)
    return path
