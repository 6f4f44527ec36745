"""Locks that let one run at a time write a shard of a store, robust against crashed owners and differing clocks.

Every writing run keeps a small file in the folder ``<store>.locks`` next to the store, which identifies the run, and
rewrites it with an increasing counter while it is alive. Later runs read the files of the others. An owner on the same
machine is alive if its process is. An owner elsewhere is alive if its counter increases while being watched, so clocks
are never compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import psutil
from upath import UPath

logger = logging.getLogger(__name__)

BEAT = 2.0  # seconds between heartbeats
PATIENCE = 5  # missed heartbeats after which an owner elsewhere counts as dead


@contextlib.contextmanager
def lock_store(store: UPath, *, part: tuple[int, int] = (0, 1), beat: float = BEAT) -> Iterator[None]:
    """Hold the shards k, k + n, k + 2n, ... of a store, ``part`` being (k, n).

    Args:
        store: the store, on a disk or in an object store.
        part: which shards; all of them by default.
        beat: seconds between heartbeats.

    Raises:
        ValueError: another run holds some of these shards; the message names its machine and process. Two runs that
            start at the same instant may both be refused.
    """
    folder = store.parent / f"{store.name}.locks"
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f"{uuid.uuid4().hex}.json"
    owner = {**_here(), "part": list(part), "beat": beat}
    _write(mine, owner | {"count": 0})
    stop = threading.Event()
    life = threading.Thread(target=_live, args=(mine, owner, stop), daemon=True, name="samfeat-lock")
    life.start()
    try:
        for other in sorted(folder.glob("*.json")):
            if other.name == mine.name:
                continue
            found = _read(other)
            if found is None or not _overlap(part, found["part"]):
                continue
            who = f"process {found['pid']} on {found['host']}"
            if _alive(other, found):
                raise ValueError(f"{store} is being written by {who}: wait for it to end, or stop it")
            logger.info(f"{store}: taking over from {who}, which is gone")
            other.unlink(missing_ok=True)
        yield
    finally:
        stop.set()
        life.join()
        mine.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or no real folder
            folder.rmdir()


def _live(path: UPath, owner: dict[str, Any], stop: threading.Event) -> None:
    count = 0
    while not stop.wait(owner["beat"]):
        count += 1
        with contextlib.suppress(OSError):  # a full disk must not end a run that could still succeed
            _write(path, owner | {"count": count})


def _here() -> dict[str, Any]:
    """Machine and process. Process IDs are reused; the start time tells them apart."""
    return {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "started": _started(os.getpid())}


def _boot() -> str:
    """An identifier of the current boot of this machine."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:  # not Linux
        return str(round(psutil.boot_time()))


def _started(pid: int) -> str | None:
    """Start time of a process, on a clock that is never adjusted; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        pass
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def _alive(path: UPath, owner: dict[str, Any]) -> bool:
    if (owner["host"], owner["boot"]) == (socket.gethostname(), _boot()):
        return _started(owner["pid"]) == owner["started"]
    for _ in range(math.ceil(PATIENCE)):
        time.sleep(owner["beat"])
        if not path.exists():  # it has just ended
            return False
        now = _read(path)
        if now is not None and now["count"] != owner["count"]:
            return True
    return False


def _overlap(part: tuple[int, int], other: list[int]) -> bool:
    """Whether two arithmetic progressions have a number in common."""
    return (part[0] - other[0]) % math.gcd(part[1], other[1]) == 0


def _write(path: UPath, values: dict[str, Any]) -> None:
    text = json.dumps(values)
    if path.protocol:  # an object appears whole
        path.write_text(text)
        return
    partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.partial")
    partial.write_text(text)
    partial.replace(path)


def _read(path: UPath) -> dict[str, Any] | None:
    """Contents of a lock; None if it is gone or invalid."""
    try:
        found = json.loads(path.read_text())
        return found if {"host", "boot", "pid", "started", "part", "beat", "count"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
