"""Stage one's artifacts: images -> teacher -> cache -> targets.

Hands on the schema and the store, never a teacher: training imports this package and must not reach SAM.
"""

from samfeat.teacher_cache.schema import Gifts, Masks, Pair, Provenance, Record, StoreSpec, Targets, Teacher
from samfeat.teacher_cache.store import TeacherCache, open_stores

__all__ = [
    "Gifts",
    "Masks",
    "Pair",
    "Provenance",
    "Record",
    "StoreSpec",
    "Targets",
    "Teacher",
    "TeacherCache",
    "open_stores",
]
