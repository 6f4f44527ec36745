"""The interface of a teacher: anything that gives targets for images."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from samfeat.teacher_cache.schema import TeacherOutput


class Teacher(Protocol):
    """Gives :class:`~samfeat.teacher_cache.schema.TeacherOutput` for images.

    A teacher keeps no state between calls and may be called from several threads at once. It is pickled for worker
    processes.

    Three class methods are optional. ``build(**options)`` replaces the constructor. Either may take
    ``device``, ``checkpoint``, ``downloads`` and ``progress``, see
    :func:`samfeat.teacher_cache.teachers.make_teacher`. ``rebuild(described, *, checkpoint)`` makes the teacher whose
    :meth:`provenance` was ``described``, or returns None if that needs a checkpoint; ``inspect-cache --verify``
    recomputes targets with it. ``unfetched(downloads)`` describes the weights that :func:`make_teacher` would download.
    """

    @property
    def name(self) -> str:
        """Short name of the kind of teacher."""
        ...

    def provenance(self) -> dict[str, Any]:
        """JSON values that identify the teacher and all of its parameters (checkpoint digest included)."""
        ...

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the embedding of an image of ``image_size`` = (height, width)."""
        ...

    def __call__(self, images: np.ndarray) -> list[TeacherOutput]:
        """The targets of ``images``, uint8 [B, H, W, 3] in RGB."""
        ...
