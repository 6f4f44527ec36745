"""Save and load the state of a training run (the latest and the previous one), and weights to start from.

A checkpoint is a zip file as written by ``torch.save``, with the SHA-256 of all preceding bytes as its comment:
``torch.load`` reads it, and any changed bit is detected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samfeat.files import write_bytes
from samfeat.student.export import load_weights
from samfeat.student.network import SAMFeatNetwork
from samfeat.student.weights import find_weights

VERSION = 4
NAMES = ("last.ckpt", "previous.ckpt")
DIGEST = 64  # hexadecimal digits of a SHA-256

logger = logging.getLogger(__name__)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state as the latest of its folder; the former latest becomes the previous one."""
    last, previous = (folder / name for name in NAMES)
    buffer = io.BytesIO()
    torch.save({"version": VERSION} | state, buffer)
    content = buffer.getvalue()[:-2] + DIGEST.to_bytes(2, "little")  # a zip ends with the length of its comment
    if last.exists():
        os.replace(last, previous)
    write_bytes(last, content + _digest(content))


def load_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The latest undamaged state of a folder; None if there is no state. Nothing in it is executed.

    Raises:
        ValueError: there are states, but none that can be used.
    """
    problem = ""
    for path in (folder / name for name in NAMES):
        if not path.exists():
            continue
        try:
            state = _read(path, device)
        except ValueError as error:
            problem = problem or str(error)
            continue
        if problem:
            logger.warning("%s: resuming from %s", problem, path.name)
        return state
    if problem:
        raise ValueError(f"{problem}: delete it, or choose another --out")
    return None


def load_initial(student: SAMFeatNetwork, weights: str) -> None:
    """Load weights into a student, by name or path.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is damaged, or it is for another network.
    """
    path = find_weights(weights)
    loaded = load_weights(path)
    for entry in dataclasses.fields(loaded.config):
        here, there = getattr(student.config, entry.name), getattr(loaded.config, entry.name)
        if entry.name not in ("initialisation", "unused_head") and here != there:
            raise ValueError(f"{path} has network.{entry.name}={there} and this run {here}: train with that value")
    student.load_state_dict(loaded.network().state_dict())


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    content = path.read_bytes()
    if content[-DIGEST:] != _digest(content[:-DIGEST]):
        raise ValueError(f"{path} is not a readable checkpoint: its SHA-256 does not match")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        version = state["version"]
    except Exception as error:  # torch raises many kinds for a foreign file
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__})") from error
    if version != VERSION:
        raise ValueError(f"{path} has checkpoint version {version}, this program reads {VERSION}")
    if not all(tensor.isfinite().all() for tensor in _tensors(state)):
        raise ValueError(f"{path} holds weights that are not finite")
    return state


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (dict, list, tuple)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)
