"""The state of a training run on disk: the last one and the one before, each whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

from samfeat.pipelines.files import write_bytes

VERSION = 2
NAMES = ("last.ckpt", "previous.ckpt")


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state as the last one of its folder; the last one becomes the one before."""
    last, previous = (folder / name for name in NAMES)
    buffer = io.BytesIO()
    torch.save({"version": VERSION} | state, buffer)
    if last.exists():
        os.replace(last, previous)
    write_bytes(last, buffer.getvalue())


def load_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The latest state of a folder that can be read; None where there is none. Nothing in it is executed.

    Raises:
        ValueError: there are states, but none that this program reads.
    """
    problem = ""
    for path in (folder / name for name in NAMES):
        if not path.exists():
            continue
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
            version = state["version"]
        except Exception as error:  # torch raises many kinds for a damaged or foreign file
            problem = problem or f"{path} is not a readable checkpoint ({type(error).__name__})"
            continue
        if version == VERSION:
            return state
        problem = problem or f"{path} has checkpoint version {version}, this program reads {VERSION}"
    if problem:
        raise ValueError(f"{problem}: delete it, or choose another --out")
    return None
