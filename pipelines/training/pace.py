"""Speed of a training run, and the values of its steps, read without blocking the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

LATE = 2  # steps on a GPU whose values have not been read yet, so that the GPU never waits for the host


class LateValues(NamedTuple):
    """Values of a step being copied to the host.

    Attributes:
        step: its number, from 1.
        names: names of the values.
        values: float32 [n], on the host, to be read after ``copied``.
        copied: when the copy is complete; None if the values were on the host from the beginning.
    """

    step: int
    names: Sequence[str]
    values: Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, step: int, names: Sequence[str], values: Tensor) -> LateValues:
        """Start the copy."""
        if not values.is_cuda:
            return cls(step, names, values, None)
        copied = torch.cuda.Event()
        values = values.to("cpu", non_blocking=True)
        copied.record()
        return cls(step, names, values, copied)

    def read(self) -> dict[str, float]:
        """Wait for the copy, and return the values by name."""
        if self.copied:
            self.copied.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


def arrived(late: deque[LateValues], *, wait: bool) -> Iterator[LateValues]:
    """Remove and return, oldest first, the steps whose values can be read: on a GPU all but the latest :data:`LATE`.

    Args:
        late: the steps not read so far.
        wait: return every step.
    """
    while late and (wait or len(late) > (LATE if late[0].copied else 0)):
        yield late.popleft()


class Clock:
    """Steps per second, and the fraction of time spent waiting for data.

    Args:
        step: the step to count from.
    """

    def __init__(self, step: int) -> None:
        self._step, self._begun, self._waited = step, time.monotonic(), 0.0

    def read(self, step: int) -> tuple[float, float]:
        """Steps per second and the share of time spent waiting since the previous call."""
        seconds = time.monotonic() - self._begun
        speed = (step - self._step) / seconds, self._waited / seconds
        self._step, self._begun, self._waited = step, time.monotonic(), 0.0
        return speed

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Exclude the time inside."""
        begun = time.monotonic()
        yield
        self._begun += time.monotonic() - begun
