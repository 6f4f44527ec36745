"""A teacher whose embedding is resampled to a coarser grid before it is stored, such as that of the student."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from samfeat.teacher_cache.schema import TeacherOutput

if TYPE_CHECKING:
    from samfeat.teacher_cache.teachers.protocol import Teacher


@dataclass(frozen=True)
class ResampledTeacher:
    """See :class:`samfeat.teacher_cache.teachers.protocol.Teacher`.

    Training compares embeddings on the student's grid, one cell per 8 x 8 pixels, and resamples them bilinearly to it.
    Doing so before they are stored takes 0.61 of the bytes of SAM's 64 x 64 cells for crops of 400 pixels.

    Attributes:
        teacher: gives the targets.
        stride: pixels per cell in x and y. A teacher's grid that is as coarse already is kept.
    """

    teacher: Teacher
    stride: int

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"an embedding stride is at least 1 pixel, got {self.stride}")

    @property
    def name(self) -> str:
        """Name of the teacher."""
        return self.teacher.name

    def provenance(self) -> dict[str, Any]:
        """That of the teacher, and the stride."""
        return {**self.teacher.provenance(), "embedding_stride": self.stride}

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w): a cell per stride, rounded up, but no more cells than the teacher has."""
        channels, *own = self.teacher.embedding_shape(image_size)
        rows, columns = (min(cells, -(-side // self.stride)) for cells, side in zip(own, image_size, strict=True))
        return channels, rows, columns

    def __call__(self, images: np.ndarray) -> list[TeacherOutput]:
        """The targets of ``images``, uint8 [B, H, W, 3] in RGB."""
        size = self.embedding_shape((images.shape[1], images.shape[2]))[1:]
        return [
            replace(output, embedding=_resized(output.embedding, size))
            if output.embedding.shape[1:] != size
            else output
            for output in self.teacher(images)
        ]


def _resized(embedding: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear by pixel centres without antialiasing, as in training: float32 [C, h, w]."""
    maps = torch.from_numpy(np.ascontiguousarray(embedding, np.float32))[None]
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0].numpy()
