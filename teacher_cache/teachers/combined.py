"""Several teachers as one: the embedding of the first, masks and groups of the second, edges of the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samfeat.teacher_cache.schema import TeacherOutput

if TYPE_CHECKING:
    from samfeat.teacher_cache.teachers.protocol import Teacher

OUTPUTS = ("embedding", "groups", "edges")


@dataclass(frozen=True)
class CombinedTeacher:
    """See :class:`samfeat.teacher_cache.teachers.protocol.Teacher`.

    Attributes:
        parts: the teachers of embedding, of masks and groups, and of edges. Each runs once per image, even if it is
            used for several outputs.
    """

    parts: tuple[Teacher, Teacher, Teacher]

    @classmethod
    def of(cls, teachers: Sequence[Teacher]) -> CombinedTeacher:
        """Two teachers (embedding; all the rest) or three (embedding; masks and groups; edges).

        Raises:
            ValueError: another number.
        """
        if not 2 <= len(teachers) <= 3:
            raise ValueError(
                f"combine two teachers (embedding+rest) or three (embedding+groups+edges), not {len(teachers)}"
            )
        return cls((teachers[0], teachers[1], teachers[-1]))

    @property
    def name(self) -> str:
        """Names of the parts, joined by +."""
        return "+".join(part.name for part in (self.parts[:2] if self.parts[1] is self.parts[2] else self.parts))

    def provenance(self) -> dict[str, Any]:
        """JSON values: which teacher gives which output."""
        return {"name": self.name, **{what: part.provenance() for what, part in zip(OUTPUTS, self.parts, strict=True)}}

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the first teacher."""
        return self.parts[0].embedding_shape(image_size)

    def __call__(self, images: np.ndarray) -> list[TeacherOutput]:
        """The targets of ``images``, uint8 [B, H, W, 3] in RGB."""
        outputs = {id(part): part(images) for part in {id(part): part for part in self.parts}.values()}
        embeddings, groups, edges = (outputs[id(part)] for part in self.parts)
        return [
            replace(of_groups, embedding=of_embedding.embedding, edges=of_edges.edges)
            for of_embedding, of_groups, of_edges in zip(embeddings, groups, edges, strict=True)
        ]


def split(name: str) -> list[tuple[str, Path | None]]:
    """Name and weights file of each part of ``name[=FILE]+name[=FILE]``."""
    parts = (part.partition("=") for part in name.split("+"))
    return [(part, Path(file) if file else None) for part, _, file in parts]
