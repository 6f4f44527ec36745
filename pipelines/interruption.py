"""Turn Ctrl-C and SIGTERM into stop requests, which a loop handles after saving its work."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """Context in which SIGINT and SIGTERM only set ``asked``, however often they arrive.

    A second Ctrl-C must not interrupt writing a checkpoint: people press it twice, and a terminal may send it to parent
    and child. Does nothing outside the main thread, the only one to receive signals.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._answer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
