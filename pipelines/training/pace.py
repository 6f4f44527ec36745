"""How fast a training run goes, and the values of its steps, read without making the device wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class LateValues(NamedTuple):
    """Values of a step on their way to the host.

    Attributes:
        step: its number, from 1 on.
        values: float32 [n], on the host, to be read after ``copied``.
        copied: when the copy is there; None where the values were on the host from the beginning.
    """

    step: int
    values: Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, step: int, values: Tensor) -> LateValues:
        """Start the copy."""
        if not values.is_cuda:
            return cls(step, values, None)
        copied = torch.cuda.Event()
        values = values.to("cpu", non_blocking=True)
        copied.record()
        return cls(step, values, copied)

    def read(self) -> list[float]:
        """Wait for the copy, and return the values."""
        if self.copied:
            self.copied.synchronize()
        return self.values.tolist()


class Clock:
    """Speed of the steps, and the share of their time that goes into waiting for data.

    Args:
        step: the step that counting begins at.
    """

    def __init__(self, step: int) -> None:
        self._step, self._begun, self._waited = step, time.monotonic(), 0.0

    def read(self, step: int) -> tuple[float, float]:
        """Steps a second, and the share of time spent waiting, since the last look; counting begins anew."""
        seconds = time.monotonic() - self._begun
        speed = (step - self._step) / seconds, self._waited / seconds
        self._step, self._begun, self._waited = step, time.monotonic(), 0.0
        return speed

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is waiting for data."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside does not count."""
        begun = time.monotonic()
        yield
        self._begun += time.monotonic() - begun
