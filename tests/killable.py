"""Processes for tests that kill them: forks of one server that has imported torch and samfeat once.

A new interpreter works for four to eight seconds before it runs the first line of a training or a cache build; a fork
of the server starts in milliseconds. The server starts when a test first asks for a process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

_context = multiprocessing.get_context("forkserver")


class Killable:
    """A running ``program(send, *arguments)``; what it sends can be read here.

    Args:
        program: a function of a module that a new process can import by name (a helper, not a test), or a partial.
        arguments: to pass after ``send``; pickled.
    """

    def __init__(self, program: Callable[..., None], *arguments: Any) -> None:
        _start_server()
        self._messages, theirs = _context.Pipe(duplex=False)
        self._process = _context.Process(target=program, args=(theirs.send, *arguments))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def read(self) -> Any:
        """The next message; None where the process ended without another."""
        try:
            return self._messages.recv()
        except EOFError:
            return None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; nothing where it has ended."""
        if self.running:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> int:
        """The exit code, negative where a signal ended it."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "still running"
        return self._process.exitcode


def _start_server() -> None:
    """Start the server, once; it looks for modules where this process does."""
    _context.set_forkserver_preload(["killable_programs"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
