"""Makers of shards for tests, in a module that worker processes can import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


class Marker:
    """Makes a shard by leaving a file with the number of its process; may kill its process once, or always."""

    def __init__(self, folder: Path, *, pause: float = 0.0, kill: int | None = None, always: bool = False) -> None:
        self.folder, self.pause, self.kill, self.always, self.stopped = folder, pause, kill, always, False
        self.running, self.most = 0, 0

    def stop(self) -> None:
        self.stopped = True

    def __call__(self, shard: int) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(self.pause)
        wound = self.folder / f"killed{shard}"
        if shard == self.kill and (self.always or not wound.exists()):
            wound.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / str(shard)).write_text(str(os.getpid()))
        self.running -= 1


class Broken(Marker):
    """Raises what a full disk raises."""

    def __call__(self, shard: int) -> None:
        if shard == 3:
            raise OSError(28, "No space left on device", "chunk")
        super().__call__(shard)
